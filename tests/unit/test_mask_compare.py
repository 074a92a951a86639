"""Density, implication, equality and pictures of masks."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import rewrite.mask
from rewrite.mask import (
    Mask,
    all_,
    around,
    blocks,
    blocks_diagonal,
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
from tests.masks import random_mask

COUNTED = [
    causal,
    causal_top_left,
    causal & (window(5) | sink(3)),
    causal & dilated(3, 4),
    causal & sharded(4, 2, 3),
    streaming([1, 0, 4], [3, None, 0]),
    documents([[3, 9, 20], [31, 1]]),
    longformer(2, 3),
    neighbourhood((2, 2), (4, 5)),
    neighbourhood((2, 1, 2), (2, 3, 4)),
    causal & blocks(np.random.default_rng(1).random((2, 9, 9)) < 0.5, 5),
    ~(causal & strided(3)),
]


@pytest.mark.parametrize("found", COUNTED, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (7, 33), (20, 11)])
def test_density_is_the_mean_of_the_tables(found: Mask, queries: int, keys: int) -> None:
    heads, rows = (3 if found.per_head else 1), (2 if found.per_row else 1)
    tables = [found.table(queries, keys, i, j) for i in range(heads) for j in range(rows)]
    expected = Fraction(int(np.sum(tables)), queries * keys * heads * rows)
    assert found.density(queries, keys, heads, rows) == expected


def test_density_of_random_masks() -> None:
    rng = np.random.default_rng(4)
    for _ in range(80):
        found = random_mask(rng)
        queries, keys = (int(x) for x in rng.integers(1, 40, 2))
        tables = [found.table(queries, keys, i, j) for i in range(2) for j in range(2)]
        assert found.density(queries, keys, 2, 2) == Fraction(int(np.sum(tables)), 4 * queries * keys), found.text


def test_density_of_a_million_tokens_is_a_formula() -> None:
    n, w, s = 2**20, 1024, 64
    pairs = n * w - w * (w - 1) // 2 + sum(min(s, max(0, q - w + 1)) for q in range(w + s)) + (n - w - s) * s
    assert (causal & (window(w) | sink(s))).density(n, n) == Fraction(pairs, n * n)


def test_density_knows_its_heads_or_asks() -> None:
    assert streaming([0, 0], [1, None]).density(4, 4) == Fraction(4 + 10, 32)
    with pytest.raises(ValueError, match="how many heads"):
        sharded(4, 1, 2).density(8, 8)


IMPLIED = [
    (causal & window(4), causal),
    (causal & window(4), window(9)),
    (window(4) & around(9), around(9)),
    (sink(3), prefix(5)),
    (chunk(4), chunk(8)),
    (chunk(4), around(4)),
    (dilated(3, 4), strided(4)),
    (strided(8), strided(4)),
    (documents([3, 4]) & causal, documents([3, 4])),
    (causal_top_left, causal),
    (causal & window(5), ~(~causal | ~window(9))),
    (streaming([2, 1], [4, 3]), causal & window(4) | causal & sink(2)),
]


@pytest.mark.parametrize(("narrow", "wide"), IMPLIED, ids=lambda m: str(m))
def test_implied_one_way_only(narrow: Mask, wide: Mask) -> None:
    assert narrow.implies(wide) is True
    assert wide.implies(narrow) is not True
    assert narrow.equals(wide) is not True


EQUAL = [
    (causal & (window(3) | sink(2)), causal & window(3) | sink(2) & causal),
    (chunk(6), blocks_diagonal(6)),
    (~(causal & window(3)), ~causal | ~window(3)),
    (around(5), window(5) & mask(lambda b, h, q, k: k - q < 5)),
    (strided(3), mask(lambda b, h, q, k: (k - q) % 3 == 0)),
    (mask(lambda b, h, q, k: 2 * q - 2 * k > 7), mask(lambda b, h, q, k: q - k >= 4)),
    (all_, causal | ~causal),
]


@pytest.mark.parametrize(("one", "two"), EQUAL, ids=lambda m: str(m))
def test_equal_whatever_they_are_called(one: Mask, two: Mask) -> None:
    assert one.equals(two) is True


def test_different_numbers_are_refuted_far_out() -> None:
    assert (causal & window(5000)).equals(causal & window(5001)) is False
    assert (causal & (window(1024) | sink(64))).implies(causal & (window(1024) | sink(63))) is False
    assert sharded(4, 2, 3).implies(window(8)) is False
    assert streaming([2, 2], [4, 5]).implies(causal & window(4)) is False
    assert documents([3, 4]).equals(documents([3, 5])) is False


def test_implication_of_random_masks_is_never_wrong() -> None:
    """What is said to be implied holds on tables; what is refuted is so on some."""
    rng = np.random.default_rng(9)
    decided = 0
    for _ in range(60):
        one, two = random_mask(rng), random_mask(rng)
        both = one & two
        assert both.implies(one) is not False
        said = one.implies(two)
        tables = [(one.table(24, 30, i, j), two.table(24, 30, i, j)) for i in range(3) for j in range(2)]
        decided += said is not None
        if said:
            assert all(not (a & ~b).any() for a, b in tables), (one.text, two.text)
    assert decided > 40


def test_a_picture_in_text() -> None:
    assert (causal & (window(2) | sink(1))).draw(5) == "█····\n██···\n███··\n█·██·\n█··██"
    assert causal.draw(4, 6) == "███···\n████··\n█████·\n██████"
    wide = causal.draw(96).splitlines()
    assert len(wide) == 48
    assert wide[3][:6] == "███▒··" or wide[3][:6] == "███▓··"


def test_a_picture_as_svg() -> None:
    drawn = (causal & window(2)).svg(3)
    assert "<title>causal &amp; window(2) at 3 queries, 3 keys</title>" in drawn
    assert drawn.count('height="1"') == 3
    assert '<rect x="1" y="2" width="2" height="1" fill="#246"/>' in drawn


def test_the_page_on_masks_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "masks.md").read_text(encoding="utf-8")
    blocks_of_text = re.findall(r"```(python)?\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    for kind, block in blocks_of_text:
        if kind:
            exec(block, names)
        else:
            assert capsys.readouterr().out == block
    for name in re.findall(r"`(\w+)\(", text.split("\n## ")[0]):
        assert name in (*rewrite.mask.__all__, "holds", "table", "svg"), name
