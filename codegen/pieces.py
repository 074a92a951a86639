"""Where the work is on a CPU: the schedule's tiles as runs of keys, for one tile of queries after the other.

Slices of a tensor cost nothing, so neighbouring tiles become one run, and only the stretches of a run that hold both
allowed and forbidden pairs are masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from codegen.schedule import Schedule, Tiles, schedule
from rewrite.mask import Mask

KEYS = 64
"""Keys in a tile: runs start and end at its multiples."""
QUERIES = (256, 128, 64)
"""Queries in a tile: more make larger products, fewer visit fewer forbidden pairs."""
WASTE = 1.25
"""Keys that a tile may visit for one that the smallest tile visits."""
_JOINED = ((np.logical_and, np.logical_and), (np.logical_or, np.logical_or))
WHOLE = 512
"""Keys from which on a stretch without forbidden pairs is a run of its own: a mask costs more than a merge."""


@dataclass(frozen=True)
class Run:
    """Keys `first .. last`, and the stretches of them in which some pair is forbidden."""

    first: int
    last: int
    masked: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Queries with indices `queries` (first, one past the last) of `heads` in `rows` of the batch, and what they read.

    A query stands at its index + `offset`. Heads are some of one kv head, or all of several.
    """

    rows: tuple[int, int]
    heads: tuple[int, int]
    queries: tuple[int, int]
    offset: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Shape:
    """What pieces hang on beside the mask: (queries, keys) of each row of the batch, heads, heads of a kv head."""

    spans: tuple[tuple[int, int], ...]
    heads: int
    group: int


def pieces(mask: Mask, shape: Shape, most: int | None = None) -> Iterator[Piece]:
    """Every query that reads something, once; runs hold `most` keys at the most."""
    plan = schedule(mask, "k")
    for rows in _rows(mask, shape):
        queries, keys = shape.spans[rows[0]]
        if not queries or not keys:
            continue
        view = _View(mask, plan, rows[0], keys, keys - queries)
        size = _tile(view, queries)
        for first in range(0, queries, size):
            at = (first, min(first + size, queries))
            for heads, tiles in _heads(view, shape, at):
                runs = tuple(_runs(tiles, keys, most))
                if runs:
                    yield Piece(rows, heads, at, view.offset, runs)


@dataclass(frozen=True)
class _View:
    """The schedule of one row of the batch."""

    mask: Mask
    plan: Schedule
    row: int
    keys: int
    offset: int

    def tiles(self, head: int, first: int, last: int) -> Tiles:
        """What the queries with indices first .. last read."""
        q0, q1 = first + self.offset, last + self.offset
        if self.plan.listed:
            return self._looked(head, q0, q1)
        return self.plan.evaluate(
            KEYS, q0=q0, q1=q1, N=self.keys, offset=self.offset, b=self.row, h=head, tables=self.mask.tables
        )

    def _looked(self, head: int, q0: int, q1: int) -> Tiles:
        """Tiles of a mask that no closed form describes, by looking at all its pairs."""
        at_q, at_k = np.arange(q0, q1)[:, None], np.arange(self.keys)[None]
        keep = self.mask.holds(at_q, at_k, head, self.row, self.offset)
        starts = np.arange(0, self.keys, KEYS)
        every, some = (f.reduceat(g.reduce(keep), starts) for f, g in _JOINED)
        return Tiles(*(tuple(range(int(i), int(i) + 1) for i in np.flatnonzero(x)) for x in (every, some & ~every)))


def _rows(mask: Mask, shape: Shape) -> Iterator[tuple[int, int]]:
    """Neighbours in the batch that are computed at once."""
    if mask.per_row:
        yield from ((row, row + 1) for row in range(len(shape.spans)))
        return
    for _, same in itertools.groupby(range(len(shape.spans)), key=shape.spans.__getitem__):
        members = list(same)
        yield members[0], members[-1] + 1


def _tile(view: _View, queries: int) -> int:
    """Queries to a tile: the most that visit few keys in vain, judged in the middle and at the end."""
    smallest = min(queries, QUERIES[-1])
    ends = (queries, (queries + smallest) // 2)

    def visited(size: int) -> int:
        return sum(_count(view.tiles(0, max(0, end - size), end)) for end in ends)

    least = visited(smallest)
    return next(size for size in QUERIES if size == QUERIES[-1] or visited(size) <= WASTE * least)


def _count(tiles: Tiles) -> int:
    return sum(len(steps) for steps in (*tiles.full, *tiles.masked))


def _heads(view: _View, shape: Shape, at: tuple[int, int]) -> Iterator[tuple[tuple[int, int], Tiles]]:
    """Neighbouring heads that read the same tiles."""
    if not view.mask.per_head:
        yield (0, shape.heads), view.tiles(0, *at)
        return
    found = [view.tiles(head, *at) for head in range(shape.heads)]
    for _, same in itertools.groupby(range(shape.heads), key=found.__getitem__):
        members = list(same)
        for heads in _whole_groups(members[0], members[-1] + 1, shape.group):
            yield heads, found[heads[0]]


def _whole_groups(first: int, last: int, group: int) -> Iterator[tuple[int, int]]:
    """first .. last in pieces: parts of one kv head's heads, or all of those of several."""
    inner = (-(-first // group) * group, last // group * group)
    if inner[0] >= inner[1]:
        cuts = sorted({first, *(c for c in inner if first < c < last), last})
    else:
        cuts = sorted({first, *inner, last})
    yield from itertools.pairwise(cuts)


def _runs(tiles: Tiles, keys: int, most: int | None) -> Iterator[Run]:
    """Tiles in the order of their keys, neighbours joined."""
    parts = sorted([(t, False) for s in tiles.full for t in s] + [(t, True) for s in tiles.masked for t in s])
    joined: list[list[tuple[int, int, bool]]] = []
    for first, last, masked in _stretches(parts, keys):
        alone = not masked and last - first >= WHOLE
        if joined and joined[-1][-1][1] == first and not alone and not _alone(joined[-1]):
            joined[-1].append((first, last, masked))
        else:
            joined.append([(first, last, masked)])
    for run in joined:
        made = Run(run[0][0], run[-1][1], tuple((a, b) for a, b, masked in run if masked))
        yield from (made,) if most is None else _cut(made, most)


def _alone(run: Sequence[tuple[int, int, bool]]) -> bool:
    return not run[0][2] and run[0][1] - run[0][0] >= WHOLE


def _stretches(parts: Iterable[tuple[int, bool]], keys: int) -> Iterator[tuple[int, int, bool]]:
    """(first key, one past the last, masked) of neighbouring tiles of one kind."""
    stretch: tuple[int, int, bool] | None = None
    for tile, masked in parts:
        first, last = tile * KEYS, min((tile + 1) * KEYS, keys)
        if stretch is not None and stretch[1:] == (first, masked):
            stretch = (stretch[0], last, masked)
            continue
        if stretch is not None:
            yield stretch
        stretch = (first, last, masked)
    if stretch is not None:
        yield stretch


def _cut(run: Run, most: int) -> Iterator[Run]:
    """A run in pieces of `most` keys."""
    for first in range(run.first, run.last, most):
        last = min(first + most, run.last)
        inside = ((max(a, first), min(b, last)) for a, b in run.masked)
        yield Run(first, last, tuple((a, b) for a, b in inside if a < b))
