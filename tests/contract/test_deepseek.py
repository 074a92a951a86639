"""Latent attentions in the stock class: equal to the oracle in every form, and refused where the class cannot."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, PreTrainedModel

from rewrite.emit.deepseek import Stock, deepseek
from rewrite.emit.reading import for_older_readers
from rewrite.emit.validate import cache_bytes, greedy, relative
from rewrite.site import Site
from tests.contract.by_latent import Changes, changed, cut, exact, llama, oracle
from tests.sites import half_rope

LIMIT = 1e-5
IDS = (3 + torch.arange(30) * 37 % 90).view(2, 15)


def stock(model: PreTrainedModel, changes: Changes, **more: Any) -> Stock:
    made = deepseek(model, changes, **more)
    assert isinstance(made, Stock), made
    assert type(made.model) is DeepseekV3ForCausalLM
    return made


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def whole(model: PreTrainedModel, sites: list[Site]) -> Changes:
    return changed(model, {s.name: (s, exact(s)) for s in sites})


@pytest.mark.parametrize("engines", [False, True])
@pytest.mark.parametrize(("eps", "tie"), [(1e-6, True), (1e-6, False), (1e-5, True), (1e-5, False)])
def test_one_kv_head_is_held_exactly(eps: float, tie: bool, engines: bool, tmp_path: Path) -> None:
    model, sites = llama(1, rms_norm_eps=eps, tie_word_embeddings=tie)
    made = stock(model, whole(model, sites), engines=engines).model
    made.save_pretrained(tmp_path)
    for_older_readers(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is DeepseekV3ForCausalLM
    assert not any(info.values())
    assert relative(logits(model), logits(loaded)) < LIMIT
    expected, found = (greedy(m, {"input_ids": IDS}, 8) for m in (model, loaded))
    assert torch.equal(expected.sequences, found.sequences)
    numbers = 256 + 64 if engines else 16 + 16
    tokens = expected.sequences.shape[1] - 1
    assert cache_bytes(found.past_key_values) == numbers * tokens * len(IDS) * len(sites) * 4
    assert loaded.config.rms_norm_eps == 1e-6
    assert loaded.config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_several_kv_heads_are_held_exactly_by_repeated_frequencies(kv_heads: int, tmp_path: Path) -> None:
    model, sites = llama(kv_heads, rms_norm_eps=1e-5)
    made = stock(model, whole(model, sites))
    made.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative(logits(model), logits(loaded)) < LIMIT
    assert loaded.config.qk_rope_head_dim == 16 * kv_heads
    assert any("longrope" in note for note in made.notes)
    held = greedy(loaded, {"input_ids": IDS}, 4).past_key_values
    assert cache_bytes(held) == cache_bytes(greedy(model, {"input_ids": IDS}, 4).past_key_values)


EVEN = [0, 2, 4, 6]
CASES = {
    "mha": (4, {}, [40, 40], [EVEN, EVEN], False),
    "gqa": (2, {"rms_norm_eps": 1e-5}, [24, 24], [[0, 1, 2], [0, 1, 2]], False),
    "layers differ": (2, {}, [24, 9], [[0, 1, 2, 3], [2, 0]], False),
    "irregular": (4, {"tie_word_embeddings": True}, [17, 17], [[1, 2, 6], [5]], False),
    "nothing turns": (2, {}, [24, 24], [[], []], False),
    "one turns": (2, {}, [24, 24], [[3], []], False),
    "engines": (4, {"rms_norm_eps": 1e-5}, [40, 40], [EVEN, EVEN], True),
    "engines, layers differ": (2, {"tie_word_embeddings": True}, [24, 9], [[1, 5, 3], [7]], True),
    "engines, nothing turns": (2, {}, [24, 24], [[], []], True),
}


@pytest.mark.parametrize("name", CASES)
def test_lossy_latents_are_what_the_oracle_says(name: str) -> None:
    kv_heads, more, ranks, pairs, engines = CASES[name]
    model, sites = llama(kv_heads, **more)
    changes = cut(model, sites, ranks, pairs)
    made = stock(model, changes, engines=engines)
    with oracle(model, changes) as reference:
        expected = logits(reference)
        texts = [m.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=c, pad_token_id=0)
                 for m, c in ((reference, False), (made.model, True))]  # fmt: skip
    assert relative(expected, logits(model)) > 1e-3, "the latents lose nothing, so nothing is tested"
    assert relative(expected, logits(made.model)) < LIMIT
    assert torch.equal(*texts)
    config = made.model.config
    distinct = {j for some in pairs for j in some}
    widths = (256, 64) if engines else (max(ranks), 2 * max(1, len(distinct)))
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == widths
    if ranks[0] != ranks[1] and not engines:
        assert f"rank {min(ranks)} to {max(ranks)} padded with zeros to {max(ranks)}" in made.notes


@pytest.mark.parametrize("engines", [False, True])
def test_padding_kernels_and_a_training_step(engines: bool) -> None:
    model, sites = llama(2)
    made = stock(model, cut(model, sites, [24, 24], [EVEN, EVEN]), engines=engines).model
    ids = torch.cat([torch.zeros(2, 4, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    for kernel in ("eager", "sdpa"):
        made.set_attn_implementation(kernel)
        with torch.no_grad():
            padded = made(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 4:]
        assert relative(logits(made), padded) < LIMIT
    loss = made(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_scaled_latents_stay_in_the_range_where_the_norm_is_linear() -> None:
    """A latent has no unit of its own: what is written a million times larger is read a million times smaller."""
    model, sites = llama(2)
    changes = cut(model, sites, [24, 24], [EVEN, EVEN])
    expected = logits(stock(model, changes).model)
    for factor in (1e6, 1e-6):
        scaled: Changes = {}
        for name, (site, new) in changes.items():
            assert new.latents is not None
            old = new.latents
            latents = replace(old, down=old.down * factor, read=old.read / factor, up_v=old.up_v / factor)
            scaled[name] = (site, replace(new, latents=latents))
        assert relative(expected, logits(stock(model, scaled).model)) < LIMIT


def test_large_latents_do_not_reach_the_norm() -> None:
    """A layer's input a thousand times larger than usual: what tells 2^-36 from a scale that is merely small."""
    model, sites = llama(1)
    with torch.no_grad():
        for site in sites:
            model.get_submodule(site.name.replace("self_attn", "input_layernorm")).weight *= 1e3
            model.get_submodule(f"{site.name}.q_proj").weight *= 1e-6
            model.get_submodule(f"{site.name}.o_proj").weight *= 1e-3
    assert relative(logits(model), logits(stock(model, whole(model, sites)).model)) < LIMIT


