"""A smaller latent of a model that caches one: the laws of latents, and nothing expanded while decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, StaticCache

from passes.convert import named_tensors
from passes.emit import forecast
from passes.find import find
from passes.mla import MLA
from passes.plan import make_plan
from passes.verdict import next_target
from rewrite import convert
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


def test_the_plan_offers_what_is_not_refused() -> None:
    model, given, _ = found("deepseek_v3-sdpa")
    program = capture(model, given, dynamic=False)
    sites = find(program.static)
    text = str(make_plan(model, program, sites, {}))
    assert text.splitlines()[-1].endswith("--to mla:cache=0.5")
    assert next_target(sites.sites, generates=True) == "mla:cache=0.5"
    assert next_target(sites.sites, generates=False) is None


def test_it_says_that_the_projection_which_is_read_no_more_stays() -> None:
    model, _, emitted = made("deepseek_v3-sdpa", HALF)
    sites = found("deepseek_v3-sdpa")[2]
    forms = forecast(model, {s.name: (s, HALF.after(s)) for s in sites})
    for site in sites:
        form, why = forms[site.name]
        assert form == "latent"
        assert "; kv_b_proj.weight stays in the file" in why
        assert emitted.why[site.name][0] in why
    held = dict(emitted.model.named_parameters())
    assert sum(n.endswith(".kv_b_proj.weight") for n in held) == len(sites)


EASY = 1
"""The layer whose latent comes from two numbers of a token."""


def test_a_total_goes_where_it_is_missed() -> None:
    config = DeepseekV3Config(**{**TEXT, **SIZES, "first_k_dense_replace": 2})
    torch.manual_seed(0)
    source: Any = settled(DeepseekV3ForCausalLM(config))
    with torch.no_grad():
        for layer in source.model.layers:
            layer.self_attn.o_proj.weight.mul_(4)
        weight = source.model.layers[EASY].self_attn.kv_a_proj_with_mqa.weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((u[:, :2] * s[:2]) @ v[:2])
    rows = torch.randint(1, 128, (24, 24), generator=torch.Generator().manual_seed(1))
    done = convert(source, MLA(cache=0.5, polish=0), calibration=rows, length=24, check=False)
    ranks = [row.cache_after for row in done.rewrite_report.sites]
    assert sum(ranks) == 40
    assert ranks[EASY] < 15 < 25 < ranks[0]
    out = done.generate(rows[:2, :8], do_sample=False, max_new_tokens=5, pad_token_id=0, return_dict_in_generate=True)
    assert cache_bytes(out.past_key_values) == 40 * 12 * 2 * 4
    again = done(out.sequences[:, :-1], use_cache=False).logits[:, 7:].argmax(-1)
    assert torch.equal(out.sequences[:, 8:], again)
