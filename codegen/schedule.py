"""Which tiles of the other axis a tile of queries, or of keys, has to visit, as closed-form integer expressions.

For a tile of one axis every conjunction of the mask gives two intervals of the other: positions where some pair is
allowed and positions where every pair is. Rounded outward and inward to tiles, their unions are what is visited and
what needs no masking. Unions of runs of numbers that are only known at run time are made by sorting the ends: the sum
of the runs' indicators does not change when begins and ends are paired anew in sorted order, and a difference of two
nested unions is the same with the inner one's ends taken as begins. Sorting a fixed number of scalars is minima and
maxima, so one kernel serves every length, head and row, and nothing of the mask's size is ever made.

Exact, in what is visited and in what is masked, where a conjunction's bounds move with the fixed position one way, as
those of all named masks do. A fixed tile that lies on both sides of a number of its own axis (a sink's end, for loops
over queries) is masked where two conjunctions share it: one tile a mask, for which all others would carry another run.

A remainder of the looped position gives runs that come again (`Segment.width` tiles every `Segment.step`) between the
other conjunctions' runs. Where the tile does not divide its period everything is visited and masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from codegen.integers import ONE, ZERO, Dialect, Int, minus
from codegen.printed import names, program
from codegen.runs import Ends, Run, clause_run, hull, masked_of, periodic, union
from rewrite.mask import Mask
from rewrite.mask.clauses import clauses
from rewrite.mask.terms import FIRST, PAST, SYMBOLS, At

Over = Literal["k", "q"]
MOST = 8
"""Conjunctions whose runs are sorted; more than that are visited from the first to the last, all masked."""


@dataclass(frozen=True)
class Segment:
    """Tiles start + (i + skip) // width * step + (i + skip) % width for i below count; plainly start + i * step."""

    start: Int
    count: Int
    step: Int = ONE
    width: Int = ONE
    skip: Int = ZERO

    @property
    def numbers(self) -> tuple[Int, ...]:
        """Its expressions in order."""
        return self.start, self.count, self.step, self.width, self.skip


@dataclass(frozen=True)
class Tiles:
    """Tile numbers: those without masking, and those with."""

    full: tuple[range, ...]
    masked: tuple[range, ...]


@dataclass(frozen=True)
class Schedule:
    """The two loops of a kernel. `full` and `masked` visit every tile with an allowed pair once; `full` ones need no
    masking. `listed`: the tiles come from data, and both are read from lists (`codegen/lists.py`).

    Over keys the expressions read q0, q1 (the fixed tile's first and one past its last query position), N keys, `tile`
    (keys of a looped tile), b, h, tables, and `offset` for a mask that is aligned at the first token. Over queries: k0,
    k1, T queries, offset (position of query 0), tile (queries of a looped tile, from query 0), b, h, tables.
    """

    full: tuple[Segment, ...]
    masked: tuple[Segment, ...]
    listed: bool = False

    @cached_property
    def names(self) -> frozenset[str]:
        """Variables and tables that the expressions read."""
        return names(x for s in (*self.full, *self.masked) for x in s.numbers)

    def program(self, dialect: Dialect = "python", prefix: str = "x") -> tuple[list[str], list[tuple[str, ...]]]:
        """Assignments of what is used more than once, and texts (start, count, step, width, skip) of every segment,
        those of `full` first."""
        lines, texts = program([x for s in (*self.full, *self.masked) for x in s.numbers], dialect, prefix)
        return lines, [tuple(texts[i : i + 5]) for i in range(0, len(texts), 5)]

    @cached_property
    def scalar(self) -> Callable[..., Any]:
        """The program over Python numbers, giving a flat tuple."""
        return self._compiled({"min": min, "max": max, "where": _where, "load": _load})

    @cached_property
    def arrays(self) -> Callable[..., Any]:
        """The program over numpy arrays that broadcast."""
        return self._compiled({"min": np.minimum, "max": np.maximum, "where": np.where, "load": _loads})

    def _compiled(self, space: dict[str, Any]) -> Callable[..., Any]:
        lines, segments = self.program()
        body = [*lines, f"return ({''.join(f'{text}, ' for s in segments for text in s)})"]
        plain = ("q0", "q1", "k0", "k1", "N", "T", "offset", "tile", "b", "h")
        tables = [f"{n} = tables[{n!r}]" for n in sorted(self.names.difference(plain))]
        exec("\n    ".join([f"def numbers({', '.join(plain)}, tables):", *tables, *body]), space)  # our own text
        return space["numbers"]

    def evaluate(
        self,
        tile: int,
        *,
        q0: int = 0,
        q1: int = 0,
        k0: int = 0,
        k1: int = 0,
        N: int = 0,
        T: int = 0,
        offset: int = 0,
        b: int = 0,
        h: int = 0,
        tables: Mapping[str, Any] | None = None,
    ) -> Tiles:
        """The tiles themselves, for numbers."""
        if self.listed:
            raise ValueError("this mask's tiles come from data: build their lists with codegen.lists")
        return self._tiles(self.scalar(q0, q1, k0, k1, N, T, offset, tile, b, h, tables))

    def of_queries(
        self, tile: int, q0: Any, q1: Any, N: int, offset: int, b: int, heads: Sequence[int], tables: Mapping[str, Any]
    ) -> list[list[Tiles]]:
        """`evaluate` over keys for each of `heads` and many tiles of queries at once, q0 and q1 (tiles,)."""
        if self.listed:
            raise ValueError("this mask's tiles come from data: build their lists with codegen.lists")
        flat = self.arrays(q0, q1, 0, 0, N, 0, offset, tile, b, np.asarray(heads)[:, None], tables)
        if not flat:
            return [[Tiles((), ())] * len(q0)] * len(heads)
        columns = [np.broadcast_to(x, (len(heads), len(q0))).tolist() for x in flat]
        return [[self._tiles(row) for row in zip(*of, strict=True)] for of in zip(*columns, strict=True)]

    def _tiles(self, flat: Sequence[int]) -> Tiles:
        cut = 5 * len(self.full)
        full, masked = (
            tuple(r for i in range(0, len(part), 5) for r in _ranges(*part[i : i + 5]))
            for part in (flat[:cut], flat[cut:])
        )
        return Tiles(full, masked)