def test_backward_and_idle_channels() -> None:
    """A pair that turns backwards is mirrored; one that no query reaches takes no room."""
    model, sites = llama(2)
    changes = cut(model, sites, [24, 24], [EVEN, EVEN])
    expected = logits(stock(model, changes).model)
    other: Changes = {}
    for name, (site, new) in changes.items():
        assert new.latents is not None
        old = new.latents
        swap = [1, 0, *range(2, old.rope_dim)]
        frequencies = torch.cat([-old.frequencies[:1], old.frequencies[1:], old.frequencies.new_tensor([0.123])])
        turn = torch.cat([old.turn[swap], old.turn[:2]])
        queries = torch.cat([old.query_turn[:, swap], torch.zeros_like(old.query_turn[:, :2])], 1)
        latents = replace(old, turn=turn, query_turn=queries, frequencies=frequencies)
        other[name] = (site, replace(new, latents=latents))
    with oracle(model, other) as reference:
        assert relative(expected, logits(reference)) < LIMIT
    made = stock(model, other).model
    assert relative(expected, logits(made)) < LIMIT
    assert made.config.qk_rope_head_dim == 8


def test_another_scale_is_folded() -> None:
    more = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
    model, sites = llama(1, "Granite", attention_multiplier=0.7, **more)
    changes = whole(model, [replace(s, scale=(0.7,)) for s in sites])
    assert relative(logits(model), logits(stock(model, changes).model)) < LIMIT


SCALED = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rotations_are_told_to_transformers_alone(name: str, tmp_path: Path) -> None:
    model, sites = llama(1, rope_parameters={"rope_type": name, "rope_theta": 10_000.0, **SCALED[name]})
    turns: Any = model.model.rotary_emb
    rope = replace(half_rope(16), frequencies=turns.inv_freq.double().numpy())
    scale = (0.25 * turns.attention_scaling**2,)
    sites = [replace(s, q=replace(s.q, rope=rope), k=replace(s.k, rope=rope), scale=scale) for s in sites]
    changes = whole(model, sites)
    stock(model, changes).model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    long = (3 + torch.arange(60) * 37 % 90)[None]
    assert relative(logits(model, long), logits(loaded, long)) < LIMIT
    assert "engines turn 32 pairs by the powers of one number" in str(deepseek(model, changes, engines=True))


def test_bfloat16_is_as_good_as_the_source_in_bfloat16() -> None:
    model, sites = llama(1, rms_norm_eps=1e-5)
    made = stock(model, whole(model, sites), engines=True).model
    expected = logits(model)
    source, low = (copy.deepcopy(m).bfloat16() for m in (model, made))
    assert relative(expected, logits(low)) < 3 * relative(expected, logits(source)) < 0.2
    low_model, low_sites = llama(1)
    low_model.bfloat16().config.dtype = torch.bfloat16
    given = stock(low_model, whole(low_model, low_sites)).model
    assert {p.dtype for p in given.parameters()} == {torch.float32}
    assert given.config.dtype == torch.bfloat16


def test_the_original_is_not_touched() -> None:
    model, sites = llama(2, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model.generation_config.top_k = 7
    before, config = {n: t.clone() for n, t in model.state_dict().items()}, model.config.to_dict()
    made = stock(model, cut(model, sites, [24, 24], [EVEN, EVEN])).model
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.config.to_dict() == config
    assert made.generation_config is not model.generation_config
    assert made.generation_config.to_dict() == model.generation_config.to_dict()


def test_notes_tell_what_was_done() -> None:
    model, sites = llama(2, rms_norm_eps=1e-5, tie_word_embeddings=True)
    notes = "; ".join(stock(model, cut(model, sites, [24, 9], [EVEN, EVEN]), engines=True).notes)
    for part in (
        "never float16",
        "rank 9 to 24 padded with zeros to 256",
        "rotated channels 8 padded with zeros to 64",
        "key width 16 padded with zeros to 128",
        "value width 16 padded with zeros to 128",
        "residual stream scaled by 0.3162: rms_norm_eps 1e-05 is 1e-06",
        "the output head, tied in the source, is a tensor of its own",
    ):
        assert part in notes
    model, sites = llama(2)
    (_, width) = stock(model, cut(model, sites, [24, 24], [EVEN, EVEN])).notes
    assert "24 + 8 cached numbers: vLLM and SGLang take 256 or 512 + 64" in width
