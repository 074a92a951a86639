"""Loops of named masks against their tables at all small lengths, and of random masks; both texts say the same."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from codegen.predicate import predicate
from codegen.schedule import Over, schedule
from rewrite.mask import (
    Mask,
    all_,
    around,
    at,
    blocks,
    causal,
    causal_top_left,
    chunk,
    dilated,
    documents,
    longformer,
    mask,
    neighbourhood,
    prefix,
    sharded,
    sink,
    streaming,
    strided,
    window,
)
from rewrite.mask.spell import nearest
from tests.masks import random_mask
from tests.tiles import Setting, judge, visits
from tests.truncating import raw, space

OVER: tuple[Over, ...] = get_args(Over)
LIBRARY: dict[str, Mask] = {
    "all": all_,
    "causal": causal,
    "top left": causal_top_left,
    "window": causal & window(3),
    "window of one": causal & window(1),
    "window ahead": window(5),
    "around": around(4),
    "sink and window": causal & (window(5) | sink(3)),
    "short window": causal & (window(2) | sink(7)),
    "prefix": causal | prefix(5),
    "chunk": chunk(4),
    "causal chunk": causal & chunk(6),
    "chunks back": mask(lambda b, h, q, k: (q // 4 - k // 4 < 2) & (k <= q)),
    "ahead": ~causal,
    "beyond the window": causal & ~window(4),
    "documents": documents([5, 0, 1, 7, 2]),
    "causal documents": causal & documents([5, 1, 7]),
    "documents and window": causal & documents([5, 1, 7]) & window(3),
    "streaming": streaming([2, 0, 3], [3, None, 0]),
    "longformer": longformer(3, 3),
    "strided": strided(4),
    "causal strided": causal & strided(3),
    "dilated": causal & dilated(3, 2),
    "sharded": causal & sharded(4, 2, 3),
    "neighbourhood": neighbourhood((2, 2), (3, 4)),
    "wide neighbourhood": neighbourhood((2, 3), (4, 8)),
    "frames": neighbourhood((2, 2, 2), (3, 3, 4), first=1),
}
TILES = ((1, 1), (4, 4), (8, 4), (4, 8), (3, 5), (16, 2), (2, 6))
EXACT = (*list(LIBRARY)[:7], *list(LIBRARY)[8:19])
"""Nothing is visited in vain and nothing whole is masked, whatever the tile and both lengths."""


def lengths(most: int) -> list[tuple[int, int]]:
    """All queries <= keys, and some with fewer keys."""
    return [(t, n) for n in range(1, most + 1) for t in [*range(1, n + 1), n + 1, n + 5]]


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", LIBRARY)
def test_named_masks_at_all_small_lengths(name: str, over: Over) -> None:
    found, exact = LIBRARY[name], name in EXACT or (name == "sink and window" and over == "k")
    loops = schedule(found, over)
    visited = 0
    for queries, keys in lengths(13):
        for head in range(3 if found.per_head else 1):
            table = found.table(queries, keys, head)
            for tiles in TILES:
                setting = Setting(queries, keys, *tiles, head)
                verdict = judge(found, loops, over, setting, table)
                assert verdict.tight if exact else verdict.sound, (setting, verdict)
                visited += verdict.needed
    assert visited > 0


ALIGNED: dict[str, tuple[Mask, tuple[int, int]]] = {
    "strided": (causal & strided(24), (4, 4)),
    "strided far": (strided(16), (2, 8)),
    "sharded": (causal & sharded(4, 2, 3), (4, 4)),
    "sharded by half blocks": (causal & sharded(8, 1, 4), (8, 4)),
    "rows of a grid": (neighbourhood((2, 3), (6, 8)), (8, 8)),
    "half rows of a grid": (neighbourhood((2, 3), (4, 12)), (4, 4)),
    "sink and window": (causal & (window(9) | sink(4)), (4, 4)),
    "longformer": (longformer(8, 7), (4, 4)),
}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", ALIGNED)
def test_masks_of_blocks_are_exact_on_their_blocks(name: str, over: Over) -> None:
    """Tiles that divide the mask's own sizes, from a multiple of them on."""
    found, tiles = ALIGNED[name]
    for queries, keys in ((48, 48), (24, 48), (96, 96)):
        for head in range(4 if found.per_head else 1):
            verdict = judge(found, schedule(found, over), over, Setting(queries, keys, *tiles, head))
            assert verdict.tight, (queries, keys, head, verdict)


def test_a_stride_of_tiles_skips_what_lies_between() -> None:
    found = schedule(causal & sharded(64, 4, 8), "k").evaluate(64, q0=4096, q1=4224, N=16384, h=3)
    assert found.full == (range(62, 64), range(5, 61, 8))
    assert found.masked == (range(61, 62), range(64, 66))


def test_the_worked_example() -> None:
    found = schedule(causal & (window(1024) | sink(64)), "k").evaluate(64, q0=4096, q1=4224, N=16384)
    assert found.full == (range(0, 1), range(50, 64))
    assert found.masked == (range(48, 50), range(64, 66))


SEEDS = (11, 12, 13, 14)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_masks(seed: int) -> None:
    """5,200 cases a seed: never a pair skipped, no tile twice, none unmasked that has a forbidden pair."""
    rng = np.random.default_rng(seed)
    cases = needed = useless = 0
    while cases < 5200:
        found = random_mask(rng)
        for _ in range(4):
            keys = int(rng.integers(1, 41))
            queries = keys if rng.random() < 0.4 else int(rng.integers(1, 41))
            head, row = int(rng.integers(3)), int(rng.integers(2))
            table = found.table(queries, keys, head, row)
            for over in OVER:
                for _ in range(2):
                    powers = rng.random() < 0.7
                    tiles = 2 ** rng.integers(0, 6, 2) if powers else rng.integers(1, 20, 2)
                    setting = Setting(queries, keys, int(tiles[0]), int(tiles[1]), head, row)
                    verdict = judge(found, schedule(found, over), over, setting, table)
                    assert verdict.sound, (seed, found.text, over, setting, verdict)
                    cases, needed, useless = cases + 1, needed + verdict.needed, useless + verdict.useless
    print(f"seed {seed}: {cases} cases, {needed} tiles needed, {useless} visited in vain")
    assert needed > 20_000
    assert useless < needed / 4


