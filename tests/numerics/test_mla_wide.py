"""What wide sites do for the sake of time and memory is what narrow ones do, or close to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import codegen.latent as latent_module
import passes.mla_absorb as absorb_module
import passes.mla_scene as scene_module
import passes.refit as refit_module
from passes.eigen import eigh, eigvalsh, rooted
from passes.mla import MLA
from passes.mla_absorb import Absorber, Setting
from passes.mla_rebuilt import Way, search_way
from passes.mla_scene import error, refit_every, refit_scenes, scenes, stage_of
from passes.mla_source import known
from passes.refit import Measured, Sums, measured, refit, solved
from passes.seen import sdpa_probabilities
from rewrite.heads import Weights
from rewrite.layout import gather
from rewrite.site import Site
from tests.attend import HandStats, stats_of
from tests.sites import half_rope, make_site


def prepared() -> tuple[Site, Weights, HandStats]:
    site, tensors = make_site(heads=4, kv_heads=2, dim=4, width=16, rope=half_rope(4))
    w = gather(site, {n: t * 0.3 for n, t in tensors.items()}.__getitem__)
    return site, w, stats_of(site, w)


@pytest.mark.parametrize("setting", [Setting(1.0, True, 2), Setting(3.0, True, 4), Setting(0.3, False, 0)])
def test_a_subspace_that_leaves_nothing_out_changes_nothing(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    site, w, stats = prepared()
    seen = known(site, w, stats.moments, stats.tokens)
    values, vectors = torch.linalg.eigh(seen.spread)
    seen = replace(seen, mix=(vectors[:, 4:] * values[4:]) @ vectors[:, 4:].T)
    share = torch.ones(4, dtype=torch.float64)
    plain = Absorber(seen, share)
    monkeypatch.setattr(absorb_module, "WIDE", 8)
    few = Absorber(seen, share, numbers=6)
    stage = [*scenes(stats, w)]
    assert few._root(setting.mean_phase, 6) is not None
    assert plain._root(setting.mean_phase, 6) is None
    a, b = (error(stage, m.latents(setting, 6), w) for m in (plain, few))
    assert b == pytest.approx(a, rel=1e-5)
    assert few.loss(setting, 6) == pytest.approx(plain.loss(setting, 6), rel=1e-8)
    assert few._root(setting.mean_phase, 16) is None


def random_sums(seed: int, outputs: int, inputs: int, truth: torch.Tensor) -> Sums:
    make = torch.Generator().manual_seed(seed)
    z = torch.randn(400, inputs, generator=make, dtype=torch.float64)
    y = z @ truth.T + 0.5 * torch.randn(400, outputs, generator=make, dtype=torch.float64)
    return Sums(z.T @ z, y.T @ z, float(y.square().sum()), 400)


def test_a_refit_is_the_best_ridge_solved_on_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.randn(40, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = replace(prepared()[1], out=out, out_bias=None)
    there = out.flatten(1)
    seen = Measured(*(random_sums(s, 40, 12, there * 1.2) for s in (2, 3)))
    errors = {r: seen.held.error(solved(there, seen.fit, r)) for r in refit_module.RIDGES}
    best = min(errors, key=lambda r: errors[r])
    want = solved(there, seen.fit + seen.held, best)
    made, note = refit(w, seen)
    assert note is None
    assert torch.allclose(made.out.flatten(1), want, rtol=1e-9)
    monkeypatch.setattr(refit_module, "WIDE", 8)
    sketched, note = refit(w, seen)
    assert note is None
    assert seen.held.error(sketched.out.flatten(1)) < 1.01 * seen.held.error(want)


def test_a_wide_refit_looks_at_fewer_queries_but_enough_for_its_unknowns(monkeypatch: pytest.MonkeyPatch) -> None:
    site, _, _ = prepared()
    assert refit_every(site, 32768) == 1
    monkeypatch.setattr(scene_module, "MOMENTS", 256 * 100)
    assert refit_every(site, 1000) == 10
    monkeypatch.setattr(scene_module, "MOMENTS", 0)
    assert refit_every(site, 960) == 960 // (scene_module.ROWS * 16)


def test_a_scene_holds_no_more_scores_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    _, w, stats = prepared()
    whole = [*scenes(stats, w)]
    monkeypatch.setattr(scene_module, "SCORES", 4 * 24 * 24)
    windows = [*scenes(stats, w)]
    assert (len(whole), len(windows)) == (2, 8)
    assert torch.equal(torch.cat([s.p for s in windows]), torch.cat([s.p for s in whole]))
    assert torch.equal(torch.cat([s.judges for s in windows]), torch.cat([s.judges for s in whole]))
    monkeypatch.setattr(scene_module, "SCORES", 4 * 24 * 12)
    assert all(s.p.numel() <= 4 * 24 * 12 for s in scenes(stats, w))


def test_a_polish_that_would_take_too_long_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    site, w, stats = prepared()
    assert MLA(cache=0.5).rewrite(site, w, stats).notes == ()
    monkeypatch.setattr("passes.mla.WORK", 1.0)
    (note,) = MLA(cache=0.5).rewrite(site, w, stats).notes
    assert "no polish: 5 steps take" in note
    assert "the most is 1" in note


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_of_some_is_that_of_all_cut(mask: str | None) -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 4, generator=make) for _ in range(3))
    seen = torch.rand(3, 1, 5, 5, generator=make) > 0.4
    given = {None: None, "bool": seen, "float": seen.double()}[mask]
    p = sdpa_probabilities(q, k, v, given, is_causal=mask is None)
    at = torch.tensor([1, 4])
    some = sdpa_probabilities(q, k, v, given, is_causal=mask is None, windows=slice(1, 3), queries=at)
    assert torch.allclose(some, p[1:3][:, :, at], atol=1e-15)
    scores = q.double() @ k.double().mT / 2
    hidden = ~seen if mask == "bool" else torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores = scores + given if mask == "float" else scores.masked_fill(hidden, -torch.inf)
    assert torch.allclose(p, torch.nan_to_num(scores.softmax(-1)), atol=1e-14)


def test_latents_expanded_head_by_head_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    site, w, stats = prepared()
    latents = MLA(rank=10, rope_dim=2, polish=0).rewrite(site, w, None).latents
    assert latents is not None
    (scene, *_) = scenes(stats, w)
    q, y, at = scene.q.double(), scene.y.double(), scene.keys_at
    monkeypatch.setattr(latent_module, "EXPANDED", 0)
    assert latent_module._expands(q.shape[1] * len(at) ** 2, latents.rank, len(at), site.k.dim)
    expanded = latent_module.attention(latents, site, q, y, added=scene.added)
    monkeypatch.setattr(latent_module, "EXPANDED", 1 << 60)
    assert torch.allclose(expanded, latent_module.attention(latents, site, q, y, added=scene.added), atol=1e-13)


def test_rows_held_back_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.Generator().manual_seed(0)
    trials = [
        (torch.randn(n, 4, 4, generator=make).double(), torch.randn(n, 6, generator=make).double()) for n in (12, 20, 8)
    ]
    want = measured(trials, biased=True)
    monkeypatch.setattr(refit_module, "WIDE", 8)
    monkeypatch.setattr(refit_module, "HELD_ROWS", 20)
    for a, b in zip((want.fit, want.held), (lambda m: (m.fit, m.held))(measured(trials, biased=True)), strict=True):
        assert (a.count, a.yy) == (b.count, pytest.approx(b.yy, rel=1e-6))
        assert torch.allclose(a.zz, b.zz, atol=1e-4)
        assert torch.allclose(a.yz, b.yz, atol=1e-4)
    with pytest.raises(ValueError, match="no batch"):
        measured([], biased=True)


def test_trials_of_a_wide_site_look_at_fewer_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    _, w, stats = prepared()
    (whole, *_), h = stage_of(stats, w), 4
    t, s = whole.p.shape[2:]
    monkeypatch.setattr(scene_module, "TRIAL_SCORES", h * t * s // 3)
    (few, *_) = stage_of(stats, w)
    seen = few.p.shape[-1]
    assert torch.equal(few.p, whole.p[:, :, ::3, :seen])
    assert not whole.p[:, :, ::3, seen:].any()
    assert torch.equal(few.out, whole.out[:, ::3])


def test_a_wide_refit_reads_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    site, w, stats = prepared()
    count = sum(int(s.keep.sum()) for s in refit_scenes(stats, w, site))
    assert count == stats.tokens
    monkeypatch.setattr(scene_module, "MOMENTS", 0)
    monkeypatch.setattr(scene_module, "ROWS", 1)
    few = [*refit_scenes(stats, w, site)]
    assert sum(int(s.keep.sum()) for s in few) >= 16
    assert sum(s.p.shape[0] * s.y.shape[1] for s in few) < stats.tokens


def test_the_first_queries_of_a_window_need_only_the_first_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    site, w, stats = prepared()
    whole = [*scene_module.scenes(stats, w)]
    monkeypatch.setattr(scene_module, "SCORES", whole[0].p[0].numel() // 2)
    parts = [*scene_module.scenes(stats, w)]
    assert len({s.y.shape[1] for s in parts}) > 1
    made = Absorber(known(site, w, stats.moments, stats.tokens), torch.ones(site.heads).double()).latents(
        Setting(1.0, True, 2), 8
    )
    assert error(parts, made, w) == pytest.approx(error(whole, made, w), rel=1e-6)


def test_rebuilt_wide_sites_try_few_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    site, _, _ = prepared()
    seen: list[Way] = []

    def error(way: Way) -> float:
        seen.append(way)
        return abs(way.factor - 3.0) + (way.moments == "mixed")

    assert search_way(error, site).factor != 3.0
    monkeypatch.setattr("passes.mla_search.WIDE", 8)
    seen.clear()
    assert search_way(error, site) == Way(3.0, moments="plain")
    assert len(seen) == 4


def test_eigenvectors_leave_the_number_of_threads_as_it_was() -> None:
    gram = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = gram @ gram.T
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        values, vectors = eigh(gram)
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError):
            eigh(gram[:3])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(vectors * values @ vectors.T, gram, atol=1e-10)
    assert torch.allclose(values, eigvalsh(gram), atol=1e-10)
    root, back = rooted(gram[None])
    assert torch.allclose(root[0] @ root[0], gram, atol=1e-8)
    assert torch.allclose(root[0] @ back[0], torch.eye(30, dtype=torch.float64), atol=1e-6)


def test_a_refit_of_long_windows_sees_its_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    site, w, stats = prepared()
    whole = [*refit_scenes(stats, w, site)]
    monkeypatch.setattr(scene_module, "SCORES", 4 * 24 * 12)
    parts = [*refit_scenes(stats, w, site)]
    assert all(s.p.numel() <= 4 * 24 * 12 for s in parts)
    assert sum(int(s.keep.sum()) for s in parts) == stats.tokens
    energy = [sum(float(s.out.square().sum()) for s in some) for some in (parts, whole)]
    assert energy[0] == pytest.approx(energy[1], rel=1e-5)


def test_single_precision_attention_of_long_windows_is_that_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 4, generator=make) for _ in range(3))
    exact = sdpa_probabilities(q, k, v, is_causal=True)
    monkeypatch.setattr("passes.seen.SINGLE", 1)
    single = sdpa_probabilities(q, k, v, is_causal=True)
    assert single.dtype == torch.float64
    assert 0 < float((single - exact).abs().max()) < 1e-6
