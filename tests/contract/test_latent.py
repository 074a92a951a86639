"""A latent in place of keys and values: nothing lost at the limit, less held below it, in every way to run a model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from passes.convert import named_tensors
from passes.find import find
from passes.mla import MLA
from rewrite.capture import capture
from rewrite.emit import Emitted, emit_latent
from rewrite.emit.choose import padded
from rewrite.emit.validate import cache_bytes, differs_in_logits, greedy, relative
from rewrite.heads import Rewritten
from rewrite.layout import gather
from rewrite.site import Site
from tests.contract.exported import run_exported
from tests.zoo import BY_NAME

Made = tuple[PreTrainedModel, dict[str, Any], Emitted]
KINDS = (
    "llama-gqa-sdpa",
    "qwen3-sdpa",
    "olmo2-sdpa",
    "gpt2-sdpa",
    "gemma2-eager",
    "gpt_oss-eager",
    "phi-sdpa",
    "cohere-sdpa",
)
"""Grouped, a norm of a head, of all heads, no rope, a cap and a window, sinks, a rope on some dims, interleaved."""
STILL = ("gpt2-sdpa", "opt-sdpa", "bloom-eager", "mpt-eager", "bart-sdpa", "whisper-sdpa")
"""Nothing rotates: keys and values are a linear function of fewer numbers."""


@cache
def found(name: str) -> tuple[PreTrainedModel, dict[str, Any], tuple[Site, ...]]:
    """A model of the zoo, its padded inputs, and its sites that hold a cache."""
    model, given = BY_NAME[name].build()
    assert isinstance(model, PreTrainedModel)
    assert isinstance(given, dict)
    sites = find(capture(model, given, dynamic=False).static).sites
    return model, padded(given), tuple(s for s in sites if s.cross or not s.mask.table(2, 2)[0, 1])


@cache
def made(name: str, target: MLA) -> Made:
    """The model with every site rewritten from its weights alone."""
    model, given, sites = found(name)
    changes: dict[str, tuple[Site, Rewritten]] = {}
    for site in sites:
        assert target.refuse(site) is None
        changes[site.name] = site, target.rewrite(site, gather(site, named_tensors(model)), None)
    return model, given, emit_latent(model, changes, given)


@pytest.mark.parametrize("form", ["absorbed", "rebuilt"])
@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_lost_at_the_limit(name: str, form: Any) -> None:
    model, given, emitted = made(name, MLA(cache=1.0, form=form))
    assert emitted.refused == {}
    assert differs_in_logits(model, emitted.model, given) is None
    expected, got = greedy(model, given, 20), greedy(emitted.model, given, 20)
    assert torch.equal(expected.sequences, got.sequences)
    assert max(relative(a, b) for a, b in zip(expected.logits, got.logits, strict=True)) <= 1e-5
    assert cache_bytes(got.past_key_values) <= cache_bytes(expected.past_key_values)


@pytest.mark.parametrize("name", STILL)
def test_half_the_cache_loses_nothing_where_nothing_rotates(name: str) -> None:
    model, given, emitted = made(name, MLA(cache=0.5))
    assert emitted.refused == {}
    expected, got = greedy(model, given, 12), greedy(emitted.model, given, 12)
    assert torch.equal(expected.sequences, got.sequences)
    assert max(relative(a, b) for a, b in zip(expected.logits, got.logits, strict=True)) <= 1e-5
    assert 2 * cache_bytes(got.past_key_values) == cache_bytes(expected.past_key_values)


@pytest.mark.parametrize("form", ["absorbed", "rebuilt"])
@pytest.mark.parametrize("name", ["llama-gqa-sdpa", "qwen3-sdpa"])
def test_what_is_cached_is_what_is_planned(name: str, form: Any) -> None:
    target = MLA(cache=0.25, form=form)
    model, given, emitted = made(name, target)
    _, _, sites = found(name)
    out = greedy(emitted.model, given, 6)
    tokens = out.past_key_values.layers[0].keys.shape[2]
    planned = sum(target.after(s).cache_per_token for s in sites)
    assert cache_bytes(out.past_key_values) == planned * tokens * len(given["input_ids"]) * 4
    assert relative(model(**given).logits, emitted.model(**given).logits) > 1e-3, "nothing was compressed"


SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_beams": 3},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 2},
    {"use_cache": False},
    {"num_beams": 2, "do_sample": True},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("target", [MLA(cache=1.0), MLA(cache=1.0, form="rebuilt")], ids=["absorbed", "rebuilt"])
@pytest.mark.parametrize("name", ["llama-gqa-sdpa", "gpt2-sdpa"])
def test_every_way_to_generate(name: str, target: MLA, settings: dict[str, Any]) -> None:
    model, given, emitted = made(name, target)
    row = slice(1, 2) if "prompt_lookup_num_tokens" in settings else slice(None)
    given = {n: v[row] for n, v in given.items() if isinstance(v, torch.Tensor)}
    texts: list[Any] = []
    for one in (model, emitted.model):
        torch.manual_seed(0)
        generate: Any = one.generate
        texts.append(generate(**given, **{"do_sample": False, **settings}, max_new_tokens=10, pad_token_id=0))
    assert torch.equal(texts[0], texts[1])


@pytest.mark.parametrize("target", [MLA(cache=0.25), MLA(cache=0.25, form="rebuilt")], ids=["absorbed", "rebuilt"])
@pytest.mark.parametrize("name", ["llama-gqa-sdpa", "qwen3-eager"])
def test_the_cache_says_what_one_forward_says(name: str, target: MLA) -> None:
    """Expanded for many queries, absorbed for one: the same numbers, with padding and without."""
    _, given, emitted = made(name, target)
    out = greedy(emitted.model, given, 6)
    ones = torch.ones(len(given["input_ids"]), 6, dtype=torch.long)
    mask = torch.cat([given["attention_mask"], ones], 1)
    whole = emitted.model(input_ids=out.sequences, attention_mask=mask, use_cache=False).logits
    steps = torch.stack(out.logits, 1)
    assert relative(whole[:, -7:-1], steps) <= 1e-5


def test_copies_train_and_export() -> None:
    model, given, emitted = made("llama-gqa-sdpa", MLA(cache=0.5))
    twin = copy.deepcopy(emitted.model)
    assert torch.equal(twin(**given).logits, emitted.model(**given).logits)
    twin.train()
    twin(**given, labels=given["input_ids"]).loss.backward()
    own = [p for n, p in twin.named_parameters() if ".reattn." in n]
    assert len(own) >= 3 * model.config.num_hidden_layers
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in own if p.numel())
    twin.eval()
    expected, exported = run_exported(twin, given)
    assert relative(expected, exported) <= 1e-5


@pytest.mark.parametrize("form", ["absorbed", "rebuilt"])
def test_compiled_step_of_a_static_cache(form: Any) -> None:
    from transformers import StaticCache

    _, given, emitted = made("llama-gqa-sdpa", MLA(cache=0.5, form=form))
    ids = given["input_ids"][1:]
    outs: list[Any] = []
    for wrap in (lambda m: m, _compiled):
        held: Any = StaticCache(config=emitted.model.config, max_cache_len=16)
        with torch.no_grad():
            emitted.model(ids, past_key_values=held)
            at = torch.tensor([[ids.shape[1]]])
            outs.append(wrap(emitted.model)(ids[:, :1], past_key_values=held, position_ids=at).logits)
    assert relative(outs[0], outs[1]) <= 1e-5


def _compiled(model: Any) -> Any:
    torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage]
    return torch.compile(model, fullgraph=True, backend="eager")


def test_a_module_that_asks_for_no_kernel_is_refused_under_a_rope() -> None:
    _, _, emitted = made("gptj-eager", MLA(cache=0.5))
    assert set(emitted.forms) == set()
    assert all("computes its attention itself" in why for why in emitted.refused.values())