def numbers(over: Over, at_: Setting, tile: int) -> dict[str, int]:
    """What the kernel of one tile knows."""
    start = at_.keys - at_.queries
    known = {"N": at_.keys, "T": at_.queries, "offset": start, "b": at_.row, "h": at_.head}
    if over == "k":
        first, past = tile * at_.tile_q, min((tile + 1) * at_.tile_q, at_.queries)
        return known | {"q0": first + start, "q1": past + start, "tile": at_.tile_k}
    first, past = tile * at_.tile_k, min((tile + 1) * at_.tile_k, at_.keys)
    return known | {"k0": first, "k1": past, "tile": at_.tile_q}


def triton(found: Mask, over: Over, known: dict[str, int]) -> list[int]:
    """The Triton text's numbers, by arithmetic that truncates."""
    lines, segments = schedule(found, over).program("triton")
    names = space(found.tables, **known)
    exec("\n".join(lines), names)
    return [int(raw(eval(text, names))) for s in segments for text in s]


def python(found: Mask, over: Over, known: dict[str, int]) -> list[int]:
    plain = {name: known.get(name, 0) for name in ("q0", "q1", "k0", "k1", "N", "T", "offset", "tile", "b", "h")}
    return [int(x) for x in schedule(found, over).scalar(**plain, tables=found.tables)]


@pytest.mark.parametrize("over", OVER)
def test_both_texts_of_random_loops_agree(over: Over) -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        found = random_mask(rng)
        for _ in range(4):
            setting = Setting(
                *(int(x) for x in rng.integers(1, 60, 2)), *(int(x) for x in 2 ** rng.integers(0, 6, 2)), 1, 1
            )
            known = numbers(over, setting, 0)
            assert triton(found, over, known) == python(found, over, known), (found.text, known)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", LIBRARY)
def test_a_billion_positions_fit_32_bits(name: str, over: Over) -> None:
    for queries, keys in ((2**29, 2**29), (128, 2**29)):
        setting = Setting(queries, keys, 128, 64, 1)
        for tile in (0, (queries if over == "k" else keys) // 128 - 1):
            known = numbers(over, setting, tile)
            assert triton(LIBRARY[name], over, known) == python(LIBRARY[name], over, known)


def test_predicates_of_both_dialects_are_the_mask() -> None:
    rng = np.random.default_rng(6)
    for _ in range(150):
        found = random_mask(rng)
        offset, head, row = (int(x) for x in (rng.integers(-20, 9), rng.integers(3), rng.integers(2)))
        q, k = np.arange(12)[:, None] + offset, np.arange(15)[None]
        expected = found.holds(q, k, head, row, offset)
        names = space(found.tables, q=q, k=k, h=head, b=row, offset=offset)
        value = raw(eval(predicate(found, "triton"), names))
        assert np.array_equal(np.broadcast_to(value != 0, expected.shape), expected), found.text
        names = dict(found.tables, q=q, k=k, h=head, b=row, offset=offset, load=nearest)
        assert np.array_equal(np.broadcast_to(eval(predicate(found, "python"), names), expected.shape), expected)


def test_constant_predicates_broadcast() -> None:
    for found in (all_, ~all_):
        for dialect in ("python", "triton"):
            assert "q" in predicate(found, dialect)
            assert "k" in predicate(found, dialect)


def test_numbers_and_arrays_are_one_program() -> None:
    found = LIBRARY["sharded"]
    setting = Setting(40, 40, 8, 4, 2)
    full, masked = visits(schedule(found, "k"), "k", setting, found.tables)
    for tile in range(5):
        known = numbers("k", setting, tile)
        tiles = schedule(found, "k").evaluate(known.pop("tile"), **known)
        for ranges, row in ((tiles.full, full[tile]), (tiles.masked, masked[tile])):
            assert sorted(t for r in ranges for t in r) == np.flatnonzero(row).tolist()


def test_equal_masks_have_equal_loops_whatever_their_tables() -> None:
    assert schedule(streaming([1, 2], [3, 4]), "k") is schedule(streaming([5], [6]), "k")
    assert schedule(causal & window(5), "k").program("triton") == schedule(window(5) & causal, "k").program("triton")


def test_tiles_from_data_are_said_to_be_listed() -> None:
    found = schedule(causal & blocks(np.ones((2, 2)), 4), "k")
    assert found.listed
    assert not found.full
    with pytest.raises(ValueError, match="lists"):
        found.evaluate(4, q0=0, q1=4, N=8)


def test_too_many_conjunctions_are_one_masked_run() -> None:
    rows = [mask(lambda b, h, q, k, i=i: (q == i) & (k == 3 * i % 7)) for i in range(12)]
    found = rows[0]
    for row in rows[1:]:
        found = found | row
    loops = schedule(found, "k")
    assert not loops.full
    assert len(loops.masked) == 1
    assert judge(found, loops, "k", Setting(12, 12, 4, 2)).sound


def test_a_table_by_position_is_listed_and_one_by_head_is_not() -> None:
    far = {"far": np.arange(8)}
    assert schedule(mask(lambda b, h, q, k: k < at("far", q), tables=far), "k").listed
    assert not schedule(mask(lambda b, h, q, k: k < at("far", h), tables=far), "k").listed
