"""Laws of latents: nothing is lost where nothing can be, more is never worse, what is written is what is measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from codegen.eager import normed as eager_norm
from codegen.latent import attention, features
from passes.mla import MLA
from passes.mla_rebuilt import through
from passes.moments import NEEDS, frequencies
from passes.trial import trial
from rewrite.heads import Heads, KeyNorm, Rewritten, Weights
from rewrite.layout import gather
from rewrite.site import Affine, Latent, Norm, Rope, Site, Softcap
from tests.attend import HandStats, normed, output, raw, stats_of
from tests.sites import half_rope, make_site

TWISTED = Rope(np.array([[0, 1], [2, 3]]), np.array([1.0, 0.1]), np.array([0.0, 0.3]))
PARTIAL = Rope(np.array([[0, 2], [1, 3]]), np.array([1.0, 0.03]), np.array([0.1, 0.0]))
ROPES = {"none": (None, 4), "half": (half_rope(4), 4), "interleaved": (TWISTED, 4), "partial": (PARTIAL, 6)}
RMS, LAYER, ROW = Norm("rms", "head", 1e-6), Norm("layer", "head", 1e-5), Norm("rms", "row", 1e-6)


def drawn(
    name: str,
    bias: bool = True,
    heads: int = 4,
    kv_heads: int = 4,
    norm: Norm | None = None,
    width: int = 24,
    module: bool = False,
):
    """`module`: the key norm is a module with a gain of its own, so that it can be left out and applied later."""
    rope, dim = ROPES[name]
    site, tensors = make_site(heads=heads, kv_heads=kv_heads, dim=dim, width=width, bias=bias, rope=rope, norm=norm)
    if module:
        row = norm is not None and norm.over == "row"
        index = np.arange(kv_heads * dim).reshape(kv_heads, dim) if row else np.tile(np.arange(dim), (kv_heads, 1))
        gain = Affine(np.zeros(()), np.ones(()), "k_norm.weight", index)
        site = replace(site, k=replace(site.k, gain=gain))
        tensors["k_norm.weight"] = (
            0.5 + torch.rand(index.max() + 1, generator=torch.Generator().manual_seed(3)).double()
        )
    shrunk = {n: t * (0.3 if n.endswith("weight") else 1.0) for n, t in tensors.items()}
    # a scale that single precision holds too
    site = replace(site, scale=(0.5,))
    return site, gather(site, shrunk.__getitem__)


def error(site: Site, source: Weights, made: Rewritten, seed: int = 7) -> float:
    """Relative error of the output on new tokens, by the written form."""
    x = stats_of(site, source, seed).inputs[0]
    y = output(site, source, site.kv_of, x)
    z = written(site, source, made, x)
    moved = torch.einsum("bhtd,ohd->bto", z, made.weights.out)
    moved = moved if made.weights.out_bias is None else moved + made.weights.out_bias
    return float((moved - y).norm() / y.norm())


def written(site: Site, source: Weights, made: Rewritten, x: Tensor) -> Tensor:
    q, k, v = (normed(o, h, x) for o, h in ((site.q, source.q), (site.k, source.k), (site.v, source.v)))
    t = x.shape[1]
    assert made.latents is not None
    k = k if made.latents.key_norm is None else raw(source.k, x).transpose(1, 2)
    causal = torch.zeros(t, t).double().masked_fill(torch.ones(t, t).triu(1) > 0, -torch.inf)
    return attention(made.latents, made.site, q, features(k, v), added=causal)


KINDS = {
    "mha": {},
    "gqa": {"kv_heads": 2},
    "narrow": {"width": 5},
    "narrow, no bias": {"width": 5, "bias": False},
    "no bias": {"bias": False},
    "rms": {"norm": RMS},
    "rms of a row": {"norm": ROW, "kv_heads": 2},
    "layer": {"norm": LAYER},
    "rms module": {"norm": RMS, "module": True},
    "narrow rms module": {"norm": RMS, "module": True, "width": 5},
    "row module": {"norm": ROW, "module": True, "kv_heads": 2},
}


@pytest.mark.parametrize("form", ["absorbed", "rebuilt"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [False, True])
def test_the_whole_cache_loses_nothing(kind: str, rope: str, form: str, cap: bool) -> None:
    site, w = drawn(rope, **KINDS[kind])
    site = replace(site, mods=(Softcap(2.0),)) if cap else site
    target = MLA(cache=1.0, form=form)
    made = target.rewrite(site, w, None)
    assert target.refuse(site) is None
    assert made.site == target.after(site)
    assert made.site.cache_per_token <= site.cache_per_token
    assert error(site, w, made) < 1e-9


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [RMS, LAYER, ROW], ids=["rms", "layer", "row"])
def test_raw_keys_are_a_function_of_the_inputs(norm: Norm, bias: bool) -> None:
    """Behind a norm keys are none; a bias is one more number, and one less than that loses."""
    site, w = drawn("half", width=5, norm=norm, module=True, bias=bias)
    whole = MLA(cache=1.0, form="rebuilt")
    assert whole.after(site).form == Latent(5 + bias, 0, True)
    assert error(site, w, whole.rewrite(site, w, None)) < 1e-9
    assert error(site, w, MLA(rank=4 + bias, form="rebuilt").rewrite(site, w, None)) > 1e-3
    assert MLA(cache=1.0).after(site).form != Latent(5 + bias, 0)


@pytest.mark.parametrize("norm", [RMS, LAYER, ROW, Norm("l2", "head", 1e-3)], ids=["rms", "layer", "row", "l2"])
def test_what_errors_of_raw_keys_cost_is_the_norms_derivative(norm: Norm) -> None:
    """By central differences of the norm itself, on every token."""
    g, d = 2, 4
    make = torch.Generator().manual_seed(0)
    x, half = torch.randn(6, g, d, generator=make).double(), torch.randn(g, d, d, generator=make).double()
    behind = KeyNorm(norm, 1 + torch.rand(g, d, generator=make).double())
    cost = half @ half.mT
    want = torch.zeros(g * d, g * d).double()
    for row in x:
        jacobian = torch.autograd.functional.jacobian(
            lambda u: (eager_norm(norm, u.reshape(1, g, 1, d))[0, :, 0] * behind.gain).flatten(), row.flatten()
        )
        want += jacobian.T @ torch.block_diag(*cost) @ jacobian / len(x)
    assert torch.allclose(torch.block_diag(*through(behind, cost, x)), want, atol=1e-9)


def test_keys_that_cannot_be_raw_are_cached_behind_their_norm() -> None:
    site, w = drawn("half", norm=RMS)
    made = MLA(cache=0.5, form="rebuilt").rewrite(site, w, None)
    assert made.latents is not None
    assert made.latents.key_norm is None
    assert any("its key norm has no parameter" in note for note in made.notes)


@pytest.mark.parametrize("norm", [RMS, ROW], ids=["rms", "row"])
def test_raw_keys_lose_less_than_normed_ones(norm: Norm) -> None:
    """Inputs of 6 directions of 24: raw keys and values are of rank 6, normed keys are not."""
    site, w = drawn("half", norm=norm, module=True, bias=False)
    thin = torch.randn(6, 24, generator=torch.Generator().manual_seed(1)).double()
    thin = thin.T @ torch.linalg.inv(thin @ thin.T) @ thin
    q, k, v = (replace(h, weight=h.weight @ thin) for h in (w.q, w.k, w.v))
    w = replace(w, q=q, k=k, v=v)
    stats = stats_of(site, w, rows=8)
    plain = replace(site, k=replace(site.k, gain=Affine(w.k.gain.numpy())))
    raws, normeds = (MLA(rank=8, form="rebuilt").rewrite(s, w, stats) for s in (site, plain))
    assert error(site, w, raws) < 1e-6 < 1e-3 < error(plain, w, normeds)


def test_where_nothing_turns_the_inputs_are_enough() -> None:
    site, w = drawn("none", width=5)
    assert MLA(cache=1.0).after(site).form == Latent(5, 0)
    assert error(site, w, MLA(rank=5).rewrite(site, w, None)) < 1e-9
    assert error(site, w, MLA(rank=4).rewrite(site, w, None)) > 1e-3
    capped = replace(site, mods=(Softcap(2.0),))
    assert MLA(cache=1.0).after(capped).form == Latent(6, 0)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("form", ["absorbed", "rebuilt"])
def test_more_is_not_worse(rope: str, form: str) -> None:
    site, w = drawn(rope, kv_heads=2)
    stats = stats_of(site, w, rows=8)
    targets = [MLA(cache=c, form=form, polish=0) for c in (0.25, 0.5, 0.75, 1.0)]
    made = [t.rewrite(site, w, stats) for t in targets]
    errors = [error(site, w, m) for m in made]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 < errors[-2]
    assert [m.site.cache_per_token for m in made] == [t.after(site).cache_per_token for t in targets]


def test_a_dead_head_does_no_harm() -> None:
    site, w = drawn("partial")
    live = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[:, None, None]
    w = replace(w, q=Heads(w.q.weight * live, None, w.q.gain), out=w.out * live[None, :, 0])
    w = replace(w, k=Heads(w.k.weight * live, None, w.k.gain))
    made = MLA(cache=0.3).rewrite(site, w, stats_of(site, w))
    parts = (getattr(made.latents, n) for n in ("down", "turn", "read", "query_turn", "up_v"))
    assert all(bool(torch.isfinite(p).all()) for p in parts)
    assert bool(torch.isfinite(made.weights.out).all())


def test_the_mean_of_the_values_comes_back_with_the_bias() -> None:
    site, w = drawn("none", width=12)
    stats = stats_of(site, w, rows=16)
    made = MLA(rank=3, refit=False, polish=0).rewrite(site, w, stats)
    x = stats.inputs[0]
    y = output(site, w, site.kv_of, x)
    z = written(site, w, made, x)
    moved = torch.einsum("bhtd,ohd->bto", z, made.weights.out) + made.weights.out_bias
    without = moved - made.weights.out_bias + w.out_bias
    assert (moved - y).mean((0, 1)).norm() < 0.2 * (without - y).mean((0, 1)).norm()


def test_absorbed_is_what_expanding_gives() -> None:
    site, w = drawn("half")
    made = MLA(cache=0.5).rewrite(site, w, None)
    lat, x = made.latents, torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)).double()
    q, k, v = (normed(o, h, x) for o, h in ((site.q, w.q), (site.k, w.k), (site.v, w.v)))
    y = features(k, v)
    key = torch.einsum("bsr,hrd->bhsd", y @ lat.down.T, lat.read)
    value = torch.einsum("bsr,hdr->bhsd", y @ lat.down.T, lat.up_v)
    turn = torch.exp(1j * torch.arange(9)[:, None] * lat.frequencies)
    r = torch.view_as_complex((y @ lat.turn.T).unflatten(-1, (-1, 2)).contiguous()) * turn
    m = torch.view_as_complex(torch.einsum("bhtd,hpd->bhtp", q, lat.query_turn).unflatten(-1, (-1, 2)).contiguous())
    score = q @ key.mT + torch.einsum("bhtp,bsp->bhts", (m * turn).conj(), r).real
    score = (score * site.scale[0]).masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)
    assert torch.allclose(score.softmax(-1) @ value, written(site, w, made, x), atol=1e-10)


def test_a_trial_is_the_written_form() -> None:
    site, w = drawn("interleaved", kv_heads=2)
    stats = stats_of(site, w)
    made = MLA(cache=0.5).rewrite(site, w, None)
    batch = next(iter(stats.batches()))
    assert torch.allclose(trial(batch).latent(made.latents), written(site, w, made, stats.inputs[0]), atol=1e-9)


def test_exactly_one_size_is_given() -> None:
    for given in ({}, {"rank": 4, "cache": 0.5}, {"keep": 0.9, "cache": 0.5}):
        with pytest.raises(ValueError, match="give one of rank, keep and cache"):
            MLA(**given)
    for given, part in (
        ({"rank": 0}, "at least 1"),
        ({"cache": 1.5}, "at most 1"),
        ({"rank": 3, "rope_dim": 3}, "even"),
    ):
        with pytest.raises(ValueError, match=part):
            MLA(**given)


def _refusals() -> dict[str, tuple[Site, MLA]]:
    site, _ = drawn("half")
    table = replace(half_rope(4), table=np.zeros((8, 2)))
    tabled = replace(site, q=replace(site.q, rope=table), k=replace(site.k, rope=table))
    uneven = Affine(np.linspace(1, 2, 16).reshape(4, 4))
    half = MLA(cache=0.5)
    return {
        "say how many stay so with rope_dim, 0 to 16": (site, MLA(rank=4)),
        "of its keys 16 numbers are rotated; possible: 0 to 16": (site, MLA(rank=4, rope_dim=18)),
        "30 and 4 numbers are more than the 32": (site, MLA(rank=30, rope_dim=4)),
        "its 2 angles are a table": (tabled, half),
        "its values are rotated": (replace(site, v=replace(site.v, rope=half_rope(4))), half),
        "scaled by a factor per position": (replace(site, q=replace(site.q, token_gain=np.ones(8))), half),
        "scaled after the rotation, dim by dim": (replace(site, k=replace(site.k, after=uneven)), half),
        "caches a latent of 3 and 2": (replace(site, form=Latent(3, 2)), half),
        "come from 2 projections": (replace(site, k=replace(site.k, roots=site.k.roots * 2)), half),
        "0.05 of its 32 cached numbers is less than 2": (site, MLA(cache=0.05)),
        "cache gives 2 numbers": (site, MLA(cache=(0.5, 0.25))),
    }


@pytest.mark.parametrize("part", _refusals())
def test_a_refusal_is_a_sentence_with_numbers(part: str) -> None:
    site, target = _refusals()[part]
    reason = target.refuse(site)
    assert reason is not None
    assert part in reason
    assert reason[0].islower() or reason[0].isdigit()


def test_a_site_gets_its_own_number() -> None:
    target = MLA(cache=(0.5, 0.25))
    assert [target.for_site(i, 2).cache for i in (0, 1)] == [0.5, 0.25]
    with pytest.raises(ValueError, match="2 numbers for 3 sites"):
        target.for_site(0, 3)


def test_the_same_call_gives_the_same_numbers() -> None:
    site, w = drawn("half")
    one, two = (MLA(cache=0.3).rewrite(site, w, stats_of(site, w)) for _ in range(2))
    assert torch.equal(one.latents.down, two.latents.down)
    assert torch.equal(one.weights.out, two.weights.out)


def test_calibration_beats_weights_alone() -> None:
    site, w = drawn("half", kv_heads=2)
    stats: HandStats = stats_of(site, w, rows=16)
    alone, measured = (MLA(cache=0.3, polish=0).rewrite(site, w, s) for s in (None, stats))
    assert error(site, w, measured) < error(site, w, alone)


@pytest.mark.parametrize("form", ["absorbed", "rebuilt"])
def test_keeping_more_takes_more(form: str) -> None:
    site, w = drawn("half", kv_heads=2)
    stats = stats_of(site, w, rows=8)
    made = [MLA(keep=k, form=form, polish=0).rewrite(site, w, stats) for k in (0.8, 0.99, 1.0)]
    sizes = [m.site.cache_per_token for m in made]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] <= MLA(keep=0.8, form=form).after(site).cache_per_token
    assert error(site, w, made[2]) < 1e-9
    assert error(site, w, made[1]) < error(site, w, made[0])


@pytest.mark.parametrize("rope", ROPES)
def test_the_sums_are_what_loops_give(rope: str) -> None:
    site, w = drawn(rope, kv_heads=2)
    stats = stats_of(site, w)
    batch = next(iter(stats.batches()))
    rows = torch.cat([features(batch.k, batch.v), torch.ones(4, 24, 1).double()], -1).flatten(0, 1)
    assert torch.allclose(NEEDS["kv_gram"](batch), sum(torch.outer(r, r) for r in rows))
    turns, p = torch.view_as_complex(NEEDS["turns"](batch)), batch.p()
    want = torch.zeros_like(turns)
    for t, s in np.ndindex(24, 24):
        angle = (s - t) * torch.cat([frequencies(site.k), torch.zeros(1).double()])
        want += p[:, :, t, s].sum(0)[:, None] * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(turns, want)
