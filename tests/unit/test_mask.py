"""Masks: tables against brute force, algebra, recognition, origin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.mask import Mask, all_, around, causal, chunk, listed, recognise, sink, window

LIBRARY = {
    "all": (all_, lambda q, k: True),
    "causal": (causal, lambda q, k: k <= q),
    "window": (causal & window(3), lambda q, k: k <= q and q - k < 3),
    "around": (around(2), lambda q, k: abs(q - k) < 2),
    "chunk": (causal & chunk(4), lambda q, k: k <= q and q // 4 == k // 4),
    "sink": (causal & (window(2) | sink(1)), lambda q, k: k <= q and (q - k < 2 or k < 1)),
    "not": (~causal, lambda q, k: k > q),
}


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9), (1, 5)])
def test_table_is_the_predicate_aligned_at_the_end(name: str, queries: int, keys: int) -> None:
    mask, rule = LIBRARY[name]
    expected = [[rule(i + keys - queries, j) for j in range(keys)] for i in range(queries)]
    assert mask.table(queries, keys).tolist() == expected


@pytest.mark.parametrize("name", [n for n in LIBRARY if n != "not"])
def test_recognise_gives_an_equal_mask(name: str) -> None:
    table = LIBRARY[name][0].table(10, 10)
    found = recognise(table)
    assert found is not None
    assert np.array_equal(found.table(10, 10), table)


def test_names_of_compositions() -> None:
    assert str(causal & (window(256) | sink(64))) == "causal & (window(256) | sink(64))"
    assert str(~(causal & window(2))) == "~(causal & window(2))"


def test_recognised_widths_are_exact() -> None:
    assert str(recognise((causal & window(4)).table(10, 10))) == "causal & window(4)"
    assert str(recognise(around(3).table(10, 10))) == "around(3)"
    assert str(recognise((causal & chunk(4)).table(10, 10))) == "causal & chunk(4)"


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**36 - 1))
def test_a_listed_table_says_itself(queries: int, keys: int, bits: int) -> None:
    table = np.array([(bits >> i) & 1 == 1 for i in range(queries * keys)]).reshape(queries, keys)
    assert np.array_equal(listed(table).table(queries, keys), table)


def test_an_odd_table_is_not_recognised() -> None:
    table = causal.table(6, 6)
    table[4, 1] = False
    assert recognise(table) is None


def test_input_wins_over_constant() -> None:
    hint = causal.with_origin("input")
    assert (hint & window(3)).origin == "input"
    assert (window(3) | hint).origin == "input"
    assert (~hint).origin == "input"


def test_masks_are_values() -> None:
    assert causal & window(3) == Mask("causal & window(3)", (causal & window(3)).keep)
    assert hash(window(3)) == hash(window(3))
    assert window(3) != window(4)
