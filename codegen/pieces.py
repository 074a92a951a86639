"""Where the work is on a CPU: the schedule's tiles as runs of keys, for one tile of queries after the other.

Slices of a tensor cost nothing, so neighbouring tiles become one run, and only the stretches of a run that hold both
allowed and forbidden pairs are masked. Tiles of queries that read alike, each a little further on, become one piece:
small tiles visit few forbidden pairs, and many at once cost few calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from codegen.lists import Tiling, tiles
from codegen.schedule import Schedule, Tiles, schedule
from rewrite.mask import Mask
from rewrite.site import IntArray

KEYS = 64
"""Keys in a tile: runs start and end at its multiples."""
LISTED = 128
"""Queries in a tile of a mask that is a list of blocks, which are about as large."""
WHOLE = 512
"""Keys from which on a stretch without forbidden pairs is a run of its own: a mask costs more than a merge."""


@dataclass(frozen=True)
class Manner:
    """How tiles are computed. `speed`: how fast pairs are in query tiles of a size; `stacked`: queries of a stack of
    tiles at the most, and `longest`: keys of a run."""

    speed: tuple[tuple[int, float], ...]
    stacked: int = 0
    longest: int | None = None


FUSED = Manner(((64, 0.89), (256, 0.97), (768, 1.0)), stacked=2048)
"""By torch's own kernel; measured on it."""
GRADIENTS = Manner(((64, 0.6), (256, 0.9), (768, 1.0)))
"""By its backward pass."""
PRODUCTS = Manner(((64, 0.6), (256, 0.9), (768, 1.0)), longest=1024)
"""By products that hold their scores, whose operands would be copied to be stacked."""


@dataclass(frozen=True)
class Run:
    """Keys `first .. last`, and the stretches of them in which some pair is forbidden. The next tile of a stack reads
    what stands `step` keys later."""

    first: int
    last: int
    masked: tuple[tuple[int, int], ...] = ()
    step: int = 0

    def moved(self, by: int) -> Run:
        """The same, `by` keys later."""
        return replace(
            self, first=self.first + by, last=self.last + by, masked=tuple((a + by, b + by) for a, b in self.masked)
        )


@dataclass(frozen=True)
class Piece:
    """Queries with indices `queries` (first, one past the last) of `heads` in `rows` of the batch, and what they read.

    A query stands at its index + `offset`. Heads are some of one kv head, or all of several. `count` tiles as long as
    this one follow each other where it is above 1; it is of one row then.
    """

    rows: tuple[int, int]
    heads: tuple[int, int]
    queries: tuple[int, int]
    offset: int
    runs: tuple[Run, ...]
    count: int = 1


@dataclass(frozen=True)
class Shape:
    """What pieces hang on beside the mask: (queries, keys) of each row of the batch, heads, heads of a kv head."""

    spans: tuple[tuple[int, int], ...]
    heads: int
    group: int


@lru_cache(maxsize=32)
def pieces(mask: Mask, shape: Shape, manner: Manner = FUSED) -> tuple[Piece, ...]:
    """Every query that reads something, once. The layers of a model ask for the same ones."""
    return tuple(_pieces(mask, shape, manner))


