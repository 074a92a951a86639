"""The derivative of latent attention is one, its transpose is one, and a polish never makes things worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import passes.mla_polish as polish_module
import passes.mla_scene as scene_module
from passes.mla_absorb import Absorber, Setting
from passes.mla_influence import influence
from passes.mla_polish import Absorbed, Maps, polish, whitened
from passes.mla_scene import Scene, error, scenes
from passes.mla_source import known
from rewrite.heads import Latents, Weights
from rewrite.layout import gather
from rewrite.site import Site, Softcap
from tests.attend import HandStats, heads_out, stats_of
from tests.sites import half_rope, make_site


def prepared(
    rope: bool = True, cap: bool = False, bias: bool = False, rows: int = 4
) -> tuple[Site, Weights, HandStats, Latents, list[Scene]]:
    site, tensors = make_site(heads=4, kv_heads=2, dim=4, width=16, rope=half_rope(4) if rope else None)
    site = replace(site, mods=(Softcap(2.0),)) if cap else site
    w = gather(site, {n: t * 0.3 for n, t in tensors.items()}.__getitem__)
    added = torch.randn(4, 24, 24, generator=torch.Generator().manual_seed(3)).double() if bias else None
    stats = stats_of(site, w, bias=added, rows=rows)
    seen = known(site, w, stats.moments, stats.tokens)
    absorber = Absorber(seen, torch.ones(4, dtype=torch.float64))
    latents = absorber.latents(Setting(1.0, True, 2 if rope else 0), 8)
    return site, w, stats, latents, [*scenes(stats, w)]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_module, "REAL", torch.float64)
    monkeypatch.setattr(polish_module, "REAL", torch.float64)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_push_is_the_derivative_and_pull_its_transpose(rope: bool, cap: bool, bias: bool) -> None:
    _, _, _, latents, stage = prepared(rope, cap, bias)
    white, changed = whitened(stage)
    problem, maps = Absorbed(latents.frequencies), white.enter(latents)
    generator = torch.Generator().manual_seed(5)
    step = Maps(tuple(torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in maps.parts))
    line = problem.run(changed[0], maps)
    assert torch.allclose(line.z, stage[0].heads(latents))
    pushed = problem.push(line, maps, step)
    ends = [problem.run(changed[0], maps.plus(step, h)).z for h in (1e-5, -1e-5)]
    assert torch.allclose((ends[0] - ends[1]) / 2e-5, pushed, rtol=1e-4, atol=1e-5 * float(pushed.abs().max()))
    slope = torch.randn(pushed.shape, generator=generator, dtype=torch.float64)
    assert problem.pull(line, maps, slope).dot(step) == pytest.approx(float((pushed * slope).sum()), rel=1e-9)


@pytest.mark.parametrize("cap", [False, True])
def test_polish_lowers_the_error_on_tokens_that_did_not_fit(cap: bool) -> None:
    site, w, _, latents, stage = prepared(cap=cap, rows=24)
    unseen = [*scenes(stats_of(site, w, seed=11, rows=8), w)]
    alone, better = polish(stage, latents, w, 0), polish(stage, latents, w, 4)
    assert torch.allclose(alone.latents.down, latents.down, atol=1e-5)
    assert better.error < alone.error
    assert error(unseen, better.latents, better.weights) < 0.97 * error(unseen, latents, alone.weights)


def test_too_few_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polish_module, "ENOUGH", 1e6)
    _, w, _, latents, stage = prepared()
    made = polish(stage, latents, w, 3)
    assert made.latents is latents
    assert made.weights is w


@pytest.mark.usefixtures("double")
def test_white_maps_come_back() -> None:
    *_, latents, stage = prepared()
    white, changed = whitened(stage)
    back = white.leave(white.enter(latents), latents)
    for name in ("down", "turn", "read", "query_turn", "up_v"):
        assert torch.allclose(getattr(back, name), getattr(latents, name))
    q = torch.cat([s.q.transpose(0, 1).flatten(1, 2) for s in changed], 1)
    assert torch.allclose(q.mT @ q / q.shape[1], torch.eye(4).double().expand(4, 4, 4), atol=1e-4)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("bias", [False, True])
def test_a_scene_with_all_features_is_the_attention(bias: bool) -> None:
    site, w, stats, _, stage = prepared(rope=False, bias=bias)
    seen = known(site, w, stats.moments, stats.tokens)
    latents = Absorber(seen, torch.ones(4, dtype=torch.float64)).latents(Setting(1.0, True, 0), 16)
    theirs = heads_out(site, w, site.kv_of, stats.inputs[0], stats.bias)
    assert torch.allclose(stage[0].heads(latents), theirs, atol=1e-7)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("rope", [False, True])
def test_influence_is_what_attention_makes_of_keys_and_values(rope: bool) -> None:
    site, w, stats, _, stage = prepared(rope)
    seen = known(site, w, stats.moments, stats.tokens)
    felt = influence(stage, seen)
    value = _energy(stage, w, site)
    spread = seen.second - torch.outer(seen.mean, seen.mean)
    for head, i in enumerate(site.kv_of):
        at = seen.keys + i * site.v.dim
        whole = spread[at : at + site.v.dim, at : at + site.v.dim]
        said = felt.value_share[head] * (seen.value_cost[head] * whole).sum()
        assert float(said) == pytest.approx(value[head], rel=1e-6)
    assert felt.within.shape == spread.shape
    assert float(felt.within.diagonal().sum()) < float(spread.diagonal().sum())


@pytest.mark.usefixtures("double")
def test_what_a_score_error_costs_is_what_the_output_moves_by() -> None:
    """Keys a little longer, the query any of the head's: the first order of the softmax, query by query."""
    site, w, stats, _, stage = prepared(rope=False)
    seen = known(site, w, stats.moments, stats.tokens)
    felt = influence(stage, seen)
    q = torch.cat([s.q.transpose(0, 1).flatten(1, 2) for s in stage], 1)
    for head, i in ((0, 0), (3, 1)):
        moved: list[float] = []
        for scene in stage:
            k = scene.y[..., i * 4 : (i + 1) * 4]
            v = scene.y[..., seen.keys + i * 4 :][..., :4]
            for b, t in ((0, 3), (1, 9), (2, 20)):
                p, values = scene.p[b, head, t], v[b] - scene.p[b, head, t] @ v[b]
                change = (q[head] @ k[b].T * p) @ values @ w.out[:, head].T * site.scale[0]
                moved.append(float(change.square().sum(1).mean()))
        spread = torch.einsum(
            "de,ed->", seen.q[head], (seen.second - torch.outer(seen.mean, seen.mean))[i * 4 :, i * 4 :][:4, :4]
        )
        told = float(felt.score_cost[head] * spread)
        assert 0.5 < told / (sum(moved) / len(moved)) < 2


def _energy(stage: Sequence[Scene], w: Weights, site: Site) -> list[float]:
    """What each head adds to the variance of the output."""
    outs: list[float] = []
    for head, i in enumerate(site.kv_of):
        rows = []
        for scene in stage:
            values = scene.y[..., site.k.heads * site.k.dim + i * site.v.dim :][..., : site.v.dim]
            rows.append((scene.p[:, head] @ values @ w.out[:, head].T).flatten(0, 1))
        moved = torch.cat(rows)
        outs.append(float((moved - moved.mean(0)).square().sum(1).mean()))
    return outs
