"""The masks that have names. Positions are key coordinates from 0; join what looks both ways with `causal`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy

from rewrite.mask.algebra import Mask, Table
from rewrite.mask.terms import FAR, FIRST, PAST, Term, at, b, div, h, k, mod, offset, q

Number = int | Term
"""A width or a count: a number, or an entry of a table, `at("window", h)`, given with `tables`."""

all_ = Mask("all", sympy.true)
causal = Mask("causal", sympy.Le(k, q))
causal_top_left = Mask("causal_top_left", sympy.Le(k, q - offset))
"""Aligned at the first token: query i reads keys 0 to i, however many keys there are."""


def window(width: Number, tables: Mapping[str, Table] | None = None) -> Mask:
    """The last `width` keys up to the query, and all later ones: use `causal & window(w)`."""
    return _family("window", q - k < _value(width), [width], tables)


def around(width: Number, tables: Mapping[str, Table] | None = None) -> Mask:
    """Keys nearer than `width` on either side: the symmetric window."""
    return _family("around", sympy.And(q - k < _value(width), k - q < _value(width)), [width], tables)


def chunk(size: int) -> Mask:
    """Keys in the query's own chunk of `size` positions."""
    return Mask(f"chunk({size})", sympy.Eq(div(q, _positive(size)), div(k, size)))


def blocks_diagonal(size: int) -> Mask:
    """The blocks of `size` positions on the diagonal: `chunk` by its matrix name."""
    return Mask(f"blocks_diagonal({size})", chunk(size).keep)


def sink(count: Number, tables: Mapping[str, Table] | None = None) -> Mask:
    """The first `count` keys."""
    return _family("sink", k < _value(count), [count], tables)


def prefix(count: Number, tables: Mapping[str, Table] | None = None) -> Mask:
    """The first `count` keys, as a prompt that all read: `causal | prefix(n)`."""
    return _family("prefix", k < _value(count), [count], tables)


def global_(count: Number, tables: Mapping[str, Table] | None = None) -> Mask:
    """The first `count` tokens read all and are read by all."""
    return _family("global_", sympy.Or(k < _value(count), q < _value(count)), [count], tables)


def longformer(count: int, width: int) -> Mask:
    """Global first tokens, and keys nearer than `width` on either side."""
    return Mask(f"longformer({count}, {width})", (around(width) | global_(count)).keep)


def strided(stride: int) -> Mask:
    """Every `stride`-th key back and forth from the query."""
    return Mask(f"strided({stride})", sympy.Eq(mod(q - k, _positive(stride)), 0))


def dilated(width: int, stride: int) -> Mask:
    """The last `width` of every `stride`-th key up to the query, and later ones: use `causal & dilated(w, s)`."""
    return Mask(f"dilated({width}, {stride})", sympy.And(q - k < width * stride, strided(stride).keep))


def sharded(size: int, local: int, stride: int) -> Mask:
    """S2: blocks of `size`; each head reads the `local` last of them and its own one of every `stride` before, so that
    `stride` heads together read all: use `causal & sharded(size, local, stride)`."""
    near = div(q, _positive(size)) - div(k, size) < local
    own: Any = sympy.Eq(mod(div(k, size) + h, _positive(stride)), 0)
    return Mask(f"sharded({size}, {local}, {stride})", sympy.Or(near, own))


def neighbourhood(widths: Sequence[int], grid: Sequence[int], first: int = 0) -> Mask:
    """Tokens of a grid (last axis fastest) nearer than widths[i] along every axis i; the window is cut at the edges.

    The grid begins at token `first`; what stands before is not part of it, and what follows its end is its next frame.
    """
    widths, grid = tuple(map(int, widths)), tuple(map(int, grid))
    if len(widths) != len(grid) or min((*widths, *grid), default=0) < 1:
        raise ValueError(f"a neighbourhood has one width and one size for each axis, all positive: {widths}, {grid}")
    terms: list[Any] = [] if first == 0 else [q >= first, k >= first]
    below = 1
    for axis in reversed(range(len(grid))):
        at_q, at_k = div(q - first, below), div(k - first, below)
        if axis:
            at_q, at_k = mod(at_q, grid[axis]), mod(at_k, grid[axis])
        terms += [at_q - at_k < widths[axis], at_k - at_q < widths[axis]]
        below *= grid[axis]
    name = f"neighbourhood({widths}, {grid}" + (f", {first})" if first else ")")
    return Mask(name, sympy.And(*terms))


def documents(lengths: Sequence[int] | Sequence[Sequence[int]]) -> Mask:
    """Packed documents: a token reads its own. Lengths of one packing for all rows, or one list for each row.

    What follows the last document is one more of its own.
    """
    if len(lengths) and not np.ndim(lengths[0]):
        first, past = _spans(lengths)
        return spans("document", {"document" + FIRST: first, "document" + PAST: past})
    rows = [_spans(row) for row in lengths]
    size = max(len(first) for first, _ in rows)
    first, past = (np.stack([np.pad(x[i], (0, size - len(x[i])), mode="edge") for x in rows]) for i in (0, 1))
    return spans("document", {"document" + FIRST: first, "document" + PAST: past})


