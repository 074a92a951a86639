"""One total for several sites: it is kept, it goes where it is missed, and what ships holds what was planned."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from passes import Target
from passes.convert import convert_sites
from passes.find import Found, find
from passes.knapsack import between, spread
from passes.mla import MLA
from passes.mla_shape import budget, lossless, sizes
from passes.spread import open_shares, settled, words
from rewrite import convert, plan
from rewrite.capture import capture
from rewrite.emit.validate import cache_bytes
from rewrite.heads import Change
from rewrite.program import Program

EASY = 1
"""The layer whose keys and values come from two numbers of a token."""


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=64, n_embd=24, n_layer=3, n_head=3, bos_token_id=0, eos_token_id=0)
    made = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block in made.transformer.h:
            block.attn.c_attn.weight.mul_(20)
            block.attn.c_proj.weight.mul_(10)
        weight = made.transformer.h[EASY].attn.c_attn.weight
        u, s, v = torch.linalg.svd(weight[:, 24:], full_matrices=False)
        weight[:, 24:] = (u[:, :2] * s[:2]) @ v[:2]
    return made


def text(windows: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(0, 61, (windows, 24), generator=torch.Generator().manual_seed(seed))


@cache
def traced() -> tuple[Program, Found]:
    """The model's graphs and its sites, for all tests here."""
    program = capture(model(), None)
    return program, find(program.static)


def changed(targets: dict[str, Target] | Target, rows: Tensor) -> dict[str, Change]:
    program, found = traced()
    each = targets if isinstance(targets, dict) else dict.fromkeys([s.name for s in found.sites], targets)
    batches = [{"input_ids": part} for part in rows.split(12)]
    return convert_sites(program, found, each, batches, lambda *_: None, measure=False)


def held(changes: dict[str, Change]) -> list[int]:
    return [c.rewritten.site.cache_per_token for c in changes.values()]


def test_between_two_sizes_the_logarithm_is_a_line() -> None:
    errors = between({8: 1.0, 16: 0.01, 24: 0.5}, 4)
    assert list(errors) == [8, 12, 16, 20, 24]
    assert errors[12] == pytest.approx(0.1)
    assert errors[24] == errors[16], "more is never worse"
    assert between({4: 1.0, 8: 0.0}, 2)[8] == 0.0
    assert 0.0 < between({4: 1.0, 8: 0.0}, 2)[6] < 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_a_spread_is_no_worse_than_even_shares(seed: int) -> None:
    draw = torch.rand(5, len(sizes(16, 48)), generator=torch.Generator().manual_seed(seed)).double()
    curves = {
        str(i): between(dict(zip(sizes(16, 48), row.sort(descending=True).values.tolist(), strict=True)), 1)
        for i, row in enumerate(draw)
    }
    got = spread(curves, 5 * 16)
    assert sum(got.values()) <= 5 * 16
    assert sum(curves[n][size] for n, size in got.items()) <= sum(c[16] for c in curves.values())


def test_a_layer_that_needs_nothing_gets_little() -> None:
    got = held(changed(MLA(cache=0.25, polish=0), text()))
    assert sum(got) == 36
    assert got[EASY] <= 6
    assert min(got[0], got[2]) > 12


def test_sizes_that_were_given_stay() -> None:
    sites = traced()[1].sites
    given = MLA(cache=(0.25, 0.125, 0.25), polish=0)
    targets: dict[str, Target] = {s.name: given.for_site(i, 3) for i, s in enumerate(sites)}
    assert held(changed(targets, text(12))) == [12, 6, 12]
    for target in (MLA(rank=8), MLA(keep=0.9), MLA(cache=0.25, spread=False), MLA(cache=0.25, even=True)):
        assert open_shares(sites, dict.fromkeys(targets, target)) == {}
    # half the cache is all that a model without rotation has, so nothing is left to share out
    assert open_shares(sites, dict.fromkeys(targets, MLA(cache=0.6))) == {}
    assert open_shares(sites[:1], dict.fromkeys(targets, MLA(cache=0.25))) == {}


def test_every_size_comes_back() -> None:
    site = traced()[1].sites[0]
    for size in range(2, lossless(site, False).total + 1):
        made = settled([site], {site.name: MLA(cache=0.25)}, {site.name: size})[site.name]
        assert isinstance(made, MLA)
        assert isinstance(made.cache, float)
        assert budget(site, made.cache) == size
        assert made.after(site).cache_per_token == size


def test_the_plan_says_how_a_total_is_shared_out() -> None:
    sites = traced()[1].sites
    targets: dict[str, Target] = {s.name: MLA(cache=0.25) for s in sites}
    assert words(sites, targets).startswith("36 numbers a token in all, spread over 3 sites by what each loses")
    assert "one rank for all layers" in words(sites, targets, alike=True)
    assert "one rank for all layers" in words(sites, {n: MLA(cache=0.25, even=True) for n in targets})
    assert words(sites, {n: MLA(cache=0.25, spread=False) for n in targets}) == ""
    assert "sizes    36 numbers a token in all" in str(plan(model(), MLA(cache=0.25)))


def test_what_ships_holds_the_total() -> None:
    source, rows = model(), text()
    made = convert(source, MLA(cache=0.25, polish=1), calibration=rows, length=24, check=False)
    report = made.rewrite_report
    ranks = [row.cache_after for row in report.sites]
    assert len(set(ranks)) > 1
    assert sum(ranks) == 36
    assert [row.after for row in report.sites] == [f"latent {n} for 3 heads" for n in ranks]
    assert "sizes differ by site as measured: 36 numbers a token in all, 36 planned" in report.notes
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    for more in ({}, {"cache_implementation": "static"}):
        out = made.generate(rows[:2, :8], return_dict_in_generate=True, **settings, **more)
        again = made(out.sequences[:, :-1], use_cache=False).logits[:, 7:].argmax(-1)
        assert torch.equal(out.sequences[:, 8:], again)
    out = made.generate(rows[:2, :8], return_dict_in_generate=True, **settings)
    assert cache_bytes(out.past_key_values) == 36 * 12 * 2 * 4
