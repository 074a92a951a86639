"""Every product of two tensors as an einsum: which letters either side has. Layout stops mattering here."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from passes.canonicalise import Graph, is_tensor, op_name, shape_of

Letters = tuple[str | None, ...]
"""One letter an axis; None for an axis of size 1 that is broadcast away."""


@dataclass(frozen=True, eq=False)
class Product:
    """`node` = einsum(a, b): `la` and `lb` name the axes of the operands, `lo` those of the result."""

    node: fx.Node
    a: fx.Node
    b: fx.Node
    la: Letters
    lb: Letters
    lo: tuple[str, ...]
    sizes: dict[str, int]

    def shared(self) -> list[str]:
        """Letters of the result that both sides have."""
        return [c for c in self.lo if c in self.la and c in self.lb]

    def only(self, first: bool) -> list[str]:
        """Letters of the result that one side alone has."""
        mine, other = (self.la, self.lb) if first else (self.lb, self.la)
        return [c for c in self.lo if c in mine and c not in other]

    def contracted(self, first: bool = True) -> list[str]:
        """Letters that are summed over, in the order of one side."""
        mine, other = (self.la, self.lb) if first else (self.lb, self.la)
        return [c for c in mine if c is not None and c in other and c not in self.lo]


def arrange(value: Tensor, letters: Letters, order: Sequence[str], sizes: dict[str, int]) -> Tensor:
    """`value` with axes named `letters`, as one axis for each letter of `order`; letters it lacks are broadcast."""
    kept = [c for c in letters if c is not None]
    squeezed = value.reshape([sizes[c] for c in kept])
    present = [c for c in order if c in kept]
    moved = squeezed.permute([kept.index(c) for c in present])
    index = tuple(slice(None) if c in present else None for c in order)
    return moved[index].expand([sizes[c] for c in order])


def read(graph: Graph, node: fx.Node) -> Product | None:
    """A matmul, mm, bmm, einsum of two operands, or a linear whose weight is an activation; else None."""
    name = op_name(node)
    if name in ("matmul", "bmm", "mm"):
        return _matmul(node)
    if name == "einsum":
        return _einsum(node)
    if name == "linear" and isinstance(node.args[1], fx.Node) and graph.on_inputs(node.args[1]) and len(node.args) < 3:
        return _linear(node)
    return None


def _sizes(pairs: Sequence[tuple[Letters, tuple[int, ...]]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for letters, shape in pairs:
        for c, n in zip(letters, shape, strict=True):
            if c is not None:
                sizes[c] = max(n, sizes.get(c, 1))
    return sizes


def _dropped(letters: Sequence[str], shape: tuple[int, ...], sizes: dict[str, int]) -> Letters:
    """An axis of size 1 against a larger one is no axis."""
    return tuple(c if n == sizes[c] else None for c, n in zip(letters, shape, strict=True))


def _make(node: fx.Node, a: fx.Node, b: fx.Node, la: Sequence[str], lb: Sequence[str], lo: Sequence[str]) -> Product:
    sizes = _sizes([(tuple(la), shape_of(a)), (tuple(lb), shape_of(b))])
    drop_a, drop_b = _dropped(la, shape_of(a), sizes), _dropped(lb, shape_of(b), sizes)
    return Product(node, a, b, drop_a, drop_b, tuple(lo), sizes)


def _matmul(node: fx.Node) -> Product | None:
    a, b = node.args[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    left, right = len(shape_of(a)), len(shape_of(b))
    if min(left, right) < 2:
        return None
    batch = string.ascii_lowercase[: max(left, right) - 2]
    la = [*batch[len(batch) - left + 2 :], "X", "Z"]
    lb = [*batch[len(batch) - right + 2 :], "Z", "Y"]
    return _make(node, a, b, la, lb, [*batch, "X", "Y"])


def _linear(node: fx.Node) -> Product | None:
    a, b = node.args[:2]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    if len(shape_of(b)) != 2:
        return None
    batch = string.ascii_lowercase[: len(shape_of(a)) - 1]
    return _make(node, a, b, [*batch, "Z"], ["Y", "Z"], [*batch, "Y"])


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    a, b = operands
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and is_tensor(a) and is_tensor(b)):
        return None
    left, _, out = equation.partition("->")
    if "->" not in equation or left.count(",") != 1:
        return None
    ta, tb = left.split(",")
    la, lb, lo = _spell(ta, tb, out, len(shape_of(a)), len(shape_of(b)))
    if len(set(la)) < len(la) or len(set(lb)) < len(lb):
        return None
    return _make(node, a, b, la, lb, lo)


def _spell(ta: str, tb: str, out: str, left: int, right: int) -> tuple[list[str], list[str], list[str]]:
    """Ellipses as digits, aligned at the end as in broadcasting."""
    width = max(left - len(ta) + 3 if "..." in ta else 0, right - len(tb) + 3 if "..." in tb else 0)
    dots = string.digits[:width]

    def spelled(term: str, rank: int) -> list[str]:
        if "..." not in term:
            return list(term)
        have = rank - len(term) + 3
        return list(term.replace("...", dots[width - have :]))

    return spelled(ta, left), spelled(tb, right), list(out.replace("...", dots))
