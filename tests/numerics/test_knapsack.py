"""The split of a budget against all splits there are."""

from itertools import product

import pytest
import torch

from passes.knapsack import spread


@pytest.mark.parametrize("seed", range(5))
def test_no_split_loses_less(seed: int) -> None:
    draw = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)).double()
    errors = {f"s{i}": {8 * (n + 1) + i: float(e) for n, e in enumerate(row)} for i, row in enumerate(draw)}
    total = 90
    got = spread(errors, total)
    splits = [c for c in product(*(errors[s] for s in errors)) if sum(c) <= total]
    lowest = min(sum(errors[s][n] for s, n in zip(errors, c, strict=True)) for c in splits)
    assert sum(got.values()) <= total
    assert sum(errors[s][n] for s, n in got.items()) == pytest.approx(lowest)


def test_who_gains_most_gets_most() -> None:
    errors = {"a": {8: 0.9, 24: 0.1}, "b": {8: 0.02, 24: 0.01}}
    assert spread(errors, 32) == {"a": 24, "b": 8}
    assert spread(errors, 16) == {"a": 8, "b": 8}
    assert spread({"a": {8: 0.5, 24: 0.5}}, 99) == {"a": 8}


def test_too_little_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="2 sites need at least 16 numbers, and the budget is 15"):
        spread({"a": {8: 1.0}, "b": {8: 1.0}}, 15)
