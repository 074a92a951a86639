"""Which share of all pairs a mask allows, exactly: allowed keys are counted query by query, not pair by pair."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from rewrite.mask import spell
from rewrite.mask.terms import At, b, h

if TYPE_CHECKING:
    from rewrite.mask.algebra import Mask

ROWS = 1 << 15
"""Queries counted at once."""
PAIRS = 1 << 22
"""Pairs looked at at once where counting is not enough."""
TILE = 64


def density(mask: Mask, queries: int, keys: int, heads: int | None = None, rows: int | None = None) -> Fraction:
    """Allowed pairs of all pairs, the mean over heads and rows of the batch.

    Their numbers are those of the mask's tables where not given. A schedule with tiles of one key and one query counts
    in closed form; only where it cannot decide, or tables are read at positions, are pairs looked at.
    """
    heads = _how_many(mask, h, heads, "heads")
    rows = _how_many(mask, b, rows, "rows")
    total = 0
    for row in range(rows):
        for head in range(heads):
            total += allowed(mask, queries, keys, head, row)
    return Fraction(total, max(1, rows * heads * queries * keys))


def allowed(mask: Mask, queries: int, keys: int, head: int = 0, row: int = 0) -> int:
    """How many pairs of one head and row are allowed."""
    from codegen.schedule import schedule

    loops = schedule(mask, "k")
    if loops.listed:
        return _looked_by_tile(mask, queries, keys, head, row)
    total, start = 0, keys - queries
    for first in range(0, queries, ROWS):
        q = np.arange(first, min(first + ROWS, queries), dtype=np.int64) + start
        flat = loops.arrays(q, q + 1, 0, 0, keys, queries, start, 1, row, head, mask.tables)
        counts = [np.broadcast_to(x, q.shape) for x in flat[1::5]]
        unsure = np.zeros(q.shape, dtype=bool)
        for count in counts[len(loops.full) :]:
            unsure |= count > 0
        sure = sum(int(count[~unsure].sum()) for count in counts[: len(loops.full)])
        total += sure + _looked(mask, q[unsure], keys, head, row, start)
    return total


def _looked(mask: Mask, q: Any, keys: int, head: int, row: int, start: int) -> int:
    step = max(1, PAIRS // max(1, keys))
    parts = (q[i : i + step, None] for i in range(0, len(q), step))
    return sum(
        int(spell.holds(mask.keep, mask.tables, part, np.arange(keys)[None], head, row, start).sum()) for part in parts
    )


def _looked_by_tile(mask: Mask, queries: int, keys: int, head: int, row: int) -> int:
    """Whole tiles are counted, and only the others looked at."""
    from codegen.lists import Tiling, tiles

    some, every = (x[row, head].numpy() for x in tiles(mask, Tiling(queries, keys, TILE, TILE, row + 1, head + 1)))
    start = keys - queries
    sizes = (np.minimum(TILE, n - np.arange(0, n, TILE)) for n in (queries, keys))
    total = int((np.outer(*sizes) * every).sum())
    for i, j in np.argwhere(some & ~every):
        q = np.arange(i * TILE, min((i + 1) * TILE, queries))[:, None] + start
        k = np.arange(j * TILE, min((j + 1) * TILE, keys))[None]
        total += int(mask.holds(q, k, head, row, start).sum())
    return total


def _how_many(mask: Mask, symbol: Any, given: int | None, what: str) -> int:
    if given is not None or symbol not in mask.keep.free_symbols:
        return given or 1
    entries: list[Any] = list(mask.keep.atoms(At))
    sizes = [mask.tables[str(x.args[0])].shape[i] for x in entries for i, a in enumerate(x.args[1:]) if a == symbol]
    if not sizes:
        raise ValueError(f"mask {mask} differs between {what} without a table of them: say how many {what} there are")
    return max(sizes)
