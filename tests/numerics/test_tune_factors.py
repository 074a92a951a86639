"""Local tuning of low-rank projections: less error in the same numbers, which still multiply out to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from passes.assign import suited, uncached
from passes.convert import convert_sites
from passes.mla import MLA
from passes.refit import relative
from passes.tune import Tuned, Tuning
from passes.tune_scene import RowScene
from rewrite.heads import Change
from tests.numerics.test_factor import WIDTH, Encoder, Normed, found
from tests.zoo.spellings import HalfRope


class KeysBiased(Encoder):
    """Keys alone have a constant, far from none."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.constant_(self.k.bias, 3.0)


class Plain(Encoder):
    """Projections without constants."""

    def __init__(self) -> None:
        super().__init__(bias=False)


def made(kind: type[nn.Module], rank: int, tuning: Tuning | None) -> Change:
    """The one attention of a module."""
    torch.manual_seed(1)
    program, sites, batches = found(kind())
    chosen = suited({s.name: MLA(rank=rank) for s in sites.sites}, uncached(program, sites))
    (change,) = convert_sites(program, sites, chosen, batches, lambda *_: None, tuning).values()
    return change


@pytest.mark.parametrize("rank", [8, 24])
@pytest.mark.parametrize("kind", [Encoder, Plain, Normed, HalfRope])
def test_factors_learn_in_the_numbers_they_have(
    kind: type[nn.Module], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is learnt: as many numbers, one latent where there was one, and weights that they multiply out to."""
    monkeypatch.setattr("passes.tune._judged", Mock(side_effect=(1.0, 0.0)))
    old, new = (made(kind, rank, tuning).rewritten for tuning in (None, Tuning(4)))
    assert new.site.form == old.site.form
    assert old.factors is not None
    assert new.factors is not None
    assert new.factors.ranks == old.factors.ranks
    assert new.factors.shared == old.factors.shared
    for factor, heads, before in zip(
        (new.factors.k, new.factors.v), (new.weights.k, new.weights.v), (old.weights.k, old.weights.v), strict=True
    ):
        assert not torch.allclose(heads.weight, before.weight, rtol=1e-2)
        if factor is not None:
            assert torch.allclose(factor.up @ factor.down, heads.weight.flatten(0, 1), atol=1e-10)


@pytest.mark.parametrize("kind", [Encoder, Normed, HalfRope])
def test_a_tiny_step_leaves_factors_as_they_were(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents as maps of the projections' rows give back the closed form's own, constants included."""
    monkeypatch.setattr("passes.tune.RATES", (1e-5,))
    monkeypatch.setattr("passes.tune._judged", Mock(side_effect=(1.0, 0.0)))
    before, after = (made(kind, 12, tuning).rewritten.weights for tuning in (None, Tuning(1)))
    for old, new in ((before.q, after.q), (before.k, after.k), (before.v, after.v)):
        assert torch.allclose(old.weight, new.weight, atol=1e-3 * float(old.weight.abs().max()))
        assert (old.bias is None) == (new.bias is None)
        if old.bias is not None and new.bias is not None:
            assert torch.allclose(old.bias, new.bias, atol=1e-3 * max(1.0, float(old.bias.abs().max())))
    assert not torch.equal(before.k.weight, after.k.weight)


@pytest.mark.parametrize("kind", [Encoder, KeysBiased, Plain, Normed, HalfRope])
def test_what_starts_to_learn_is_what_the_weights_compute(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one latent reads keys with a constant and values without."""
    seen: list[float] = []

    def still(tuned: Tuned, stage: Sequence[RowScene], *_: object) -> dict[str, Tensor]:
        ends = [(tuned.output(scene, tuned.start) - scene.out, scene.out) for scene in stage]
        seen.append(relative([[float(x.square().sum()) for x in pair] for pair in ends]))
        return dict(tuned.start)

    monkeypatch.setattr("passes.tune._learnt", still)
    change = made(kind, 24, Tuning(1))
    assert seen[0] == pytest.approx(change.error, rel=1e-4)
