"""Laws of merged heads: nothing is lost where nothing can be, and what is lost is the least."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from passes.gqa import GQA
from passes.refit import measure
from rewrite.heads import Heads, Weights
from rewrite.layout import expanded, gather
from rewrite.site import Affine, Bias, Norm, Rope, Site, Softcap
from tests.attend import output, stats_of
from tests.sites import half_rope, make_site

TWISTED = Rope(np.array([[0, 1], [2, 3]]), np.array([1.0, 0.1]), np.array([0.0, 0.3]))
PARTIAL = Rope(np.array([[0, 2], [1, 3]]), np.array([1.0, 0.03]), np.zeros(2))
ROPES = {"none": (None, 4), "half": (half_rope(4), 4), "interleaved": (TWISTED, 4), "partial": (PARTIAL, 6)}


def drawn(
    name: str, bias: bool = True, heads: int = 4, kv_heads: int = 4, norm: Norm | None = None
) -> tuple[Site, Weights]:
    rope, dim = ROPES[name]
    site, tensors = make_site(heads=heads, kv_heads=kv_heads, dim=dim, width=24, bias=bias, rope=rope, norm=norm)
    shrunk = {n: t * (0.3 if n.endswith("weight") else 1.0) for n, t in tensors.items()}
    return site, gather(site, shrunk.__getitem__)


def images(site: Site, w: Weights, first_of: tuple[int, ...], seed: int = 1) -> Weights:
    """Keys of a group made into images of one another that commute with the rope, values into any linear images;
    biases too where something turns (else they stay as drawn, because softmax ignores them)."""
    generator = torch.Generator().manual_seed(seed)
    k, v = w.k.weight.clone(), w.v.weight.clone()
    kb = None if w.k.bias is None else w.k.bias.clone()
    for i, first in enumerate(first_of):
        if i == first:
            continue
        turn = torch.randn(k.shape[1], k.shape[1], generator=generator, dtype=torch.float64)
        if site.k.rope is not None:
            pairs = site.k.rope.pairs
            turn[pairs.reshape(-1)] = 0
            turn[:, pairs.reshape(-1)] = 0
            for a, b in pairs.tolist():
                c, s = torch.randn(2, generator=generator, dtype=torch.float64).tolist()
                turn[a, a] = turn[b, b] = c
                turn[b, a], turn[a, b] = s, -s
            if kb is not None and w.k.bias is not None:
                kb[i] = turn @ w.k.bias[first]
        k[i] = turn @ k[first]
        v[i] = torch.randn(v.shape[1], v.shape[1], generator=generator, dtype=torch.float64) @ v[first]
    return replace(w, k=Heads(k, kb, w.k.gain), v=Heads(v, w.v.bias, w.v.gain))


def error(site: Site, source: Weights, made, seed: int = 7) -> float:
    x = torch.randn(
        3, 20, source.q.weight.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    y = output(site, source, site.kv_of, x)
    moved = output(made.site, made.weights, made.site.kv_of, x)
    return float((moved - y).norm() / y.norm())


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("method", ["default", "mean", "aligned"])
def test_as_many_heads_as_there_are_change_nothing(rope: str, method: str) -> None:
    site, w = drawn(rope)
    made = GQA(4, method).rewrite(site, w, None)
    assert made.order == (0, 1, 2, 3)
    assert all(torch.equal(getattr(made.weights, n).weight, getattr(w, n).weight) for n in "qkv")
    assert torch.equal(made.weights.out, w.out)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("polish", [0, 2])
def test_heads_that_are_images_of_one_another_merge_without_loss(rope: str, bias: bool, polish: int) -> None:
    site, w = drawn(rope, bias)
    w = images(site, w, (0, 0, 2, 2))
    made = GQA(2, polish=polish, refit=polish > 0).rewrite(site, w, stats_of(site, w))
    assert sorted(made.order) == [0, 1, 2, 3]
    # the sums square what is small: rounding of 1e-16 stands as 1e-8, single precision inside the polish as 1e-5
    assert error(site, w, made) < (1e-4 if polish else 1e-6)


@pytest.mark.parametrize("rope", ["none", "half"])
def test_weights_alone_find_which_heads_are_images(rope: str) -> None:
    site, w = drawn(rope)
    w = images(site, w, (0, 1, 0, 1))
    made = GQA(2).rewrite(site, w, None)
    assert made.order == (0, 2, 1, 3)
    assert made.notes == ("weights only: groups and distances are not measured, the output projection is not refitted",)
    assert error(site, w, made) < 1e-6


def test_several_queries_a_head_move_with_it() -> None:
    site, w = drawn("half", heads=8, kv_heads=4)
    w = images(site, w, (0, 1, 0, 1))
    made = GQA(2, refit=False, polish=0).rewrite(site, w, stats_of(site, w))
    assert made.order == (0, 1, 4, 5, 2, 3, 6, 7)
    assert made.site.kv_of == (0, 0, 0, 0, 1, 1, 1, 1)
    assert error(site, w, made) < 1e-6


@pytest.mark.parametrize(
    ("kind", "over"), [("rms", "head"), ("rms", "row"), ("l2", "head"), ("layer", "head"), ("layer", "row")]
)
def test_equal_heads_merge_without_loss_behind_a_norm(kind: str, over: str) -> None:
    site, w = drawn("half", norm=Norm(kind, over, 1e-8))
    gain = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).expand(4, 4)
    k = Heads(w.k.weight[[0, 0, 2, 2]], None if w.k.bias is None else w.k.bias[[0, 0, 2, 2]], gain)
    w = replace(w, k=k, q=replace(w.q, gain=gain), v=replace(w.v, weight=w.v.weight[[0, 0, 2, 2]]))
    made = GQA(2, refit=False).rewrite(site, w, stats_of(site, w))
    assert error(site, w, made) < 1e-6
    assert torch.equal(made.weights.q.gain, gain)


def test_a_dead_head_does_no_harm() -> None:
    site, w = drawn("partial")
    live = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[:, None, None]
    w = replace(w, q=Heads(w.q.weight * live, None, w.q.gain), out=w.out * live[None, :, 0])
    w = replace(w, k=Heads(w.k.weight, None, w.k.gain))
    made = GQA(2).rewrite(site, w, stats_of(site, w))
    assert all(bool(torch.isfinite(getattr(made.weights, n).weight).all()) for n in "qkv")
    assert bool(torch.isfinite(made.weights.out).all())


def test_heads_that_a_bias_tells_apart_stay_where_they_are() -> None:
    site, w = drawn("none")
    w = images(site, w, (0, 1, 0, 1))
    site = replace(site, mods=(Bias("constant", (0.5, 0.25, 0.125, 0.0625)),))
    made = GQA(2).rewrite(site, w, stats_of(site, w))
    assert made.order == (0, 1, 2, 3)
    assert made.site.kv_of == (0, 0, 1, 1)


def test_interleaved_readers_keep_their_places() -> None:
    site, w = drawn("none", heads=8, kv_heads=4)
    site = replace(site, kv_of=tuple(j % 4 for j in range(8)))
    w = images(site, w, (0, 1, 0, 1))
    made = GQA(2, refit=False).rewrite(site, w, stats_of(site, w))
    assert made.order == tuple(range(8))
    assert made.site.kv_of == (0, 1, 0, 1, 0, 1, 0, 1)
    assert error(site, w, made) < 1e-6


def test_a_softcap_keeps_the_mean_of_the_keys() -> None:
    site, w = drawn("none")
    # only the mean tells these keys apart, which a cap does not ignore
    w = replace(w, k=Heads(w.k.weight[[0, 0, 2, 2]], w.k.bias, w.k.gain))
    free, capped = GQA(2, refit=False, polish=0), replace(site, mods=(Softcap(1.0),))
    stats = stats_of(site, w)
    lost = free.rewrite(capped, w, stats).weights.k.weight
    assert not torch.allclose(lost.norm(), free.rewrite(site, w, stats).weights.k.weight.norm(), rtol=1e-3)


@pytest.mark.parametrize("rope", ["none", "half"])
def test_the_default_loses_least(rope: str) -> None:
    site, w = drawn(rope, heads=6, kv_heads=6)
    # heads with something in common, hidden behind turns of their own
    base = images(site, w, (0, 0, 0, 0, 0, 0))
    k = replace(w.k, weight=base.k.weight + 0.4 * w.k.weight)
    w = replace(w, k=k, v=replace(w.v, weight=base.v.weight + 0.4 * w.v.weight))
    stats = stats_of(site, w, rows=16)
    targets = [GQA(2, "mean", False), GQA(2, "aligned", False), GQA(2, polish=0, refit=False), GQA(2)]
    made = [t.rewrite(site, w, stats) for t in targets]
    mean, aligned, merged, polished = (
        measure(stats, m.weights, m.site.kv_of).held.error(_flat(m.weights)) for m in made
    )
    # tokens drawn alone may leave the polish nothing to gain; then it changes nothing
    assert polished <= merged < 0.3 * aligned
    assert aligned < mean


def _flat(w: Weights) -> torch.Tensor:
    out = w.out.flatten(1)
    return out if w.out_bias is None else torch.cat([out, w.out_bias[:, None]], 1)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_shapes_are_those_that_were_promised(kv_heads: int) -> None:
    site, w = drawn("half")
    target = GQA(kv_heads)
    promised, made = target.after(site), target.rewrite(site, w, None)
    assert made.site == promised
    assert promised.kv_heads == kv_heads
    assert promised.cache_per_token * 4 == site.cache_per_token * kv_heads
    for which in "kv":
        operand = getattr(promised, which)
        assert getattr(made.weights, which).weight.shape[:2] == operand.rows.shape
        assert operand.roots[0].rows == operand.rows.size


def test_the_promised_rows_hold_the_merged_heads() -> None:
    site, tensors = make_site("thirds", rope=half_rope(4))
    target = GQA(2)
    made = target.rewrite(site, gather(site, tensors.__getitem__), None)
    edits = expanded(site, made.weights, made.site.kv_of, tensors.__getitem__)
    read = gather(target.after(site), lambda name: edits.get(name, tensors[name]))
    assert torch.allclose(read.k.weight, made.weights.k.weight)
    assert torch.allclose(read.v.weight, made.weights.v.weight)


def test_a_site_gets_its_own_number() -> None:
    target = GQA((4, 2))
    assert [target.for_site(i, 2).kv_heads for i in (0, 1)] == [4, 2]
    with pytest.raises(ValueError, match="2 numbers for 3 sites"):
        target.for_site(0, 3)


def test_the_same_call_gives_the_same_numbers() -> None:
    site, w = drawn("half")
    one, two = (GQA(2).rewrite(site, w, stats_of(site, w)) for _ in range(2))
    assert torch.equal(one.weights.k.weight, two.weights.k.weight)
    assert torch.equal(one.weights.out, two.weights.out)


def _refusals() -> dict[str, tuple[Site, int]]:
    site, _ = drawn("half")
    thirds, _ = make_site("thirds")
    shift = Affine(np.ones((4, 4)))
    by_row = replace(site.k, norm=Norm("l2", "row", 1e-6))
    wider = replace(half_rope(4), frequencies=np.array([1.0, 0.5]))
    return {
        "3 equal groups; possible: 1, 2, 4": (site, 3),
        "has 4 kv heads, fewer than 8; possible: 1, 2, 4": (site, 8),
        "keys and values share rows of qkv.weight": (replace(thirds, v=thirds.k), 2),
        "its values are rotated by position": (replace(site, v=replace(site.v, rope=half_rope(4))), 2),
        "rotated by different frequencies": (replace(site, q=replace(site.q, rope=wider)), 2),
        "a constant is added to its keys": (replace(site, k=replace(site.k, shift=shift)), 2),
        "read by 0 to 2 query heads": (replace(site, kv_of=(0, 0, 1, 2)), 2),
        "divided by the length of all 4 heads": (replace(site, k=by_row), 2),
        "come from 2 projections": (replace(site, k=replace(site.k, roots=site.k.roots * 2)), 2),
    }


@pytest.mark.parametrize("part", _refusals())
def test_a_refusal_is_a_sentence_with_numbers(part: str) -> None:
    site, kv_heads = _refusals()[part]
    reason = GQA(kv_heads).refuse(site)
    assert reason is not None
    assert part in reason
    assert reason[0].islower() or reason[0].isdigit()
