"""Index lists: the tiles of a mask whose tables are read at positions, such as a list of blocks.

What hangs on positions alone is solved as in a schedule; a table gives the least and the largest of its entries over
each tile. So the work is linear in the number of pairs of tiles and nothing is asked pair of tokens by pair of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor

from codegen.bounds import Range, Span, spread
from codegen.integers import Int, add, name
from codegen.printed import program
from codegen.runs import Run, clause_run
from codegen.schedule import Over
from rewrite.mask import Mask
from rewrite.mask.clauses import Clause, Form, clauses
from rewrite.mask.terms import FAR, FIRST, PAST, At, Div, Mod, k, q


@dataclass(frozen=True)
class Tiling:
    """Lengths, sizes of tiles, and how many rows and heads there are; one row or head stands for all that are alike.

    `lengths`: queries and keys of each row, (rows,) each, where they are fewer than `queries` and `keys`.
    """

    queries: int
    keys: int
    tile_q: int
    tile_k: int
    rows: int = 1
    heads: int = 1
    lengths: tuple[Tensor, Tensor] | None = None
    first: int = 0
    """The first head."""


HELD = 2**26
"""Pairs of tiles that are looked at together: long prompts go some heads after the other."""


@dataclass(frozen=True)
class Lists:
    """For every (row, head, fixed tile): how many tiles, int32, and which, int32 (row, head, fixed tile, most)."""

    full_counts: Tensor
    full: Tensor
    masked_counts: Tensor
    masked: Tensor


def lists(mask: Mask, over: Over, at: Tiling, tables: Mapping[str, Tensor] | None = None) -> Lists:
    """Tiles to visit, those without masking and those with, as `Schedule` defines them, in ascending order.

    `tables` are the mask's, on the device that the lists are wanted on.
    """
    pairs = at.rows * -(-at.queries // at.tile_q) * -(-at.keys // at.tile_k)
    step = max(1, HELD // max(1, pairs))
    parts = [
        _lists(mask, over, replace(at, heads=min(step, at.heads - i), first=at.first + i), tables)
        for i in range(0, at.heads, step)
    ]
    if len(parts) == 1:
        return parts[0]
    full, masked = ([getattr(x, name) for x in parts] for name in ("full", "masked"))
    counts = (torch.cat([getattr(x, name) for x in parts], 1) for name in ("full_counts", "masked_counts"))
    return Lists(next(counts), _joined(full), next(counts), _joined(masked))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Lists of some heads after those of others, as wide as the widest."""
    most = max(x.shape[-1] for x in parts)
    return torch.cat([torch.nn.functional.pad(x, (0, most - x.shape[-1])) for x in parts], 1)


def _lists(mask: Mask, over: Over, at: Tiling, tables: Mapping[str, Tensor] | None) -> Lists:
    some, every = tiles(mask, at, tables)
    last = torch.arange(some.shape[-1 if over == "k" else -2], device=some.device)
    size, length = (at.tile_k, at.keys) if over == "k" else (at.tile_q, at.queries)
    if at.lengths is not None:
        length = at.lengths[over == "k"].to(some.device)[:, None, None, None]
    whole = (last + 1) * size <= length
    if over == "q":
        some, every = some.transpose(-1, -2), every.transpose(-1, -2)
    every = every & some & whole
    chosen = every, some & ~every
    counts = [x.sum(-1, dtype=torch.int32) for x in chosen]
    # the host waits for these two numbers, and sees nothing else of the lists
    widths = torch.stack([n.amax() for n in counts]).tolist() if counts[0].numel() else [0, 0]
    full, masked = (packed(x, most) for x, most in zip(chosen, widths, strict=True))
    return Lists(counts[0], full, counts[1], masked)


def packed(chosen: Tensor, most: int) -> Tensor:
    """(..., most) int32: places of what is true in order, `most` of them at the most; then zeros."""
    place = torch.where(chosen, chosen.cumsum(-1) - 1, most)
    index = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device).expand_as(place)
    found = torch.zeros(*chosen.shape[:-1], most + 1, dtype=torch.int32, device=chosen.device)
    return found.scatter_(-1, place, index)[..., :most].contiguous()


