"""Projections: products of an activation with a rearranged parameter, found by putting 1..n in the parameter."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from passes.canonicalise import Graph, is_tensor, op_name, shape_of
from passes.find import product
from passes.find.execute import CPU, Piece, Unknown
from passes.find.names import module_path, owner, where
from rewrite.site import IntArray, Root


class NotLifted(Exception):
    """A site cannot be lifted: the sentence why, and the source line. `find` turns it into a `Refusal`."""

    def __init__(self, reason: str, at: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = where(at) if at is not None else ""


@dataclass(frozen=True, eq=False)
class Codes:
    """The parameter elements in a rearranged parameter: `names[which]` at flat positions `at`; -1 where it is zero."""

    names: tuple[str, ...]
    which: IntArray
    at: IntArray


@dataclass(frozen=True, eq=False)
class Projection:
    """A root: node, what it reads, and how its output lies as (positions, rows)."""

    node: fx.Node
    source: fx.Node
    parts: tuple[Root, ...]
    shape: tuple[int, ...]
    """Of the node's output with the axes in `order`: positions first, then features."""
    order: tuple[int, ...]
    positions: int
    rows: int
    source_letters: tuple[tuple[int, ...], tuple[int, ...]]
    """Axes of the source: positions, columns."""

    def to_node(self, u: Tensor) -> Tensor:
        """(positions, rows) -> the node's own layout."""
        back = [self.order.index(i) for i in range(len(self.order))]
        return u.reshape(self.shape).permute(back)

    def of_source(self, value: Tensor) -> Tensor:
        """The source's value as (positions, columns)."""
        first, last = self.source_letters
        return value.permute(*first, *last).reshape(self.positions, -1)


def projection(graph: Graph, node: fx.Node, memo: dict[fx.Node, Projection | None]) -> Projection | None:
    """The projection that a node is, or None. A product counts if exactly one side is a rearranged parameter."""
    if node not in memo:
        memo[node] = _projection(graph, node)
    return memo[node]


def _projection(graph: Graph, node: fx.Node) -> Projection | None:
    name = op_name(node)
    if name == "linear" and not graph.on_inputs(_arg(node, 1)):
        return _linear(graph, node)
    if name == "addmm" and node.kwargs.get("beta", 1) == node.kwargs.get("alpha", 1) == 1:
        return _addmm(graph, node)
    if name in ("conv1d", "conv2d", "convolution"):
        return _conv(graph, node)
    return _product(graph, node)


def _arg(node: fx.Node, i: int) -> Any:
    return node.args[i] if len(node.args) > i else None


def _linear(graph: Graph, node: fx.Node) -> Projection | None:
    x, weight, bias = node.args[0], node.args[1], _arg(node, 2)
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if len(shape_of(weight)) != 2:
        return None
    rank = len(shape_of(node))
    return _make(graph, node, x, weight, (0, 1), bias, rank - 1, (tuple(range(rank - 1)), (rank - 1,)))


def _addmm(graph: Graph, node: fx.Node) -> Projection | None:
    bias, x, weight = node.args[:3]
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)) or graph.on_inputs(weight):
        return None
    return _make(graph, node, x, weight, (1, 0), bias, 1, ((0,), (1,)))


def _conv(graph: Graph, node: fx.Node) -> Projection | None:
    x, weight, bias = node.args[0], node.args[1], _arg(node, 2)
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    kernel = shape_of(weight)
    if prod(kernel[2:]) != 1 or shape_of(x)[2:] != shape_of(node)[2:] or kernel[1] != shape_of(x)[1]:
        return None
    rank = len(shape_of(node))
    axes = (0, *range(2, rank))
    return _make(graph, node, x, weight, tuple(range(rank)), bias, 1, (axes, (1,)))


def _product(graph: Graph, node: fx.Node) -> Projection | None:
    found = product.read(graph, node)
    if found is None:
        return None
    sides = [is_weight(graph, found.a), is_weight(graph, found.b)]
    if sum(sides) != 1:
        return None
    first = sides[0]
    weight, x, mine, other = (found.a, found.b, found.la, found.lb) if first else (found.b, found.a, found.lb, found.la)
    rows, columns = found.only(first), found.contracted(not first)
    if not rows or not columns or set(mine) - {None} != set(rows) | set(columns):
        return None
    by_rows = tuple(mine.index(c) for c in (*rows, *columns))
    spare = tuple(i for i, c in enumerate(mine) if c is None)
    out = found.lo
    positions = [c for c in out if c not in rows]
    order = tuple(out.index(c) for c in (*positions, *rows))
    source_axes = tuple(other.index(c) for c in positions if c in other)
    axes = (source_axes, tuple(other.index(c) for c in columns))
    return _assemble(graph, node, x, weight, (*by_rows, *spare), len(rows), None, order, len(positions), axes)


def is_weight(graph: Graph, node: fx.Node) -> bool:
    """Parameters behind it, no input, and only rearranged."""
    if graph.on_inputs(node) or not graph.on_parameters(node) or not is_tensor(node):
        return False
    return codes(graph, node) is not None


def _make(
    graph: Graph,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    by_rows: tuple[int, ...],
    bias: Any,
    feature: int,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
) -> Projection | None:
    order = (*(i for i in range(len(shape_of(node))) if i != feature), feature)
    return _assemble(graph, node, x, weight, by_rows, 1, bias, order, len(order) - 1, axes)