def _ranges(start: int, count: int, step: int, width: int, skip: int) -> list[range]:
    if count <= 0:
        return []
    if width == 1:
        return [range(start, start + count * step, step)]
    groups: list[range] = []
    for group in range((skip + count - 1) // width + 1):
        first, last = max(skip - group * width, 0), min(skip + count - group * width, width)
        groups.append(range(start + group * step + first, start + group * step + last))
    return groups


def _where(condition: Any, yes: int, no: int) -> int:
    return yes if condition else no


def _load(table: Any, *index: int) -> int:
    return int(table[tuple(min(max(i, 0), n - 1) for i, n in zip(index, table.shape, strict=True))])


def _loads(table: Any, *index: Any) -> Any:
    data = np.asarray(table, dtype=np.int64)
    return data[tuple(np.clip(i, 0, n - 1) for i, n in zip(index, data.shape, strict=True))]


def schedule(mask: Mask, over: Over) -> Schedule:
    """The loops of a mask over tiles of keys for a tile of queries, or over tiles of queries for a tile of keys."""
    return derived(mask.keep, over)


@lru_cache(maxsize=1024)
def derived(keep: Any, over: Over) -> Schedule:
    """The loops of a predicate. They do not hang on what its tables hold."""
    if _from_data(keep, over):
        return Schedule((), (), True)
    found = clauses(keep)
    runs = [clause_run(c, over) for c in found]
    if len(found) > MOST:
        return Schedule((), (_plain(hull(runs, over)),))
    return _segments([r for r in runs if r.period is None], [r for r in runs if r.period is not None])


def _segments(plain: list[Run], again: list[Run]) -> Schedule:
    """At most one conjunction stays periodic: two of them could visit one tile twice."""
    again = sorted(again, key=lambda r: r.period.size if r.period else 0)
    plain += [r.whole for r in again[:-1]]
    visited, full = union(plain)
    masked = masked_of(visited, full)
    segments = [_plain(x) for x in full], [_plain(x) for x in masked]
    for run in again[-1:]:
        for kind, found in zip(segments, periodic(run, visited), strict=True):
            kind.extend(Segment(*numbers) for numbers in found)
    kept = [tuple(s for s in kind if s.count is not ZERO) for kind in segments]
    return Schedule(kept[0], kept[1])


def _plain(run: Ends) -> Segment:
    return Segment(run[0], minus(run[1], run[0]))


def _from_data(keep: Any, over: Over) -> bool:
    """A table other than of spans is read at the looped or the fixed position, so no bound is known without it."""
    positions = {SYMBOLS["q"], SYMBOLS["k"]}
    return any(positions & x.free_symbols and not str(x.args[0]).endswith((FIRST, PAST)) for x in keep.atoms(At))