def spans(name: str, tables: Mapping[str, Table]) -> Mask:
    """Keys in the query's own span, from tables `name`_first and `name`_past: at every position where its span begins
    and one past its end, (positions,) or (rows, positions); the first begins at -FAR and the last ends at FAR."""
    first, past = tables[name + FIRST], tables[name + PAST]
    _check_spans(name, np.atleast_2d(first), np.atleast_2d(past))
    index = [Term(b), Term(q)] if np.ndim(first) == 2 else [Term(q)]
    inside = sympy.And(at(name + FIRST, *index).value <= k, k < at(name + PAST, *index).value)
    return Mask(f"documents({name})", inside, "constant", {name + FIRST: first, name + PAST: past})


def streaming(sinks: Sequence[int], windows: Sequence[int | None]) -> Mask:
    """Causal, for each query head its own sink and window; None is the whole context."""
    if len(sinks) != len(windows):
        raise ValueError(
            f"streaming takes a sink and a window for each query head, not {len(sinks)} and {len(windows)}"
        )
    width = [FAR if w is None else int(w) for w in windows]
    tables = {"sink": np.asarray(sinks, dtype=np.int64), "window": np.asarray(width, dtype=np.int64)}
    return streaming_of("sink", "window", tables)


def streaming_of(sinks: str, windows: str, tables: Mapping[str, Table]) -> Mask:
    """`streaming` from the names of its tables (heads,)."""
    head = Term(h)
    near = sympy.Or(q - k < at(windows, head).value, k < at(sinks, head).value)
    kept = {name: tables[name] for name in (sinks, windows)}
    return Mask(f"streaming({sinks}, {windows})", sympy.And(k <= q, near), "constant", kept)


def blocks(table: npt.ArrayLike, size: int | tuple[int, int], first: int = 0) -> Mask:
    """Any list of blocks: table[..., i, j] says whether queries first + [i*size, (i+1)*size) read keys [j*size, ...).

    `table` is (query blocks, key blocks), with heads before them, and rows before heads; `size` one number or one for
    queries and one for keys. Positions beyond the table read its edge.
    """
    data = np.asarray(table)
    return blocks_of("block", {"block": (data != 0).astype(np.int8)}, size, first)


def blocks_of(name: str, tables: Mapping[str, Table], size: int | tuple[int, int], first: int = 0) -> Mask:
    """`blocks` from the name of its table of 0 and 1."""
    axes = np.ndim(tables[name])
    if axes not in (2, 3, 4):
        raise ValueError(f"a table of blocks has axes (rows,) (heads,) query blocks, key blocks, not {axes} axes")
    size_q, size_k = (size, size) if isinstance(size, int) else size
    lead = [Term(b), Term(h)][4 - axes :]
    entry = at(name, *lead, (Term(q) - first) // size_q, Term(k) // size_k)
    text = f"{size_q}" if size_q == size_k else f"({size_q}, {size_k})"
    text = f"blocks({name}, {text}" + (f", {first})" if first else ")")
    return Mask(text, sympy.Eq(entry.value, 1), "constant", {name: tables[name]})


def _family(name: str, keep: Any, numbers: list[Number], tables: Mapping[str, Table] | None) -> Mask:
    from rewrite.mask.spell import ALGEBRA, integer

    text = ", ".join(integer(_value(x), ALGEBRA) for x in numbers)
    return Mask(f"{name}({text})", keep, "constant", dict(tables or {}))


def _value(x: Number) -> Any:
    return x.value if isinstance(x, Term) else sympy.Integer(int(x))


def _positive(size: int) -> int:
    if int(size) < 1:
        raise ValueError(f"a size is at least 1, not {size}")
    return int(size)


def _spans(lengths: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First and past of every position up to one past the last document."""
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.ndim != 1 or (sizes < 0).any():
        raise ValueError("documents have lengths of 0 or more, one list of them or one for each row")
    ends = np.cumsum(sizes[sizes > 0])
    starts = np.concatenate([[0], ends])
    past = np.concatenate([ends, [FAR]])
    starts[0] = -FAR
    repeats = np.concatenate([sizes[sizes > 0], [1]])
    return np.repeat(starts, repeats), np.repeat(past, repeats)


def _check_spans(name: str, first: Table, past: Table) -> None:
    at_ = np.arange(first.shape[-1])
    inside = (first <= at_) & (at_ < past)
    steps = first[:, 1:], past[:, :-1]
    joined = (steps[0] == first[:, :-1]) & (past[:, 1:] == steps[1]) | (steps[0] == steps[1]) & (steps[0] == at_[1:])
    if first.shape != past.shape or not inside.all() or not joined.all() or (first[:, 0] > 0).any():
        raise ValueError(f"tables {name}{FIRST} and {name}{PAST} are no spans that follow each other without a gap")
