"""What comes out of emission computes what was asked for, holds less, and is refused where that cannot be had."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rewrite.emit import Emitted, emit, forecast
from rewrite.emit.edits import edited
from rewrite.emit.twin import twin
from rewrite.emit.validate import cache_bytes, differs, greedy, relative
from rewrite.heads import Rewritten
from rewrite.layout import gather
from rewrite.site import Refusal, Site
from tests.contract.by_hand import changes, keep, tensors_of
from tests.contract.tiny import ALL, GROUPED, STOCK, VIEW, inputs

Changes = Mapping[str, tuple[Site, Rewritten]]
FORM = dict.fromkeys(STOCK, "stock") | dict.fromkeys(GROUPED, "grouped") | dict.fromkeys(VIEW, "view")
ONE_OF_EACH = ("llama", "gpt2", "bloom")


def expanded(model: PreTrainedModel, given: Changes) -> PreTrainedModel:
    """The model's own class at full width, its heads made equal: what every form must reproduce."""
    edits: dict[str, torch.Tensor] = {}
    for site, new in given.values():
        edits |= edited(site, new, tensors_of(model))
    return twin(model, edits, share=False)


@cache
def halved(name: str) -> tuple[PreTrainedModel, PreTrainedModel, Emitted]:
    """(original, reference with equal heads, emission) at half the kv heads."""
    model, sites = ALL[name]()
    given = changes(model, sites, 2)
    return model, expanded(model, given), emit(model, given, inputs(model))


@pytest.mark.parametrize("name", ALL)
def test_half_the_heads(name: str) -> None:
    model, reference, made = halved(name)
    assert made.refused == {}
    assert set(made.forms.values()) <= {FORM[name], "view"}  # an encoder holds no cache, so there is none to group
    assert FORM[name] in made.forms.values()
    given = inputs(model)
    expected, found = greedy(reference, given, 10), greedy(made.model, given, 10)
    assert torch.equal(expected.sequences, found.sequences)
    assert all(relative(a, b) < 1e-5 for a, b in zip(expected.logits, found.logits, strict=True))
    assert 2 * cache_bytes(found.past_key_values) == cache_bytes(expected.past_key_values)
    original = greedy(model, given, 1)
    assert relative(original.logits[0], found.logits[0]) > 1e-3, "the test's rewriting changes nothing"


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_original_is_not_touched(name: str) -> None:
    model, sites = ALL[name]()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config, kind = copy.deepcopy(model.config.to_dict()), type(model)
    made = emit(model, changes(model, sites, 2), inputs(model)).model
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.config.to_dict() == config
    assert type(model) is kind
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "olmo2", "gpt2", "bloom", "t5"])
def test_all_heads_kept_is_the_model_itself(name: str) -> None:
    model, sites = ALL[name]()
    made = emit(model, changes(model, sites, 4), inputs(model))
    assert set(made.forms.values()) == {"stock"}
    assert type(made.model) is type(model)
    given = inputs(model)
    assert relative(model(**given).logits, made.model(**given).logits) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gpt2", "opt", "bart"])
def test_permuted_heads_are_the_same_model(name: str) -> None:
    """At all heads a permutation of kv heads with their query heads, sinks and output columns changes nothing."""
    model, sites = ALL[name]()
    given: dict[str, tuple[Site, Rewritten]] = {}
    order = [2, 0, 3, 1]
    for site in sites:
        new = keep(site, 4, gather(site, tensors_of(model)), tuple(order))
        k, v = (replace(h, weight=h.weight[order], gain=h.gain[order], bias=None if h.bias is None else h.bias[order])
                for h in (new.weights.k, new.weights.v))  # fmt: skip
        given[site.name] = (site, replace(new, weights=replace(new.weights, k=k, v=v)))
    made = emit(model, given, inputs(model)).model
    assert relative(model(**inputs(model)).logits, made(**inputs(model)).logits) < 1e-5
    assert not torch.equal(
        model.state_dict()[sites[0].k.roots[0].tensor], made.state_dict()[sites[0].k.roots[0].tensor]
    )


def test_counts_that_differ_by_layer_leave_the_stock_class() -> None:
    model, sites = ALL["llama"]()
    given = changes(model, sites, 2, **{sites[1].name: 1})
    made = emit(model, given, inputs(model))
    assert set(made.forms.values()) == {"grouped"}
    assert "one number for all layers, these keep 1, 2 kv heads" in made.why[sites[0].name][0]
    layers = greedy(made.model, inputs(model), 2).past_key_values.layers
    assert [layer.keys.shape[1] for layer in layers] == [2, 1]


def test_a_site_that_stays_keeps_the_others_from_stock() -> None:
    model, sites = ALL["llama"]()
    made = emit(model, changes(model, sites[:1], 2), inputs(model))
    assert made.forms == {sites[0].name: "grouped"}
    layers = greedy(made.model, inputs(model), 2).past_key_values.layers
    assert [layer.keys.shape[1] for layer in layers] == [2, 4]