def _pieces(mask: Mask, shape: Shape, manner: Manner) -> Iterator[Piece]:
    plan = schedule(mask, "k")
    for rows in _rows(mask, shape, manner):
        queries, keys = shape.spans[rows[0]]
        if not queries or not keys:
            continue
        view = _View(mask, plan, rows[0], queries, keys)
        size = view.size(manner, shape.group)
        for heads, found in _heads(view.tiles(size, shape.heads), shape):
            runs = (tuple(_runs(tiles, keys, manner.longest)) for tiles in found)
            ends = ((first, min(first + size, queries)) for first in range(0, queries, size))
            plain = [Piece(rows, heads, at, view.offset, r) for at, r in zip(ends, runs, strict=True) if r]
            yield from _stacks(plain, max(1, manner.stacked // size))


@dataclass(frozen=True)
class _View:
    """The schedule of one row of the batch."""

    mask: Mask
    plan: Schedule
    row: int
    queries: int
    keys: int

    @property
    def offset(self) -> int:
        """The first query's position."""
        return self.keys - self.queries

    def size(self, manner: Manner, group: int) -> int:
        """Queries in a tile: what costs least, judged on as many queries as the largest has, in the middle and at the
        end. The `group` heads of a kv head make so many times more rows."""
        sizes = [size for size, _ in manner.speed if size < self.queries] or [self.queries]
        if self.plan.listed:
            return min(LISTED, self.queries)

        def cost(size: int) -> float:
            speed = max(s for n, s in manner.speed if n <= max(size * group, manner.speed[0][0]))
            starts = (max(0, last - sizes[-1]) for last in (self.queries, (self.queries + sizes[-1]) // 2))
            firsts = np.concatenate([np.arange(start, start + sizes[-1], size) for start in starts])
            found = self._solved([0], firsts, np.minimum(firsts + size, self.queries))[0]
            return size * sum(len(steps) for tiles in found for steps in (*tiles.full, *tiles.masked)) / speed

        return min(sizes, key=cost)

    def tiles(self, size: int, heads: int) -> list[list[Tiles]]:
        """What each tile of `size` queries reads, for every head; for one where all are alike."""
        heads = heads if self.mask.per_head else 1
        if self.plan.listed:
            at = Tiling(self.queries, self.keys, size, KEYS, self.row + 1 if self.mask.per_row else 1, heads)
            some, every = (x[-1].tolist() for x in tiles(self.mask, at))
            return [[_numbered(a, e) for a, e in zip(*rows, strict=True)] for rows in zip(some, every, strict=True)]
        firsts = np.arange(0, self.queries, size)
        return self._solved(range(heads), firsts, np.minimum(firsts + size, self.queries))

    def _solved(self, heads: Sequence[int], firsts: IntArray, lasts: IntArray) -> list[list[Tiles]]:
        """By closed form, for every head and all queries with indices first .. last."""
        q0, q1 = firsts + self.offset, lasts + self.offset
        return self.plan.of_queries(KEYS, q0, q1, self.keys, self.offset, self.row, heads, self.mask.tables)


def _numbered(some: Sequence[bool], every: Sequence[bool]) -> Tiles:
    full = tuple(range(i, i + 1) for i, x in enumerate(every) if x)
    return Tiles(full, tuple(range(i, i + 1) for i, (x, e) in enumerate(zip(some, every, strict=True)) if x and not e))


def _rows(mask: Mask, shape: Shape, manner: Manner) -> Iterator[tuple[int, int]]:
    """Neighbours in the batch that are computed at once."""
    for _, same in itertools.groupby(range(len(shape.spans)), key=shape.spans.__getitem__):
        members = list(same)
        stacks = manner.stacked > 0 and shape.spans[members[0]][0] > manner.speed[0][0]
        if mask.per_row or stacks:
            yield from ((row, row + 1) for row in members)
        else:
            yield members[0], members[-1] + 1


def _heads(found: list[list[Tiles]], shape: Shape) -> Iterator[tuple[tuple[int, int], list[Tiles]]]:
    """Neighbouring heads that read the same tiles."""
    if len(found) == 1:
        yield (0, shape.heads), found[0]
        return
    for _, same in itertools.groupby(range(shape.heads), key=found.__getitem__):
        members = list(same)
        for heads in _whole_groups(members[0], members[-1] + 1, shape.group):
            yield heads, found[heads[0]]


def _whole_groups(first: int, last: int, group: int) -> Iterator[tuple[int, int]]:
    """first .. last in pieces: parts of one kv head's heads, or all of those of several."""
    whole = (-(-first // group) * group, last // group * group)
    yield from itertools.pairwise(sorted({first, *(c for c in whole if first < c < last), last}))


def _runs(tiles: Tiles, keys: int, most: int | None) -> Iterator[Run]:
    """Tiles in the order of their keys, neighbours joined."""
    parts = sorted([(t, False) for s in tiles.full for t in s] + [(t, True) for s in tiles.masked for t in s])
    joined: list[list[tuple[int, int, bool]]] = []
    for stretch in _stretches(parts, keys):
        alone = _alone(stretch) or (bool(joined) and _alone(joined[-1][-1]))
        if joined and joined[-1][-1][1] == stretch[0] and not alone:
            joined[-1].append(stretch)
        else:
            joined.append([stretch])
    for run in joined:
        made = Run(run[0][0], run[-1][1], tuple((a, b) for a, b, masked in run if masked))
        yield from (made,) if most is None else _cut(made, most)


def _alone(stretch: tuple[int, int, bool]) -> bool:
    return not stretch[2] and stretch[1] - stretch[0] >= WHOLE


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


def _stacks(plain: Sequence[Piece], most: int) -> Iterator[Piece]:
    """Neighbours that read alike as one piece, `most` at once."""
    stack: Piece | None = None
    for piece in plain:
        joined = None if stack is None or stack.count == most else _joined(stack, piece)
        if stack is not None and joined is None:
            yield stack
        stack = joined or piece
    if stack is not None:
        yield stack


def _joined(stack: Piece, piece: Piece) -> Piece | None:
    """The stack with one more tile, if it is the next and reads what the stack's steps say."""
    size = stack.queries[1] - stack.queries[0]
    follows = piece.queries[0] == stack.queries[0] + stack.count * size and piece.queries[1] == piece.queries[0] + size
    if not follows or len(stack.runs) != len(piece.runs):
        return None
    runs: list[Run] = []
    for before, now in zip(stack.runs, piece.runs, strict=True):
        step = now.first - before.first if stack.count == 1 else before.step
        if step < 0 or replace(before.moved(step * stack.count), step=0) != now:
            return None
        runs.append(replace(before, step=step))
    return replace(stack, runs=tuple(runs), count=stack.count + 1)
