"""The derivative of the attention is a derivative, its transpose a transpose, and a polish never makes things worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import passes.polish as polish_module
import passes.polish_scene as scene_module
from passes.gqa_build import Parts, build, order_of
from passes.gqa_keys import merge_keys
from passes.gqa_source import facts
from passes.gqa_values import merge_values
from passes.polish import Merged, polish
from passes.polish_scene import Maps, scenes, turned, whiten
from passes.refit import measure, refit, refitted_error
from rewrite.heads import Weights
from rewrite.layout import gather
from rewrite.site import Norm, Site, Softcap
from tests.attend import HandStats, heads_out, stats_of
from tests.sites import half_rope, make_site

KINDS = [
    None,
    Norm("rms", "head", 1e-6),
    Norm("rms", "row", 1e-6),
    Norm("l2", "head", 1e-6),
    Norm("layer", "head", 1e-5),
]


def prepared(
    norm: Norm | None, cap: bool = False, bias: bool = False, rows: int = 4
) -> tuple[Site, Weights, HandStats, Parts]:
    site, tensors = make_site(heads=4, kv_heads=4, dim=4, width=16, rope=half_rope(4), norm=norm)
    site = replace(site, mods=(Softcap(2.0),)) if cap else site
    w = gather(site, {n: t * 0.3 for n, t in tensors.items()}.__getitem__)
    added = torch.randn(4, 24, 24, generator=torch.Generator().manual_seed(3)).double() if bias else None
    stats = stats_of(site, w, bias=added, rows=rows)
    known = facts(site, w, stats.moments)
    groups = ((0, 2), (1, 3))
    keys, values = [merge_keys(known, g) for g in groups], [merge_values(known, g, True) for g in groups]
    return site, w, stats, build(known, w, keys, values, order_of(site, groups))


def staged(norm: Norm | None, bias: bool = False):
    _, w, stats, parts = prepared(norm, bias=bias)
    white = whiten(stats, parts, 10_000)
    return w, stats, parts, white, next(scenes(stats, parts, white, w, 10_000))


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene_module, "REAL", torch.float64)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_scene_is_the_attention_of_the_weights(norm: Norm | None, bias: bool) -> None:
    w, stats, parts, white, scene = staged(norm, bias)
    ours = Merged(parts.gains).run(scene, white.enter(parts)).z
    order = list(parts.order.query)
    added = None if stats.bias is None else stats.bias[order]
    theirs = heads_out(stats.site, parts.weights(w), parts.order.kv_of, stats.inputs[0], added)
    looked_at = theirs[:, :, scene.at.long()]
    assert torch.allclose(ours, looked_at, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("norm", KINDS)
def test_push_is_the_derivative_and_pull_its_transpose(norm: Norm | None) -> None:
    _, _, parts, white, scene = staged(norm)
    maps = white.enter(parts)
    generator = torch.Generator().manual_seed(5)
    step = Maps(*(torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in maps.parts))
    attention = Merged(parts.gains)
    line = attention.run(scene, maps)
    pushed = attention.push(line, maps, step)
    ends = [attention.run(scene, maps.plus(step, h)).z for h in (1e-5, -1e-5)]
    assert torch.allclose((ends[0] - ends[1]) / 2e-5, pushed, rtol=1e-4, atol=1e-5 * float(pushed.abs().max()))
    slope = torch.randn(pushed.shape, generator=generator, dtype=torch.float64)
    assert attention.pull(line, maps, slope).dot(step) == pytest.approx(float((pushed * slope).sum()), rel=1e-9)


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("cap", [False, True])
def test_polish_lowers_the_error_on_tokens_that_did_not_fit(norm: Norm | None, cap: bool) -> None:
    site, w, stats, parts = prepared(norm, cap, rows=20)
    better = polish(site, w, parts, stats, 3)
    unseen = stats_of(site, w, seed=11)
    seen = [measure(unseen, p.weights(w), p.order.kv_of).fit.error(polish_module._flat(p)) for p in (parts, better)]
    assert seen[1] < 0.99 * seen[0]


def test_too_few_tokens_change_nothing() -> None:
    site, w, stats, parts = prepared(None, rows=1)
    assert polish(site, w, parts, stats, 3) is parts


def test_white_maps_come_back() -> None:
    _, _, parts, white, _ = staged(None)
    q, k, v = white.leave(white.enter(parts), parts)
    assert torch.allclose(q, parts.q)
    assert torch.allclose(k, parts.k)
    assert torch.allclose(v, parts.v)


def test_turning_back_is_the_inverse() -> None:
    x = torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(turned(turned(x, half_rope(4)), half_rope(4), back=True), x)


def test_a_refit_is_kept_only_where_it_helps() -> None:
    site, w, stats, parts = prepared(None)
    made = parts.weights(w)
    made = replace(made, out=made.out * 0.7)
    seen = measure(stats, made, parts.order.kv_of)
    better, note = refit(made, seen)
    assert note is None
    assert better.out.shape == made.out.shape
    assert refitted_error(better, seen) < seen.held.error(torch.cat([made.out.flatten(1), made.out_bias[:, None]], 1))
    exact = measure(stats, w, site.kv_of)
    same, note = refit(w, exact)
    assert same is w
    assert note is not None
    assert note.startswith("output projection left as it was")
