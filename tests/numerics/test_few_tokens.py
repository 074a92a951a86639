"""A little calibration is no worse than none, and much of it is believed."""

from __future__ import annotations

import torch

from passes.gqa import GQA
from passes.gqa_source import facts
from rewrite.heads import Weights
from rewrite.layout import gather
from rewrite.site import Site
from tests.attend import HandStats, output, stats_of
from tests.sites import half_rope, make_site

SEEDS = range(4)


def drawn(seed: int) -> tuple[Site, Weights]:
    site, tensors = make_site(heads=4, kv_heads=4, dim=4, width=24, rope=half_rope(4), seed=seed)
    return site, gather(site, {n: t * (0.3 if n.endswith("weight") else 1.0) for n, t in tensors.items()}.__getitem__)


def loss(seed: int, calibrated: bool) -> float:
    """Squared error on unseen tokens relative to the output, merged on 12 tokens or on the weights alone."""
    site, w = drawn(seed)
    stats = HandStats(site, w, (stats_of(site, w, seed, rows=1).inputs[0][:, :12],)) if calibrated else None
    made = GQA(2, refit=False, polish=0).rewrite(site, w, stats)
    x = stats_of(site, w, seed + 100).inputs[0]
    y, moved = output(site, w, site.kv_of, x), output(made.site, made.weights, made.site.kv_of, x)
    return float((moved - y).square().sum() / y.square().sum())


def test_twelve_tokens_lose_less_than_none() -> None:
    """Sixteen rows of keys have more directions than twelve tokens can tell."""
    assert sum(loss(seed, True) for seed in SEEDS) < sum(loss(seed, False) for seed in SEEDS)


def test_the_weights_speak_until_the_tokens_do() -> None:
    site, w = drawn(0)
    moments = stats_of(site, w).moments
    alone, much = facts(site, w, None), facts(site, w, {n: 1e9 * m for n, m in moments.items()})
    few = facts(site, w, {n: 1e-9 * m for n, m in moments.items()})
    count = float(moments["k_gram"][-1, -1])
    assert torch.allclose(much.k.second.reshape(16, 16), moments["k_gram"][:-1, :-1] / count, rtol=1e-5)
    assert torch.allclose(much.q, moments["q_gram"] / count, rtol=1e-5)
    ratio = few.k.centred / alone.k.centred
    assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-5)
    assert torch.allclose(few.far, alone.far, atol=1e-6)
    assert torch.allclose(few.k.mean, much.k.mean)
    assert not torch.allclose(alone.far, much.far, atol=1e-2)
