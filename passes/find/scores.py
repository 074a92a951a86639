"""The scores between the first product and the softmax, as a function that can be asked: f(scores) -> softmax input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, fx

from passes.canonicalise import Graph, by_value, is_tensor, shape_of
from passes.find.bits import spell
from passes.find.draw import Draw, behind
from passes.find.execute import Piece
from passes.find.product import Product
from passes.find.roots import NotLifted

if TYPE_CHECKING:
    from passes.find.core import Side

MASKED = 1000.0
"""A score that far below the best of its row is masked."""


class Scores(Protocol):
    """Both spellings of attention answer this."""

    leaves: Sequence[fx.Node]
    """Parameters and inputs that the softmax input hangs on beside the scores."""

    def shape(self) -> tuple[int, int, int]:
        """(lead, queries, keys)."""
        ...

    def __call__(self, scores: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Softmax input (lead, queries, keys) of scores of the same shape, and the columns that are no keys."""
        ...


class Fused:
    """scaled_dot_product_attention: scale, causal flag and mask are arguments."""

    def __init__(
        self, graph: Graph, node: fx.Node, mask: fx.Node | None, batch: tuple[int, ...], shape: tuple[int, int, int]
    ) -> None:
        def argument(name: str, i: int, default: object) -> object:
            return node.kwargs.get(name, node.args[i] if len(node.args) > i else default)

        self._shape, self._batch = shape, batch
        self._causal = bool(argument("is_causal", 5, False))
        scale = argument("scale", 6, None)
        query = node.args[0]
        assert isinstance(query, fx.Node)
        self._scale = float(scale) if isinstance(scale, (int, float)) else shape_of(query)[-1] ** -0.5
        self._mask = mask
        self.leaves: Sequence[fx.Node] = behind(graph, mask, []) if mask is not None else []
        self._piece = Piece(graph, self.leaves, [mask]) if mask is not None else None

    def shape(self) -> tuple[int, int, int]:
        """(lead, queries, keys)."""
        return self._shape

    def __call__(self, scores: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """scale * scores + mask; a causal flag counts from the first key."""
        _, queries, keys = self._shape
        x = scores * self._scale
        if self._piece is not None:
            mask = self._piece.one(*values).expand(*self._batch, queries, keys).reshape(self._shape)
            x = torch.where(mask, x, -torch.inf) if mask.dtype == torch.bool else x + mask
        if self._causal:
            x = torch.where(torch.ones(queries, keys).tril().bool(), x, -torch.inf)
        return x, None


@dataclass(frozen=True, eq=False)
class Stage:
    """From the product to the softmax input. `source[row, column]` is the flat score that an element moves with."""

    node: fx.Node
    """The softmax input, behind casts and the subtraction of the row's maximum."""
    start: fx.Node
    """What the softmax reads, which has the same rows."""
    leaves: list[fx.Node]
    piece: Piece
    dim: int
    source: Tensor
    key: str
    """The letter of the key axis in the product."""
    product: Product

    @property
    def rows(self) -> tuple[int, int]:
        """(rows, columns) of the softmax input."""
        return self.source.shape[0], self.source.shape[1]

    def to_rows(self, value: Tensor) -> Tensor:
        """The softmax input with its softmax axis last, as (rows, columns)."""
        return value.movedim(self.dim, -1).reshape(self.rows)

    def from_rows(self, value: Tensor) -> Tensor:
        """Back from (rows, columns)."""
        shape = list(shape_of(self.node))
        rest = [n for i, n in enumerate(shape) if i != self.dim % len(shape)]
        return value.reshape(*rest, shape[self.dim]).movedim(-1, self.dim)

    def arranged(self, table: Side) -> Written:
        """Rows and columns in the order of the canonical scores."""
        return Written(self, table)


class Written:
    """Scores written out: the piece of graph between product and softmax."""

    def __init__(self, stage: Stage, table: Side) -> None:
        self.stage, self._table = stage, table
        self.leaves: Sequence[fx.Node] = stage.leaves
        lead, queries, keys = table.shape
        count = lead * queries * keys
        index = table.canon(torch.arange(count).reshape(shape_of(stage.product.node))).reshape(-1)
        canonical = torch.empty(count, dtype=torch.int64)
        canonical[index] = torch.arange(count)
        at = torch.where(stage.source >= 0, canonical[stage.source.clamp(min=0)], -1)
        self.row_of = _assigned(torch.where(at >= 0, at // keys, -1), lead * queries, "rows")
        columns = torch.where(at >= 0, at % keys, -1).T
        self.column_of, self.sinks = self._columns(columns, keys)

    def _columns(self, columns: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """For each key its column, and the columns that no score moves."""
        if columns.shape[0] == keys:
            return _assigned(columns, keys, "keys"), torch.empty(0, dtype=torch.int64)
        still = (columns < 0).all(-1)
        spare = columns.shape[0] - keys
        if int(still.sum()) < spare:
            raise NotLifted("the softmax runs over more than the keys", self.stage.node)
        # masked keys do not move either: sinks stand before or after them all
        quiet = torch.nonzero(still).reshape(-1)
        sinks = quiet[-spare:] if bool(still[-1]) else quiet[:spare]
        keep = torch.ones(columns.shape[0], dtype=torch.bool)
        keep[sinks] = False
        return torch.nonzero(keep).reshape(-1)[_assigned(columns[keep], keys, "keys")], sinks

    def shape(self) -> tuple[int, int, int]:
        """(lead, queries, keys)."""
        return self._table.shape

    def __call__(self, scores: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Run the piece of graph."""
        lead, queries, _ = self.shape()
        x = self.stage.to_rows(self.stage.piece.one(self._table.spread(scores), *values))[self.row_of]
        sinks = x[:, self.sinks].reshape(lead, queries, -1) if len(self.sinks) else None
        return x[:, self.column_of].reshape(self.shape()), sinks


def _assigned(named: Tensor, count: int, what: str) -> Tensor:
    """For each of `count` items its line: `named[i]` holds the names of line i; nameless lines take what is left."""
    item = named.amax(-1)
    mixed = ((named != item[:, None]) & (named >= 0)).any()
    if mixed or named.shape[0] != count:
        raise NotLifted(f"{what} of the scores are mixed before the softmax")
    line = torch.full((count,), -1)
    line[item[item >= 0]] = torch.nonzero(item >= 0).reshape(-1)
    line[line < 0] = torch.nonzero(item < 0).reshape(-1)[: int((line < 0).sum())]
    return line


def written(graph: Graph, softmax: fx.Node, above: Product, draw: Draw) -> Stage:
    """The stage of a softmax or exp written out, mapped element by element."""
    start, dim = softmax.args[0], softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim", -1)
    assert isinstance(start, fx.Node)
    assert isinstance(dim, int)
    node = _earliest(graph, start, above.node, dim, draw)
    leaves = behind(graph, node, [above.node])
    piece = Piece(graph, [above.node, *leaves], [node])
    values = draw(leaves)
    shape = shape_of(above.node)
    count = prod(shape)
    fillings = [torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (3, 4)]

    def run(choice: Tensor) -> Tensor:
        return piece.one(torch.where(choice, fillings[1], fillings[0]).reshape(shape), *values)

    spelled = spell(count, run)
    if spelled.mixed.any():
        raise NotLifted("scores of several pairs are mixed before the softmax", node)
    source = spelled.item.movedim(dim, -1).reshape(-1, spelled.item.shape[dim])
    return Stage(node, start, leaves, piece, dim, source, _key(source, above, node), above)


def _key(source: Tensor, above: Product, at: fx.Node) -> str:
    """The letter that changes along the softmax axis."""
    shape = [above.sizes[c] for c in above.lo]
    coordinates = torch.stack(torch.unravel_index(source.clamp(min=0), shape))
    known = source >= 0
    high = torch.where(known, coordinates, -1).amax(-1)
    low = torch.where(known, coordinates, 1 << 40).amin(-1)
    changing = [c for c, differs in zip(above.lo, (high > low).any(-1).tolist(), strict=True) if differs]
    if len(changing) > 1:
        raise NotLifted("the softmax runs over several axes of the scores", at)
    return changing[0] if changing else above.lo[-1]


def _like(node: fx.Node, other: fx.Node) -> bool:
    floating = is_tensor(node) and node.meta["val"].dtype.is_floating_point
    return floating and shape_of(node) == shape_of(other)


def _earliest(graph: Graph, start: fx.Node, product: fx.Node, dim: int, draw: Draw) -> fx.Node:
    """Back through casts and `s - max` as long as the softmax stays the same on random scores."""
    leaves = behind(graph, start, [product])
    values = draw(leaves)
    noise = torch.randn(shape_of(product), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    node = start
    while node is not product:
        # a mask that is all true on the example must not be stepped over: it hangs on something
        before = [x for x in by_value(node) if _like(x, start) and behind(graph, x, [product]) == leaves]
        value, *others = Piece(graph, [product, *leaves], [node, *before])(noise, *values)
        now = value.softmax(dim)
        alike = [torch.allclose(v.softmax(dim), now, 1e-10, 1e-13, equal_nan=True) for v in others]
        same = [x for x, is_same in zip(before, alike, strict=True) if is_same]
        if not same:
            return node
        node = same[0]
    return node
