"""A smaller latent of a model that caches one: the laws of latents, and nothing expanded while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, StaticCache

from passes.convert import named_tensors
from passes.find import find
from passes.mla import MLA
from passes.plan import make_plan
from rewrite.capture import capture
from rewrite.emit import emit_latent
from rewrite.emit.choose import padded
from rewrite.emit.validate import cache_bytes, differs_in_logits, greedy, relative
from rewrite.layout import gather
from tests.contract.test_latent import found, made
from tests.zoo.entry import settled
from tests.zoo.library import MLA as SIZES
from tests.zoo.library import TEXT

KINDS = ("deepseek_v2-sdpa", "deepseek_v3-sdpa", "minicpm3-eager")
"""A complex rope table, interleaved pairs, pairs by halves."""
FULL, HALF = MLA(cache=1.0), MLA(cache=0.5)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_lost_at_the_limit(name: str) -> None:
    model, given, emitted = made(name, FULL)
    assert emitted.refused == {}
    assert differs_in_logits(model, emitted.model, given) is None
    expected, got = greedy(model, given, 12), greedy(emitted.model, given, 12)
    assert torch.equal(expected.sequences, got.sequences)
    assert max(relative(a, b) for a, b in zip(expected.logits, got.logits, strict=True)) <= 1e-5
    assert cache_bytes(got.past_key_values) == cache_bytes(expected.past_key_values)


def test_a_model_whose_queries_have_no_rank_of_their_own() -> None:
    config = DeepseekV3Config(**{**TEXT, **SIZES, "q_lora_rank": None, "first_k_dense_replace": 2})
    torch.manual_seed(0)
    model: Any = settled(DeepseekV3ForCausalLM(config))
    given = padded({"input_ids": torch.randint(1, 128, (2, 9))})
    changes: dict[str, Any] = {}
    for site in find(capture(model, given, dynamic=False).static).sites:
        changes[site.name] = site, FULL.rewrite(site, gather(site, named_tensors(model)), None)
    emitted = emit_latent(model, changes, given)
    assert set(emitted.forms.values()) == {"latent"}
    assert differs_in_logits(model, emitted.model, given) is None


@pytest.mark.parametrize("target", [HALF, MLA(rank=12, rope_dim=4)], ids=["cache", "rank"])
@pytest.mark.parametrize("name", KINDS[:2])
def test_what_is_cached_is_what_is_planned(name: str, target: MLA) -> None:
    model, given, emitted = made(name, target)
    _, _, sites = found(name)
    expected, got = greedy(model, given, 6).past_key_values, greedy(emitted.model, given, 6).past_key_values
    tokens = got.layers[0].keys.shape[2] * len(given["input_ids"]) * 4
    assert cache_bytes(expected) == tokens * sum(s.cache_per_token for s in sites) == tokens * 2 * 40
    assert cache_bytes(got) == tokens * sum(target.after(s).cache_per_token for s in sites)
    assert relative(model(**given).logits, emitted.model(**given).logits) > 1e-3, "nothing was compressed"


@pytest.mark.parametrize("name", KINDS)
def test_the_cache_says_what_one_forward_says(name: str) -> None:
    _, given, emitted = made(name, HALF)
    out = greedy(emitted.model, given, 6)
    mask = torch.cat([given["attention_mask"], torch.ones(len(given["input_ids"]), 6, dtype=torch.long)], 1)
    whole = emitted.model(input_ids=out.sequences, attention_mask=mask, use_cache=False).logits
    assert relative(whole[:, -7:-1], torch.stack(out.logits, 1)) <= 1e-5


SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_beams": 3},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 2},
    {"use_cache": False},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_way_to_generate(settings: dict[str, Any]) -> None:
    model, given, emitted = made("youtu-sdpa", FULL)
    row = {n: v[1:2] for n, v in given.items() if isinstance(v, torch.Tensor)}
    texts = [
        one.generate(**row, **{"do_sample": False, **settings}, max_new_tokens=8, pad_token_id=0)
        for one in (model, emitted.model)
    ]
    assert torch.equal(texts[0], texts[1])


def test_one_token_is_expanded_however_many_are_held() -> None:
    _, given, emitted = made("youtu-sdpa", HALF)
    seen: list[int] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
        for n, m in emitted.model.named_modules()
        if n.endswith("kv_b_proj")
    ]
    greedy(emitted.model, given, 4)
    emitted.model(**{**given, "use_cache": False})
    for hook in hooks:
        hook.remove()
    assert seen == [1] * len(seen)
    assert len(seen) == 5 * len(hooks) > 0


def test_it_trains_compiles_and_exports() -> None:
    _, given, emitted = made("youtu-sdpa", HALF)
    model, text = emitted.model, {n: v for n, v in given.items() if isinstance(v, torch.Tensor)}
    loss = model(**text, labels=text["input_ids"], use_cache=False).loss
    gradients = torch.autograd.grad(loss, [p for n, p in model.named_parameters() if ".reattn." in n])
    assert all(bool(g.abs().max() > 0) for g in gradients)
    outs: list[Any] = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, backend="eager")):
        held: Any = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(text["input_ids"][1:], past_key_values=held)
            at = torch.tensor([[text["input_ids"].shape[1]]])
            outs.append(wrap(model)(text["input_ids"][1:, :1], past_key_values=held, position_ids=at).logits)
    assert relative(outs[0], outs[1]) <= 1e-5
    shapes = {n: {1: torch.export.Dim("tokens", min=2, max=32)} for n in text} | {"use_cache": None}
    exported = torch.export.export(model, (), {**text, "use_cache": False}, dynamic_shapes=shapes, strict=False)
    longer = {n: torch.cat([v, v], 1)[:, :13] for n, v in text.items()}
    assert relative(model(**longer).logits, exported.module()(**longer, use_cache=False).logits) <= 1e-5


def test_the_plan_says_what_it_caches_now_and_after() -> None:
    model, given, _ = found("deepseek_v3-sdpa")
    program = capture(model, given, dynamic=False)
    sites = find(program.static)
    text = str(make_plan(model, program, sites, {s.name: HALF for s in sites.sites}, spelled=("mla:cache=0.5",)))
    assert "latent 32 + 8 for 4 heads" in text
    assert "latent 14 + 6 for 4 heads" in text
    assert "160 B → 80 B" in text
