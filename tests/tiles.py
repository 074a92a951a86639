"""What a schedule visits against what a mask's table says, for all tiles at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from codegen.schedule import Over, Schedule
from rewrite.mask import Mask

Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Setting:
    """Lengths, tile sizes of queries and keys, head and row."""

    queries: int
    keys: int
    tile_q: int
    tile_k: int
    head: int = 0
    row: int = 0


def reduced(table: Bool, tile_q: int, tile_k: int, over: Over) -> tuple[Bool, Bool]:
    """(query tiles, key tiles): some pair is allowed; all are, where what the looped axis lacks in its last tile counts
    as forbidden and what the other lacks does not count."""
    t, n = table.shape
    pad = (-t % tile_q, -n % tile_k)
    shape = ((t + pad[0]) // tile_q, tile_q, (n + pad[1]) // tile_k, tile_k)
    some = np.pad(table, ((0, pad[0]), (0, pad[1]))).reshape(shape).any((1, 3))
    every = np.pad(table, ((0, pad[0]), (0, 0)), constant_values=over == "k")
    every = np.pad(every, ((0, 0), (0, pad[1])), constant_values=over == "q").reshape(shape).all((1, 3))
    return some, every


def visits(found: Schedule, over: Over, at: Setting, tables: Any) -> Any:
    """(2, fixed tiles, looped tiles): how often each is visited by the full and by the masked segments."""
    start = at.keys - at.queries
    length, tile, other, looped = (
        (at.queries, at.tile_q, at.keys, at.tile_k) if over == "k" else (at.keys, at.tile_k, at.queries, at.tile_q)
    )
    first = np.arange(0, length, tile)
    past = np.minimum(first + tile, length)
    q0, q1, k0, k1 = (first + start, past + start, 0, 0) if over == "k" else (0, 0, first, past)
    flat = found.arrays(q0, q1, k0, k1, at.keys, at.queries, start, looped, at.row, at.head, tables)
    many, number = len(first), -(-other // looped)
    if not flat:
        return np.zeros((2, many, number), dtype=int)
    columns = np.empty((len(flat), many), dtype=np.int64)
    for row, x in zip(columns, flat, strict=True):
        row[:] = x
    columns = columns.reshape(-1, 5, many)
    begin, count, step, width, skip = (columns[:, i, :, None] for i in range(5))
    assert (count >= 0).all(), "a segment of fewer than no tiles"
    j = np.arange(int(count.max())) + skip
    tiles = begin + j // width * step + j % width
    inside = j - skip < count
    assert ((tiles >= 0) & (tiles < number))[inside].all(), "a tile outside"
    kind = (np.arange(len(columns)) >= len(found.full))[:, None, None]
    places = (kind * many + np.arange(many)[:, None]) * number + tiles
    return np.bincount(places[inside], minlength=2 * many * number).reshape(2, many, number)


@dataclass(frozen=True)
class Verdict:
    """Tiles: needed but not visited, visited twice, full but partial (all three wrong); visited for nothing, masked
    though full (both only slow); and those with an allowed pair."""

    missed: int
    twice: int
    unmasked: int
    useless: int
    overmasked: int
    needed: int

    @property
    def sound(self) -> bool:
        """Nothing wrong."""
        return self.missed == self.twice == self.unmasked == 0

    @property
    def tight(self) -> bool:
        """Nothing slow either."""
        return self.sound and self.useless == self.overmasked == 0


def judge(mask: Mask, found: Schedule, over: Over, at: Setting, table: Bool | None = None) -> Verdict:
    """A schedule against the mask's own table."""
    table = mask.table(at.queries, at.keys, at.head, at.row) if table is None else table
    some, every = reduced(table, at.tile_q, at.tile_k, over)
    if over == "q":
        some, every = some.T, every.T
    full, masked = visits(found, over, at, mask.tables)
    both = full + masked
    return Verdict(
        int((some & (both == 0)).sum()),
        int((both > 1).sum()),
        int(((full > 0) & ~every).sum()),
        int(((both > 0) & ~some).sum()),
        int(((masked > 0) & every).sum()),
        int(some.sum()),
    )
