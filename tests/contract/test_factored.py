"""Models that cache nothing, or one half of them: low-rank projections that the whole model agrees with."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from passes.assign import suited, uncached
from passes.convert import convert_sites
from passes.emit import emit
from passes.find import Found, find
from passes.mla import MLA
from passes.plan import Plan, make_plan
from rewrite.capture import capture
from rewrite.emit.choose import padded
from rewrite.emit.validate import cache_bytes, differs, greedy, relative
from rewrite.program import Program
from tests.zoo import BY_NAME

KINDS = ("bert-sdpa", "modernbert-sdpa", "timesformer-eager", "squeezebert-eager")
"""Projections apart with biases; packed under a rope; packed with biases, seeing; convolutions."""


@cache
def captured(name: str) -> tuple[PreTrainedModel, dict[str, Any], Program, Found]:
    """A model of the zoo, its padded inputs, and its sites."""
    model, given = BY_NAME[name].build()
    assert isinstance(model, PreTrainedModel)
    assert isinstance(given, dict)
    program = capture(model, given, dynamic=False)
    return model, padded(given), program, find(program.static)


@cache
def made(name: str, target: MLA, *, full: bool = False) -> tuple[Any, Plan]:
    """The model converted from its weights alone; `full`: at the setting that loses nothing."""
    model, _, program, found = captured(name)
    targets = suited({s.name: target for s in found.sites}, uncached(program, found))
    planned = make_plan(model, program, found, targets, spelled=("mla",))
    if full:
        targets = {s.name: targets[s.name].lossless(s) for s in found.sites}
    return emit(program, convert_sites(program, found, targets, None, lambda *_: None), planned)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_lost_at_full_rank(name: str) -> None:
    model, given, _, _ = captured(name)
    full, planned = made(name, MLA(rank=20), full=True)
    assert {row.form for row in planned.rows} == {"factored"}
    assert differs(model, full, given) is None


@pytest.mark.parametrize("name", KINDS)
def test_fewer_numbers_as_planned(name: str) -> None:
    model, given, _, _ = captured(name)
    small, planned = made(name, MLA(rank=20))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert before - after == sum(r.parameters_before - r.parameters_after for r in planned.rows) > 0
    with torch.no_grad():
        assert relative(model(**given)[0], small(**given)[0]) > 1e-3, "nothing was compressed"


def test_two_projections_make_their_latent_once() -> None:
    """Keys and values of BERT are modules of their own: the second takes the latent that the first has made."""
    _, given, _, _ = captured("bert-sdpa")
    full, _ = made("bert-sdpa", MLA(rank=20), full=True)
    own = [n for n, _ in full.named_parameters() if ".down." in n]
    assert len(own) == full.config.num_hidden_layers
    value: Any = full.get_submodule("encoder.layer.0.attention.self.value")
    x = torch.randn(2, 5, 64)
    alone = value(x)
    assert len(value.lenders[0].made) == 1
    value.lenders[0](x)
    assert value.lenders[0].made == []
    other = torch.randn(2, 5, 64)
    value.lenders[0](other)
    assert torch.equal(value(x), alone), "a latent of another input was taken"
    full(**given)
    twin = copy.deepcopy(full)
    assert twin.get_submodule("encoder.layer.0.attention.self.value").lenders[0] is twin.get_submodule(
        "encoder.layer.0.attention.self.key"
    )
    with torch.no_grad():
        assert torch.equal(twin(**given)[0], full(**given)[0])


def test_a_size_that_saves_nothing_is_refused() -> None:
    model, _, program, found = captured("bert-sdpa")
    targets = suited({s.name: MLA(rank=43) for s in found.sites}, uncached(program, found))
    planned = make_plan(model, program, found, targets, spelled=("mla",))
    assert planned.converted == 0
    assert all("would hold 8256 numbers, now 8192; at most 42 saves" in row.note for row in planned.rows)


def test_both_halves_of_a_model_that_caches_in_one() -> None:
    """The encoder's projections become smaller, the decoder's caches as they would alone."""
    model, given, _, _ = captured("t5-sdpa")
    both, planned = made("t5-sdpa", MLA(cache=0.25))
    forms = {row.name.partition(".")[0]: row.form for row in planned.rows}
    assert forms == {"encoder": "factored", "decoder": "latent"}
    expected, got = greedy(model, given, 4), greedy(both, given, 4)
    assert 4 * cache_bytes(got.past_key_values) == cache_bytes(expected.past_key_values)
    encoder = [p for n, p in both.named_parameters() if n.startswith("encoder.")]
    assert sum(p.numel() for p in encoder) < sum(p.numel() for p in model.get_submodule("encoder").parameters())


def test_half_precision_stays() -> None:
    model, given, _, _ = captured("bert-sdpa")
    half = copy.deepcopy(model).to(torch.bfloat16)
    program = capture(half, {n: v for n, v in given.items() if n != "use_cache"}, dynamic=False)
    found = find(program.static)
    targets = suited({s.name: MLA(rank=20) for s in found.sites}, uncached(program, found))
    planned = make_plan(half, program, found, targets, spelled=("mla",))
    small, _ = emit(program, convert_sites(program, found, targets, None, lambda *_: None), planned)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
