"""Splits into equal groups: counted, and the cheapest really the cheapest."""

from __future__ import annotations

import itertools
import random

import pytest

from passes.gqa_groups import cheapest, neighbours


@pytest.mark.parametrize(
    ("heads", "groups", "count"), [(4, 2, 3), (6, 3, 15), (6, 2, 10), (6, 1, 1), (6, 6, 1), (8, 4, 105)]
)
def test_small_numbers_are_searched_whole(heads: int, groups: int, count: int) -> None:
    splits = cheapest(heads, groups, lambda g: 0.0, 1000)
    assert len(set(splits)) == count
    assert all(sorted(i for g in s for i in g) == list(range(heads)) for s in splits)


def test_large_numbers_find_planted_groups() -> None:
    heads = list(range(16))
    random.Random(0).shuffle(heads)
    family = {h: i // 4 for i, h in enumerate(heads)}

    def cost(group: tuple[int, ...]) -> float:
        return sum(family[a] != family[b] for a, b in itertools.combinations(group, 2))

    best, *rest = cheapest(16, 4, cost, 12)
    assert sum(map(cost, best)) == 0
    assert neighbours(16, 4) in rest
    assert len(rest) == 11


def test_one_candidate_is_the_best() -> None:
    assert cheapest(4, 2, lambda g: float(g not in ((0, 3), (1, 2))), 1) == (((0, 3), (1, 2)),)


def test_the_cheapest_comes_first() -> None:
    rng = random.Random(1)
    price = {g: rng.random() for g in itertools.combinations(range(6), 2)}
    costs = [sum(price[g] for g in s) for s in cheapest(6, 3, price.__getitem__, 15)]
    assert costs == sorted(costs)
