"""Fewer keys: softmax over what is left, what a kv head loses by its window, and totals that are kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from passes.convert import Change, convert_sites
from passes.find import find
from passes.masked import Part, masked_outputs, table
from passes.refit import output_error
from passes.sparse import BlockSparse
from passes.sparse_measure import losses, shared_out, windows
from passes.sparse_shape import cost, mixture, pairs
from rewrite.capture import capture
from rewrite.layout import gather
from rewrite.mask import causal, sink, streaming, window
from tests.attend import HandStats, heads_out, stats_of
from tests.numerics.test_spread import model, text
from tests.sites import half_rope, make_site

TOKENS = 24
MASKS = (causal & (window(5) | sink(2)), streaming([1, 1, 0, 0], [3, 3, None, None]))


def made(kv_heads: int = 2) -> HandStats:
    site, tensors = make_site(heads=4, kv_heads=kv_heads, dim=4, rope=half_rope(4), seed=3)
    tensors["q.weight"] *= 0.1  # or one key takes all, and a window has it or loses it
    tensors["q.bias"] *= 0.1
    return stats_of(site, gather(site, tensors.__getitem__), seed=5)


@pytest.mark.parametrize("mask", MASKS, ids=["alike", "by head"])
def test_what_is_left_of_the_probabilities_is_softmax_over_what_is_read(mask):
    known = made()
    keep = torch.stack([torch.from_numpy(mask.table(TOKENS, TOKENS, i)) for i in range(4)])
    hidden = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    for x, batch in zip(known.inputs, known.batches(), strict=True):
        expected = heads_out(known.site, known.weights, known.site.kv_of, x, hidden).transpose(1, 2).flatten(0, 1)
        assert torch.allclose(masked_outputs(mask, batch), expected, atol=1e-12)


def test_a_sink_keeps_its_part():
    scores = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    keep, extra = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2), torch.tensor(0.7, dtype=torch.float64).exp()
    p = scores.exp() / (scores.exp().sum(-1, keepdim=True) + extra)
    v = torch.randn(1, 2, 6, 3, dtype=torch.float64)
    expected = (scores.exp() * keep) @ v / ((scores.exp() * keep).sum(-1, keepdim=True) + extra)
    z, hidden = Part(p, v, torch.arange(6), 1 - p.sum(-1, keepdim=True)).outputs(keep)
    assert torch.allclose(z, expected, atol=1e-12)
    assert torch.allclose(hidden[..., 0], (p * ~keep).sum(-1), atol=1e-12)


def test_positions_are_those_of_keys():
    assert torch.equal(table(causal & window(2), torch.tensor([3, 5]), 6, 4)[0].int().sum(1), torch.tensor([2, 2]))
    assert table(MASKS[1], torch.arange(4), 4, 4).shape == (4, 4, 4)


def test_a_head_loses_what_the_site_loses_when_it_alone_is_masked():
    known = made()
    found = losses(known.site, known.weights, list(known.batches()), 1, TOKENS)
    for head, width in itertools.product(range(2), windows(TOKENS, None)):
        some: list[int | None] = [None, None]
        some[head] = width
        mask = mixture(known.site, [1 if w else 0 for w in some], some)
        trials = ((masked_outputs(mask, b), y) for b, (_, y) in zip(known.batches(), attended(known), strict=True))
        assert found.errors[head][width] == pytest.approx(output_error(trials, known.weights), rel=1e-4)
        assert 0 < found.hidden[head][width] < 1
    assert found.errors[0][None] == 0


def attended(known: HandStats):
    return known.attend(known.weights, known.site.kv_of)


def test_totals_are_kept_and_used_best():
    known = made(4)
    found = losses(known.site, known.weights, list(known.batches()), 1, TOKENS)
    costs = {w: cost(known.site, TOKENS, 1, w) for w in found.errors[0]}
    shares = shared_out(known.site, found, 1, TOKENS)
    full = shares.full
    for total in (full // 4, full // 2, full * 3 // 4, full):
        error, chosen = shares.within(total)
        every = itertools.product(costs, repeat=4)
        fits = [c for c in every if sum(costs[w] for w in c) <= total]
        if not fits:
            assert sum(costs[w] for w in chosen) == 4 * min(costs.values())
            continue
        best = min(sum(e[w] for e, w in zip(found.errors, c, strict=True)) for c in fits)
        assert sum(costs[w] for w in chosen) <= total
        assert error == pytest.approx(best, rel=1e-9, abs=1e-15)


def test_windows_are_narrower_than_what_the_site_reads():
    assert windows(256, None)[0] == 4
    assert max(windows(256, None)) == 128
    assert max(windows(256, 40)) < 40
    assert windows(4, None) == ()


def changed(target: BlockSparse) -> dict[str, Change]:
    source = model()
    program = capture(source, None)
    found = find(program.static)
    batches = [{"input_ids": part} for part in text().split(12)]
    targets = {s.name: target for s in found.sites}
    return convert_sites(program, found, targets, batches, lambda *_: None)


def test_a_mixture_reads_no_more_than_one_window_and_loses_less():
    half = BlockSparse(density=0.5, sink=1, context=TOKENS)
    ours, alike = changed(half), changed(BlockSparse(density=0.5, sink=1, context=TOKENS, uniform=True))

    def read(changes: dict[str, Change]) -> float:
        return float(np.mean([pairs(c.rewritten.site.mask, TOKENS, 3) for c in changes.values()]))

    whole = float(np.mean([pairs(c.site.mask, TOKENS, 3) for c in ours.values()]))
    assert read(ours) <= 0.52 * whole
    assert read(alike) <= 0.5 * whole
    assert sum(c.error or 0 for c in ours.values()) < sum(c.error or 0 for c in alike.values())
    assert len({str(c.rewritten.site.mask) for c in ours.values()}) > 1
    assert len({str(c.rewritten.site.mask) for c in alike.values()}) == 1


def test_weights_alone_give_all_heads_one_window():
    known = made()
    new = BlockSparse(density=0.5, context=TOKENS).rewrite(known.site, known.weights, None)
    assert any("all heads get the same window" in note for note in new.notes)
    assert len(set(str(new.site.mask).rpartition(", ")[2].rstrip(")").split("/"))) == 1


def test_a_refit_needs_no_refit_at_the_limit():
    change = next(iter(changed(BlockSparse(causal)).values()))
    assert change.error == pytest.approx(0, abs=1e-12)
    assert torch.allclose(
        change.rewritten.weights.out, gather(change.site, dict(model().named_parameters()).__getitem__).out
    )