def tiles(mask: Mask, at: Tiling, tables: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(rows, heads, query tiles, key tiles): a pair may be allowed; all pairs that are there are."""
    given = tables or {n: torch.from_numpy(t) for n, t in mask.tables.items()}
    view = _View(at, {name: narrowed(table) for name, table in given.items()})
    shape = (at.rows, at.heads, -(-at.queries // at.tile_q), -(-at.keys // at.tile_k))
    some = torch.zeros(shape, dtype=torch.bool, device=view.device)
    every = torch.zeros(shape, dtype=torch.bool, device=view.device)
    found = entries(mask)
    for i, entry in enumerate(found):
        low, high = view.entries(entry)
        view.names |= {f"low{i}": low, f"high{i}": high}
    for clause in clauses_of(mask):
        solved, read = bounds(clause)
        may, must = view.runs(solved)
        for atom in read:
            low, high = view.extremes(atom, found)
            may, must = may & (high >= 0), must & (low >= 0)
        some |= may
        every |= must
    return some & view.there, every & view.there


def narrowed(table: Tensor) -> Tensor:
    """A table as kernels take it: 32 bits, in one piece."""
    small = table.dtype in (torch.bool, torch.int8, torch.uint8, torch.int16)
    return (table if small else table.clamp(-FAR, FAR)).to(torch.int32).contiguous()


def clauses_of(mask: Mask) -> tuple[Clause, ...]:
    """The mask as a disjunction."""
    return tuple(clauses(mask.keep))


def bounds(clause: Clause) -> tuple[Clause, tuple[Form, ...]]:
    """Atoms that a schedule solves, and those that read tables at positions."""
    read = tuple(a for a in clause.atoms if any(_read(t) for t, _ in a.weights))
    return Clause(tuple(a for a in clause.atoms if a not in read), clause.whole), read


def _read(term: Any) -> list[At]:
    """Tables (not of spans) inside a term that are read at positions."""
    found = [x for x in term.atoms(At) if x.free_symbols & {q, k}]
    return [x for x in found if not str(x.args[0]).endswith((FIRST, PAST))]


@lru_cache(maxsize=256)
def run_of(clause: Clause) -> Run:
    """What solved atoms give over key tiles; all that comes periodically is masked."""
    run = clause_run(clause, "k")
    return run if run.period is None else run.whole


@lru_cache(maxsize=256)
def entries(mask: Mask) -> tuple[At, ...]:
    """All tables that are read at positions, each as it is read."""
    read = (a for clause in clauses_of(mask) for a in bounds(clause)[1])
    return tuple(sorted({x for a in read for t, _ in a.weights for x in _read(t)}, key=str))


_OVER: Range = {q: Span(name("q0"), add(name("q1"), -1)), k: Span(name("k0"), add(name("k1"), -1))}


def spans(entry: At) -> list[Span]:
    """The indices that a pair of tiles reads a table by."""
    found = [spread([(i, 1)], 0, _OVER) for i in entry.args[1:]]
    known = [s for s in found if s is not None]
    if len(known) < len(found):
        raise ValueError(f"{entry} is read at an index that is no integer expression of positions")
    return known


def form(atom: Form, found: Sequence[At]) -> Span | None:
    """The least and the largest of a form over a pair of tiles; `low0`, `high0` are those of the first entry, ..."""
    over, swapped = dict(_OVER), dict[Any, Any]()
    for i, entry in enumerate(found):
        swapped[entry] = sympy.Symbol(f"entry{i}", integer=True)
        over[swapped[entry]] = Span(name(f"low{i}"), name(f"high{i}"))
    return spread([(t.xreplace(swapped), w) for t, w in atom.weights], atom.constant, over)


def most_entries(entry: At, at: Tiling) -> tuple[int, ...] | None:
    """At most so many entries are read along each axis by a pair of tiles; None where that hangs on tables."""
    return _most(entry, at.tile_q, at.tile_k)


@lru_cache(maxsize=256)
def _most(entry: At, tile_q: int, tile_k: int) -> tuple[int, ...] | None:
    if any(x.atoms(At, Mod) for x in entry.args[1:]):
        return None
    lines, texts = program([x for span in spans(entry) for x in (span.low, span.high)])
    space = {"q0": 0, "q1": tile_q, "k0": 0, "k1": tile_k, "b": 0, "h": 0, "offset": 0, "N": 0, "T": 0}
    exec("\n".join(lines), space)  # our own printer's text
    ends = [eval(text, space) for text in texts]
    # a quotient's ends lie one farther apart where a tile begins elsewhere
    slack = [len(i.atoms(Div)) for i in entry.args[1:]]
    return tuple(high - low + 1 + more for low, high, more in zip(ends[::2], ends[1::2], slack, strict=True))


class _View:
    """Expressions over all tiles at once, as tensors that broadcast to (rows, heads, query tiles, key tiles)."""

    def __init__(self, at: Tiling, tables: Mapping[str, Tensor]) -> None:
        self.at, self.tables = at, tables
        self.device = next((t.device for t in tables.values()), torch.device("cpu"))
        queries, keys = (torch.tensor([n]) for n in (at.queries, at.keys)) if at.lengths is None else at.lengths
        queries, keys = (n.to(self.device, torch.int32)[:, None, None, None] for n in (queries, keys))
        offset = keys - queries
        first_q = self._axis(at.queries, at.tile_q)[:, None]
        first_k = self._axis(at.keys, at.tile_k)
        self.first_k = first_k
        self.there = (first_q < queries) & (first_k < keys)
        self.names: dict[str, Any] = {
            "q0": first_q + offset,
            "q1": torch.minimum(first_q + at.tile_q, queries) + offset,
            "k0": first_k,
            "k1": torch.minimum(first_k + at.tile_k, keys),
            "b": self._axis(at.rows, 1)[:, None, None, None],
            "h": self._axis(at.heads, 1)[:, None, None] + at.first,
            "N": keys,
            "T": queries,
            "offset": offset,
            "tile": at.tile_k,
            "min": _least,
            "max": _largest,
            "where": lambda c, a, b: torch.where(self._tensor(c).bool(), self._tensor(a), self._tensor(b)),
            "load": self._load,
        }

    def _axis(self, length: int, step: int) -> Tensor:
        return torch.arange(0, length, step, device=self.device, dtype=torch.int32)

    def _tensor(self, x: Any) -> Tensor:
        return x if isinstance(x, Tensor) else torch.tensor(x, device=self.device)

    def _load(self, table: str, *index: Any) -> Tensor:
        data = self.tables[table]
        places = [self._tensor(i).clamp(0, n - 1) for i, n in zip(index, data.shape, strict=True)]
        return data[tuple(torch.broadcast_tensors(*places))]

    def values(self, roots: Sequence[Int]) -> list[Tensor]:
        """Integer expressions as tensors."""
        lines, texts = program(roots)
        space = {**self.names, **{n: n for n in self.tables}}
        exec("\n".join(lines), space)  # our own printer's text
        return [self._tensor(eval(text, space)) for text in texts]

    def runs(self, clause: Clause) -> tuple[Tensor, Tensor]:
        """Key tiles that the atoms of a clause visit, and those whose pairs they all allow."""
        run = run_of(clause)
        begin, end, inner, past = self.values([*run.visit, *run.every])
        first = self.first_k
        number = first // self.at.tile_k
        # keys that are not there count as allowed here; the ragged tile is taken out of the loops over its axis
        return (begin <= number) & (number < end), (inner <= first) & (self.names["k1"] <= past)

    def extremes(self, atom: Form, found: Sequence[At]) -> tuple[Tensor, Tensor]:
        """The least and the largest of a form over each pair of tiles."""
        span = form(atom, found)
        if span is None:
            return self._tensor(-1), self._tensor(1)
        low, high = self.values([span.low, span.high])
        return low, high

    def _widths(self, ends: list[list[Tensor]], points: list[bool]) -> list[int]:
        """The most entries that a pair of tiles reads along each axis, for which the host waits once."""
        wide = [(high - low).amax() + 1 for (low, high), point in zip(ends, points, strict=True) if not point]
        found = iter(torch.stack(wide).tolist() if wide else [])
        return [1 if point else int(next(found)) for point in points]

    def entries(self, entry: At) -> tuple[Tensor, Tensor]:
        """Extremes of a table's entries over the indices that each pair of tiles reaches."""
        reach = spans(entry)
        ends = [self.values([s.low, s.high]) for s in reach]
        table = self.tables[str(entry.args[0])]
        ends = [[e.clamp(0, n - 1) for e in pair] for pair, n in zip(ends, table.shape, strict=True)]
        widths = self._widths(ends, [s.low is s.high for s in reach])
        widest = widths.index(max(widths))
        least, largest = doubled(table, widest, widths[widest])
        low, high = ends[widest]
        level = self._tensor(0) + sum((high - low + 1 >= 2**j).int() for j in range(1, len(least)))
        places = (low,) if len(least) == 1 else (low, high + 1 - 2**level)  # two runs that overlap cover any span
        found: list[Tensor] = []
        for step in itertools.product(*(range(1 if axis == widest else n) for axis, n in enumerate(widths))):
            index = [torch.minimum(first + i, last) for (first, last), i in zip(ends, step, strict=True)]
            for place in places:
                at = torch.broadcast_tensors(level, *index[:widest], place, *index[widest + 1 :])
                low_entry = least[at]
                entries = [low_entry, largest[at] if len(least) > 1 else low_entry]
                found = [torch.minimum(found[0], entries[0]), torch.maximum(found[1], entries[1])] if found else entries
        return found[0], found[1]


def doubled(table: Tensor, axis: int, width: int) -> tuple[Tensor, Tensor]:
    """(levels, *table): the least and the largest of the 2^level entries from each place on along an axis, with as many
    levels as runs up to `width` ask for. So a span of any width is two looks, after work in proportion to the table."""
    least, largest = [table], [table]
    count, places = table.shape[axis], torch.arange(table.shape[axis], device=table.device)
    for level in range(max(1, width).bit_length() - 1):
        later = (places + 2**level).clamp(max=count - 1)
        least.append(torch.minimum(least[-1], least[-1].index_select(axis, later)))
        largest.append(torch.maximum(largest[-1], largest[-1].index_select(axis, later)))
    return torch.stack(least), torch.stack(largest)


def _least(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    return a.clamp(max=b) if isinstance(a, Tensor) else b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def _largest(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    return a.clamp(min=b) if isinstance(a, Tensor) else b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)
