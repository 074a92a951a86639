"""Index lists against the mask's own table, with rows, heads, lengths and tables by position."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from codegen.lists import Lists, Tiling, lists
from codegen.schedule import Over, schedule
from rewrite.mask import Mask, at, blocks, causal, documents, mask, sink, streaming, strided, window
from tests.masks import random_mask
from tests.tiles import reduced

OVER: tuple[Over, ...] = get_args(Over)
RNG = np.random.default_rng(3)
CHOSEN = RNG.random((2, 3, 6, 6)) < 0.4
FAR = {"far": RNG.integers(0, 50, 48)}
MASKS: dict[str, Mask] = {
    "blocks": blocks(CHOSEN, 8),
    "causal blocks": causal & blocks(CHOSEN, 8),
    "blocks or window": causal & (blocks(CHOSEN[0], 8) | window(5)),
    "not blocks": causal & ~blocks(CHOSEN[0, 0], (8, 4)),
    "far": mask(lambda b, h, q, k: k < at("far", q), tables=FAR),
    "far key": causal & mask(lambda b, h, q, k: q // 2 < at("far", k // 2) + h, tables=FAR),
    "blocks and documents": documents([[7, 30, 11], [20, 28]]) & blocks(CHOSEN, 8),
    "streaming or blocks": causal & (streaming([1, 2, 3], [3, 9, 1]) | blocks(CHOSEN, 8)),
    "blocks and stride": blocks(CHOSEN, 8) & strided(4) | sink(2),
}


def chosen(found: Lists, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The lists as booleans (rows, heads, fixed tiles, looped tiles)."""
    out: list[np.ndarray] = []
    for counts, index in ((found.full_counts, found.full), (found.masked_counts, found.masked)):
        table = np.zeros(shape, dtype=bool)
        for place in np.ndindex(*shape[:3]):
            listed = index[place][: int(counts[place])].tolist()
            assert listed == sorted(set(listed))
            table[(*place, listed)] = True
        out.append(table)
    return out[0], out[1]


def check(found: Mask, over: Over, tiling: Tiling, tight: bool) -> None:
    rows = [(tiling.queries, tiling.keys)] * tiling.rows
    if tiling.lengths is not None:
        rows = list(zip(*(n.tolist() for n in tiling.lengths), strict=True))
    shape = (tiling.rows, tiling.heads, -(-tiling.queries // tiling.tile_q), -(-tiling.keys // tiling.tile_k))
    full, masked = chosen(lists(found, over, tiling), shape if over == "k" else (*shape[:2], shape[3], shape[2]))
    assert not (full & masked).any()
    for row, (queries, keys) in enumerate(rows):
        for head in range(tiling.heads):
            some, every = reduced(found.table(queries, keys, head, row), tiling.tile_q, tiling.tile_k, over)
            if over == "q":
                some, every = some.T, every.T
            grid = tuple(slice(n) for n in some.shape)
            mine, visited = full[row, head], (full | masked)[row, head]
            assert visited.sum() == visited[grid].sum(), "a tile beyond the row's lengths"
            assert not (some & ~visited[grid]).any(), "an allowed pair is skipped"
            assert not (mine[grid] & ~every).any(), "a partial tile is taken as full"
            if tight:
                assert np.array_equal(visited[grid], some)
                assert np.array_equal(mine[grid], every & some)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("tiles", [(8, 8), (4, 8), (16, 8), (5, 3)])
def test_lists_of_masks_from_data(name: str, over: Over, tiles: tuple[int, int]) -> None:
    tight = name in ("blocks", "causal blocks") and tiles in ((8, 8), (4, 8))
    for queries, keys in ((48, 48), (21, 45), (48, 40)):
        aligned = tight and (keys - queries) % 8 == 0
        check(MASKS[name], over, Tiling(queries, keys, *tiles, 2, 3), aligned)


@pytest.mark.parametrize("over", OVER)
def test_rows_of_their_own_lengths(over: Over) -> None:
    lengths = torch.tensor([40, 3]), torch.tensor([40, 19])
    for name in ("causal blocks", "blocks and documents", "streaming or blocks"):
        check(MASKS[name], over, Tiling(40, 44, 8, 4, 2, 3, lengths), False)


def test_lists_of_random_masks_are_sound() -> None:
    rng = np.random.default_rng(8)
    for _ in range(150):
        found = random_mask(rng)
        if rng.random() < 0.5:
            found = (found & MASKS["blocks"]) if rng.random() < 0.5 else (found | MASKS["causal blocks"])
        queries, keys = (int(x) for x in rng.integers(1, 50, 2))
        tiles = (int(x) for x in rng.integers(1, 14, 2))
        check(found, OVER[int(rng.integers(2))], Tiling(queries, keys, *tiles, 2, 3), False)


def test_heads_that_go_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more pairs of tiles than are held at once the lists are the same."""
    at = Tiling(48, 48, 8, 4, 2, 3)
    for name in ("causal blocks", "far key", "streaming or blocks"):
        whole = chosen(lists(MASKS[name], "k", at), (2, 3, 6, 12))
        with monkeypatch.context() as patch:
            patch.setattr("codegen.lists.HELD", 300)
            parts = chosen(lists(MASKS[name], "k", at), (2, 3, 6, 12))
        assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_spans_of_a_table_are_two_looks() -> None:
    """Columns and diagonals: the extremes over many entries at once, at every width of a span."""
    tables = {"column": RNG.random(70) < 0.2, "back": RNG.random(70) < 0.2}
    lines = mask(lambda b, h, q, k: (k <= q) & ((at("column", k) == 1) | (at("back", q - k) == 1)), "lines", tables)
    for tile_q, tile_k in ((1, 1), (4, 2), (7, 16), (32, 5)):
        for queries, keys in ((70, 70), (33, 64)):
            check(lines, "k", Tiling(queries, keys, tile_q, tile_k), tight=tile_q == tile_k == 1)


def test_blocks_are_listed_and_cost_one_look_each() -> None:
    table = np.random.default_rng(0).random((4, 256, 256)) < 0.1
    found = causal & blocks(table, 64)
    assert schedule(found, "k").listed
    made = lists(found, "k", Tiling(16384, 16384, 64, 64, heads=4))
    lower = np.tril(table)
    assert made.full_counts.sum() + made.masked_counts.sum() == lower.sum()
    assert made.masked_counts.sum() == np.einsum("hii->", lower.astype(int))
    assert made.full.dtype == torch.int32