def test_low_precision_is_validated_in_float32_and_given_back() -> None:
    for name in ONE_OF_EACH:
        model, sites = ALL[name]()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        made = emit(model, changes(model, sites, 2), inputs(model)).model
        assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
        assert [b.dtype for b in made.buffers()] == [b.dtype for b in model.buffers()]
        out = greedy(made, inputs(model), 2).past_key_values.layers[0].keys
        assert out.dtype == torch.bfloat16
        assert out.shape[1] == 2


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
        {"do_sample": True, "top_k": 5},
    ],
    ids=lambda s: next(iter(s)),
)
def test_ways_to_generate(name: str, settings: dict[str, Any]) -> None:
    model, reference, made = halved(name)
    given = inputs(model)
    if "prompt_lookup_num_tokens" in settings:
        given = {n: v[1:] for n, v in given.items()}  # one row only
    texts = []
    for one in (reference, made.model):
        torch.manual_seed(0)
        generate: Any = one.generate
        texts.append(generate(**given, **{"do_sample": False} | settings, max_new_tokens=8, pad_token_id=0))
    assert torch.equal(texts[0], texts[1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_compiled_step_of_a_static_cache(name: str) -> None:
    from transformers import StaticCache

    model, reference, made = halved(name)
    ids = inputs(model)["input_ids"][1:]
    outs = []
    for one, wrap in ((reference, lambda m: m), (made.model, compiled)):
        held = StaticCache(config=one.config, max_cache_len=16)
        with torch.no_grad():
            one(ids, past_key_values=held, cache_position=torch.arange(ids.shape[1]))
            step = wrap(one)
            at = torch.tensor([ids.shape[1]])
            outs.append(step(ids[:, :1], past_key_values=held, cache_position=at, position_ids=at[None]).logits)
    assert relative(outs[0], outs[1]) < 1e-5


def compiled(model: PreTrainedModel) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_exported_again(name: str) -> None:
    model, reference, made = halved(name)
    given = {"input_ids": inputs(model)["input_ids"], "attention_mask": inputs(model)["attention_mask"]}
    batch, tokens = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("tokens", min=2, max=32)
    shapes = {n: {0: batch, 1: tokens} for n in given} | {"use_cache": None}
    exported = torch.export.export(
        made.model, (), {**given, "use_cache": False}, dynamic_shapes=shapes, strict=False
    ).module()
    longer = {n: torch.cat([v, v], 1)[:, :13] for n, v in given.items()}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    assert relative(reference(**longer).logits, exported(**longer, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_copies_and_pickles(name: str) -> None:
    _, _, made = halved(name)
    given = inputs(made.model)
    stream = io.BytesIO()
    torch.save(made.model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(made.model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(**given).logits, made.model(**given).logits)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_heads_stay_equal_in_training(name: str) -> None:
    """After some optimiser steps, with checkpointing, what the cache gives is still what there is without one."""
    made = copy.deepcopy(halved(name)[2].model).train()
    made.gradient_checkpointing_enable()
    given = inputs(made)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    optimiser = torch.optim.SGD(made.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = made(**given, labels=labels, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    made.eval()
    made.gradient_checkpointing_disable()
    out = greedy(made, {"input_ids": given["input_ids"]}, 4)
    again = made(out.sequences[:, :-1], use_cache=False).logits[:, -1]
    assert relative(again, out.logits[-1]) < 1e-4


def test_a_wrong_emission_is_told() -> None:
    """Each of these mistakes must be a sentence."""
    model, reference, made = halved("gpt2")
    given = inputs(model)
    hook = next(iter(made.model.transformer.h[0].attn._forward_pre_hooks.values()))
    right = hook.keep, hook.of, hook.whole
    assert differs(reference, made.model, given) is None
    try:
        hook.keep = (2, 0)
        assert "logits differ" in str(differs(reference, made.model, given))
        hook.keep, hook.of = right[0], (0, 1, 0, 1)
        assert "logits differ" in str(differs(reference, made.model, given))
        hook.of, hook.whole = right[1], ()
        assert "run fails" in str(differs(reference, made.model, given))
    finally:
        hook.keep, hook.of, hook.whole = right


def test_refusals_are_sentences() -> None:
    model, sites = ALL["gpt2"]()
    tensors = tensors_of(model)
    lost = replace(sites[0], out=Refusal("no output projection was found"))
    turned = keep(sites[0], 2, gather(sites[0], tensors), (1, 0, 2, 3))
    made = emit(model, {lost.name: (lost, turned)}, inputs(model))
    assert made.refused == {lost.name: "its heads cannot be permuted: no output projection was found"}
    twice = replace(sites[0], name="transformer.h.0.attn#2")
    both = changes(model, [sites[0], twice], 2)
    assert "also serves transformer.h.0.attn#2" in emit(model, both, inputs(model)).refused[sites[0].name]


@pytest.mark.parametrize("name", ALL)
def test_forecast_without_weights(name: str) -> None:
    model, sites = ALL[name]()
    given = changes(model, sites, 2)
    empty = copy.deepcopy(model).to("meta")
    forms = forecast(empty, {n: (site, new.site) for n, (site, new) in given.items()})
    expected = "stock" if name in STOCK else "grouped or view"
    assert {form for form, _ in forms.values()} == {expected}
    assert all(why for form, why in forms.values() if form != "stock")
