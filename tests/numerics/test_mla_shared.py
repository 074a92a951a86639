"""Laws of a latent made of a latent: what heads share is the whole of them, in whichever coordinates it is computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import passes.mla_absorb as absorb_module
from codegen.latent import attention
from passes.factor import LowRank
from passes.mla import MLA
from passes.mla_absorb import Absorber, Setting
from passes.mla_basis import back, basis, of_tokens
from passes.mla_scene import scenes
from passes.mla_source import known
from passes.trial import trial
from rewrite.heads import Rewritten, Weights
from rewrite.layout import expanded, gather
from rewrite.shared import shared
from rewrite.site import Latent, Root, Site
from tests.attend import HandStats, normed, output, stats_of
from tests.sites import make_site, shared_site


def apart(site: Site) -> Site:
    """The same attention with projections of keys and values of their own, which share nothing."""
    made: dict[str, object] = {}
    for name, o in (("k", site.k), ("v", site.v)):
        root = Root(f"{name}.weight", np.arange(o.rows.size) * 12, 1, 12, source="hidden")
        made[name] = replace(o, roots=(root,), rows=np.arange(o.rows.size).reshape(o.rows.shape))
    return replace(site, **made)


def with_latent(made: Rewritten, site: Site, weights: Weights, x: Tensor) -> Tensor:
    assert made.latents is not None
    q, k, v = (normed(o, h, x) for o, h in ((site.q, weights.q), (site.k, weights.k), (site.v, weights.v)))
    future = torch.zeros(x.shape[1], x.shape[1]).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, -torch.inf)
    y = of_tokens(k, v, back(basis(site, weights)))
    z = attention(made.latents, site, q, y, added=future)
    return torch.einsum("bhtd,ohd->bto", z, made.weights.out)


def error(made: Rewritten, stats: HandStats) -> float:
    site, weights, x = stats.site, stats.weights, torch.cat(stats.inputs)
    expected = output(site, weights, site.kv_of, x)
    return float((with_latent(made, site, weights, x) - expected).square().sum() / expected.square().sum())


def test_what_is_shared_is_read_off_the_rows() -> None:
    site, tensors = shared_site()
    few = shared(site)
    assert few is not None
    assert (few.rank, len(few.dims), site.cache_per_token) == (8, 4, 12)
    weights, x = gather(site, tensors.__getitem__), torch.randn(5, 12, dtype=torch.float64)
    up, table = tensors["up.weight"], x[:, :8] @ tensors["up.weight"].T
    keys = torch.einsum("hdx,tx->thd", weights.k.weight, x)
    assert torch.allclose(keys[:, 1, :4], table[:, 7:11])
    assert torch.equal(keys[:, :, 4:], x[:, None, 8:].expand(-1, 4, -1)), "all heads have one key behind the others"
    assert torch.allclose(torch.einsum("hdx,tx->thd", weights.v.weight, x)[:, 2], x[:, :8] @ up[18:21].T)


@pytest.mark.parametrize(
    "alter",
    [
        lambda s: replace(s, k=replace(s.k, rows=s.k.rows[:, ::-1].copy())),
        lambda s: replace(s, k=replace(s.k, rows=np.where(s.k.rows == 9, np.arange(4)[:, None] + 8, s.k.rows))),
        lambda s: replace(s, v=replace(s.v, roots=(replace(s.v.roots[0], source="other"),))),
        lambda s: replace(s, k=replace(s.k, rope=replace(s.k.rope, pairs=s.k.rope.pairs - 4))),
    ],
    ids=["dims in another order turn", "keys of their own", "values of another token", "turning plain dims"],
)
def test_other_keys_of_two_projections_stay_refused(alter) -> None:
    site = alter(shared_site()[0])
    assert shared(site) is None
    assert "its keys come from 2 projections" in str(MLA(cache=0.5).refuse(site))


def test_it_says_what_it_cannot_do() -> None:
    site, _ = shared_site()
    assert 'form="absorbed" works' in str(MLA(cache=0.5, form="rebuilt").refuse(site))
    assert "more than the 12 that it caches now" in str(MLA(rank=9, rope_dim=4).refuse(site))
    assert "possible: 0 to 4" in str(MLA(rank=4, rope_dim=6).refuse(site))
    assert MLA(rank=4, rope_dim=2).refuse(site) is None


@pytest.mark.parametrize("seen", [True, False])
def test_nothing_is_lost_at_the_limit(seen: bool) -> None:
    site, tensors = shared_site()
    weights = gather(site, tensors.__getitem__)
    stats = stats_of(site, weights)
    made = MLA(cache=1.0).rewrite(site, weights, stats if seen else None)
    assert made.site.form == Latent(8, 4)
    assert error(made, stats) < 1e-15


def test_more_is_never_worse_and_less_is_less() -> None:
    site, tensors = shared_site()
    weights = gather(site, tensors.__getitem__)
    stats = stats_of(site, weights)
    errors = [error(MLA(cache=n / 12).rewrite(site, weights, stats), stats) for n in (3, 5, 7, 9, 11, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[3] > 4 * errors[4] > 0
    assert error(MLA(rank=6, rope_dim=2).rewrite(site, weights, stats), stats) > 0


@pytest.mark.parametrize("setting", [Setting(1.0, True, 0), Setting(0.3, False, 2), Setting(3.0, True, 4)], ids=str)
def test_the_coordinates_do_not_matter(setting: Setting) -> None:
    """Moments of what is shared give what moments of all keys and values give, which are four times as wide."""
    few, tensors = shared_site()
    weights, ones = gather(few, tensors.__getitem__), torch.ones(4, dtype=torch.float64)
    absorbers: list[Absorber] = []
    for site in (few, apart(few)):
        stats = stats_of(site, weights)
        absorbers.append(Absorber(known(site, weights, stats.moments, stats.tokens), ones))
    narrow, wide = (a.losses(setting)[:13] for a in absorbers)
    assert len(absorbers[1].known.mean) == 44
    assert torch.allclose(narrow, wide, rtol=1e-6, atol=1e-9 * float(wide[0]))
    total = setting.rope_dim + 3
    maps = [a.latents(setting, total) for a in absorbers]
    rows = basis(few, weights)
    assert rows is not None
    downs = maps[0].down, maps[1].down @ rows
    read = [torch.einsum("hrd,rx->hdx", m.read, d) for m, d in zip(maps, downs, strict=True)]
    assert torch.allclose(read[0], read[1], atol=1e-6 * float(read[1].abs().max()))


def test_some_windows_and_queries_are_those_of_all() -> None:
    site, tensors = shared_site()
    weights = gather(site, tensors.__getitem__)
    stats = stats_of(site, weights)
    latents = MLA(cache=0.5).rewrite(site, weights, stats).latents
    assert latents is not None
    batch, x = next(iter(stats.batches())), stats.inputs[0]
    assert torch.allclose(batch.y, x, rtol=1e-9), "all that its heads share is read"
    whole, at = trial(batch), torch.tensor([3, 11, 23])
    some = trial(batch, slice(1, 3), at, torch.float32)
    assert torch.allclose(some.y.double(), x[1:3], atol=1e-5)
    assert torch.allclose(some.latent(latents).double(), whole.latent(latents)[1:3][:, :, at], atol=1e-4)
    few = next(iter(scenes(stats, weights, 48, every=4)))
    want = whole.latent(latents)[: len(few.q), :, few.at]
    assert torch.allclose(few.heads(latents).double(), want, atol=1e-4)


@pytest.mark.parametrize("setting", [Setting(1.0, True, 2), Setting(3.0, False, 0)], ids=str)
def test_a_site_too_wide_for_the_plain_path_is_the_same(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments of what is shared are small however many heads read it."""
    site, tensors = shared_site()
    weights = gather(site, tensors.__getitem__)
    stats = stats_of(site, weights)
    seen, ones = known(site, weights, stats.moments, stats.tokens), torch.ones(4, dtype=torch.float64)
    plain = Absorber(seen, ones).losses(setting)
    monkeypatch.setattr(absorb_module, "WIDE", 4)
    wide = Absorber(seen, ones, numbers=3)
    assert torch.equal(wide.losses(setting), plain)
    assert len(plain) == 13
    assert wide.latents(setting, 12).rank == 12 - setting.rope_dim


def test_an_ordinary_site_shares_nothing_and_keys_are_never_written() -> None:
    ordinary, _ = make_site()
    assert shared(ordinary) is None
    site, tensors = shared_site()
    weights = gather(site, tensors.__getitem__)
    edits = expanded(site, replace(weights, out=2 * weights.out), site.kv_of, tensors.__getitem__)
    assert set(edits) == {"q.weight", "o.weight"}
    assert torch.equal(edits["o.weight"], 2 * tensors["o.weight"])


def test_projections_of_low_rank_are_not_made_low_rank() -> None:
    site, _ = shared_site()
    assert "8 and 4 shared numbers" in str(LowRank(MLA(cache=0.5)).refuse(site))
    assert LowRank(MLA(rank=3)).refuse(make_site(kv_heads=4)[0]) is None