def _assemble(
    graph: Graph,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    by_rows: tuple[int, ...],
    row_axes: int,
    bias: Any,
    order: tuple[int, ...],
    leading: int,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
) -> Projection | None:
    """Put together; `by_rows` brings the weight to (rows..., columns...), `order` the output to (positions, rows)."""
    sizes = shape_of(weight)
    rows = prod(sizes[i] for i in by_rows[:row_axes])
    if weight in graph.parameters and by_rows == (0, 1):
        flat = _direct(graph.parameters[weight], sizes)
    else:
        spelled = codes(graph, weight)
        flat = None if spelled is None else _rows_of(spelled, sizes, by_rows, rows)
    biases = _bias_codes(graph, bias, rows)
    if flat is None or biases is None:
        return None
    name = transparent(graph, x).name
    parts = _parts(flat, biases, name, module_path(node))
    shape = tuple(shape_of(node)[i] for i in order)
    return Projection(node, x, parts, shape, order, prod(shape[:leading]), rows, axes)


Rows = tuple[list[str], IntArray, int, int]
"""Tensor of each row, start of each row, stride, columns."""


def _direct(name: str, sizes: tuple[int, ...]) -> Rows:
    return [name] * sizes[0], np.arange(sizes[0], dtype=np.int64) * sizes[1], 1, sizes[1]


def _rows_of(spelled: Codes, sizes: tuple[int, ...], by_rows: tuple[int, ...], rows: int) -> Rows | None:
    """One start a row and one stride for all, or None."""
    at = spelled.at.reshape(sizes).transpose(by_rows).reshape(rows, -1)
    which = spelled.which.reshape(sizes).transpose(by_rows).reshape(rows, -1)
    columns = at.shape[1]
    stride = int(at[0, 1] - at[0, 0]) if columns > 1 else 1
    if (which != which[:, :1]).any() or (which < 0).any():
        return None
    if (at != at[:, :1] + stride * np.arange(columns)[None]).any():
        return None
    return [spelled.names[i] for i in which[:, 0]], at[:, 0].astype(np.int64), stride, columns


def _bias_codes(graph: Graph, bias: Any, rows: int) -> list[tuple[str | None, int]] | None:
    """Tensor and flat position for each row; (None, -1) where the bias is zero."""
    if bias is None:
        return list[tuple[str | None, int]]([(None, -1)]) * rows
    spelled = codes(graph, bias) if isinstance(bias, fx.Node) and not graph.on_inputs(bias) else None
    if spelled is None or spelled.at.size not in (1, rows):
        return None
    which, at = (np.broadcast_to(x.reshape(-1), (rows,)) for x in (spelled.which, spelled.at))
    return [(spelled.names[w] if w >= 0 else None, int(a)) for w, a in zip(which, at, strict=True)]


def _parts(rows: Rows, biases: list[tuple[str | None, int]], source: str, path: str) -> tuple[Root, ...]:
    """Neighbouring rows of one weight and one bias tensor make one root."""
    names, starts, stride, columns = rows
    keys = [(name, bias[0]) for name, bias in zip(names, biases, strict=True)]
    cuts = [0, *(i for i in range(1, len(keys)) if keys[i] != keys[i - 1]), len(keys)]
    roots: list[Root] = []
    for low, high in pairwise(cuts):
        name, bias = keys[low]
        at = None if bias is None else np.array([b[1] for b in biases[low:high]], dtype=np.int64)
        roots.append(Root(name, starts[low:high], stride, columns, bias, at, source, owner(path, name)))
    return tuple(roots)


def codes(graph: Graph, node: fx.Node) -> Codes | None:
    """Run on 1..n in the parameters behind a node: only those integers come out, or it is no rearrangement.

    A second filling tells a gather from arithmetic that happens to give integers.
    """
    if node in graph.parameters:
        shape = shape_of(node)
        return Codes((graph.parameters[node],), np.zeros(shape, np.int64), np.arange(prod(shape)).reshape(shape))
    behind = [p for p in graph.behind(node) if p in graph.parameters]
    sizes = [prod(shape_of(p)) for p in behind]
    starts = np.cumsum([1, *sizes])
    total = int(starts[-1])
    try:
        piece = Piece(graph, behind, [node])
        up = piece.one(*_filled(behind, starts, 1)).numpy()
        down = piece.one(*_filled(behind, starts, -1)).numpy()
    except (Unknown, RuntimeError, TypeError, AttributeError, ValueError):
        return None
    zero = up == 0
    if up.dtype.kind != "i" and not np.array_equal(up, np.rint(up)):
        return None
    if np.any((up < 0) | (up >= total)) or np.any(np.where(zero, down != 0, up + down != total)):
        return None
    up = up.astype(np.int64)
    which = np.searchsorted(starts, up, side="right") - 1
    return Codes(tuple(graph.parameters[p] for p in behind), which, np.where(zero, -1, up - starts[which]))


def _filled(behind: list[fx.Node], starts: Any, step: int) -> list[Tensor]:
    """1, 2, ... or n, n - 1, ... through all the parameters."""
    total = int(starts[-1])
    wide = torch.float64 if total < 1 << 22 else torch.int32
    shift = total if step < 0 else 0
    return [
        (torch.arange(low, low + prod(shape_of(p)), dtype=wide, device=CPU) * step + shift).reshape(shape_of(p))
        for p, low in zip(behind, starts, strict=False)
    ]


def transparent(graph: Graph, node: fx.Node) -> fx.Node:
    """The value behind steps that hand on the same numbers in the same order: casts, views, dropout, clones."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        source = node.all_input_nodes[0]
        if not is_tensor(source) or not is_tensor(node) or prod(shape_of(source)) != prod(shape_of(node)):
            break
        probe = torch.linspace(-1.5, 1.0, prod(shape_of(source)), dtype=torch.float64).reshape(shape_of(source))
        if not source.meta["val"].dtype.is_floating_point:
            break
        try:
            same = torch.equal(Piece(graph, [source], [node]).one(probe).reshape(-1), probe.reshape(-1))
        except (Unknown, RuntimeError, TypeError, AttributeError):
            break
        if not same:
            break
        node = source
    return node
