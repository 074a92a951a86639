"""What a step of tuning looks at: every window that fits once before any twice, in lots of bounded size."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes import tune_lots
from passes.tune_lots import TOKENS, joined, lots_of
from passes.tune_scene import RowScene
from rewrite.site import Site

HEADS = 2


def scene(first: int, windows: int, tokens: int, judging: int = 0) -> RowScene:
    """Windows numbered from `first` on, with one table of positions; the first `judging` judge."""

    def numbered(*shape: int) -> Tensor:
        return torch.arange(first, first + windows).float().view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()

    judges = torch.zeros(windows, tokens, dtype=torch.bool)
    judges[:judging] = True
    table = torch.ones(tokens, tokens).tril().expand(windows, HEADS, tokens, tokens)
    rows = numbered(HEADS, tokens, 4)
    return RowScene(
        cast(Site, None),
        q=rows,
        y=numbered(tokens, 8),
        raw=numbered(tokens, 8),
        added=table,
        sink=None,
        p=table,
        out=numbered(tokens, 3),
        at=torch.arange(tokens),
        keep=torch.ones_like(judges),
        judges=judges,
        rows=(rows, rows + 0.25, rows + 0.5),
    )


def number(scene: RowScene, place: int) -> int:
    """What the window was numbered."""
    return int(scene.y[place, 0, 0])


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([3, 5, 70]), st.integers(0, 9)), max_size=5))
def test_every_window_that_fits_is_looked_at_before_any_twice(shapes: list[tuple[int, int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_lots, "TOKENS", 15)
        stage = [scene(100 * i, n, t, min(n, judging)) for i, (n, t, judging) in enumerate(shapes)]
        fit = {100 * i + w for i, (n, _, judging) in enumerate(shapes) for w in range(min(n, judging), n)}
        lots = lots_of(stage, 40, seed=0)
    assert len(lots) == (40 if fit else 0)
    seen = Counter[int]()
    for lot in lots:
        assert len({len(s.at) for s, _ in lot}) == 1
        assert len(lot) == 1 or len(lot) * len(lot[0][0].at) <= 15
        seen.update(number(s, i) for s, i in lot)
    assert set(seen) <= fit
    if seen and len(fit) <= 40:
        # a round has no more lots than windows, so that one round at least is whole
        assert set(seen) == fit
        assert max(seen.values()) - min(seen.values()) <= 1


def test_neighbours_are_taken_apart_and_a_seed_says_how() -> None:
    stage = [scene(100 * i, 64, TOKENS // 64) for i in range(4)]
    lots = lots_of(stage, 4, seed=0)
    for lot in lots:
        assert len(lot) == 64
        assert len({number(s, i) // 100 for s, i in lot}) == 4
    again, other = (lots_of(stage, 4, seed) for seed in (0, 1))
    assert again == lots
    assert other != lots


@pytest.mark.parametrize("scores", [1, 100, 1 << 20])
def test_a_step_is_joined_in_order_in_pieces_of_bounded_scores(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_lots, "SCORES", scores)
    stage = [scene(0, 3, 5), scene(10, 4, 5, judging=1)]
    lot = [(stage[1], 2), (stage[0], 0), (stage[1], 0), (stage[0], 2), (stage[1], 3)]
    parts = [*joined(lot)]
    each = HEADS * 5 * 5
    assert all(len(p.q) == 1 or len(p.q) * each <= scores for p in parts)
    assert len(parts) == {1: 5, 100: 3, 1 << 20: 1}[scores]
    found: dict[str, Any] = {n: torch.cat([getattr(p, n) for p in parts]) for n in ("q", "y", "out", "judges")}
    assert found["y"][:, 0, 0].tolist() == [12, 0, 10, 2, 13]
    assert found["out"][:, 4, 2].tolist() == [12, 0, 10, 2, 13]
    assert torch.cat([p.rows[1] for p in parts])[:, 1, 4, 3].tolist() == [12.25, 0.25, 10.25, 2.25, 13.25]
    assert found["judges"].any(1).tolist() == [False, False, True, False, False]
    assert all(p.added.stride(0) == 0 and p.added.shape == (len(p.q), HEADS, 5, 5) for p in parts)
