"""Fewer keys: nothing lost at the site's own mask, an eager oracle below it, in every way to run a model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from passes.convert import named_tensors
from passes.find import find
from passes.sparse import BlockSparse
from rewrite.capture import capture
from rewrite.emit import Emitted, emit_sparse
from rewrite.emit.choose import padded
from rewrite.emit.sparse import looks_back, masked
from rewrite.emit.validate import cache_bytes, differs_in_logits, greedy, relative
from rewrite.heads import Rewritten
from rewrite.layout import gather
from rewrite.mask import causal, neighbourhood, streaming, window
from rewrite.site import Site
from tests.contract.exported import run_exported
from tests.zoo import BY_NAME

Made = tuple[PreTrainedModel, dict[str, Any], Emitted, dict[str, tuple[Site, Rewritten]]]
KINDS = ("llama-gqa-sdpa", "qwen3-sdpa", "olmo2-sdpa", "gpt2-sdpa", "gemma2-eager", "gpt_oss-eager", "phi-sdpa",
         "opt-sdpa")  # fmt: skip
"""Grouped, a norm of a head, of all heads, no rope, a cap and a window, sinks, a rope on some dims, dropout."""
ENCODERS = ("bert-sdpa", "vit-eager", "bart-sdpa", "whisper-sdpa", "t5-eager")
MIXED = BlockSparse(streaming([1, 1, 0, 0], [2, 2, None, None]))
NARROW = BlockSparse(window=3, sink=1)


@cache
def found(name: str) -> tuple[PreTrainedModel, dict[str, Any], tuple[Site, ...]]:
    model, given = BY_NAME[name].build()
    assert isinstance(model, PreTrainedModel)
    assert isinstance(given, dict)
    return model, padded(given), find(capture(model, given, dynamic=False).static).sites


@cache
def made(name: str, target: BlockSparse | None) -> Made:
    """The model with every site rewritten from its weights alone; None is the setting that loses nothing."""
    model, given, sites = found(name)
    changes: dict[str, tuple[Site, Rewritten]] = {}
    for site in sites:
        own = target or BlockSparse(window=1).lossless(site)
        if own.refuse(site) is None:
            changes[site.name] = site, own.rewrite(site, gather(site, named_tensors(model)), None)
    assert changes
    return model, given, emit_sparse(model, changes, given), changes


@pytest.mark.parametrize("name", [*KINDS, *ENCODERS])
def test_nothing_is_lost_at_the_limit(name: str) -> None:
    model, given, emitted, _ = made(name, None)
    assert emitted.refused == {}
    assert differs_in_logits(model, emitted.model, given) is None
    if model.can_generate():
        expected, got = greedy(model, given, 12), greedy(emitted.model, given, 12)
        assert torch.equal(expected.sequences, got.sequences)
        assert cache_bytes(got.past_key_values) == cache_bytes(expected.past_key_values)


@pytest.mark.parametrize("name", [*KINDS, *ENCODERS])
def test_it_is_the_model_whose_kernel_is_given_the_masks(name: str) -> None:
    model, given, emitted, changes = made(name, NARROW)
    assert emitted.refused == {}
    reference = copy.deepcopy(model)
    with masked(reference, {n: (old, new.site.mask) for n, (old, new) in changes.items()}, given):
        assert differs_in_logits(reference, emitted.model, given) is None
    assert differs_in_logits(model, emitted.model, given) is not None, "nothing was hidden"


@pytest.mark.parametrize("target", [NARROW, MIXED], ids=["alike", "by head"])
@pytest.mark.parametrize("name", ["llama-gqa-sdpa", "llama-gqa-eager", "gpt2-sdpa"])
def test_the_cache_says_what_one_forward_says_and_holds_what_is_planned(name: str, target: BlockSparse) -> None:
    """With padding on the left, over many steps in which tokens are dropped."""
    _, given, emitted, changes = made(name, target)
    steps = 20
    out = greedy(emitted.model, given, steps)
    ones = torch.ones(len(given["input_ids"]), steps, dtype=torch.long)
    mask = torch.cat([given["attention_mask"], ones], 1)
    at = (mask.cumsum(1) - 1).clamp(0)
    whole = emitted.model(input_ids=out.sequences, attention_mask=mask, position_ids=at, use_cache=False).logits
    assert relative(whole[:, -steps - 1 : -1], torch.stack(out.logits, 1)) <= 1e-5
    tokens = out.sequences.shape[1] - 1
    numbers = sum(new.site.cache_per_token * tokens + new.site.cache_fixed for _, new in changes.values())
    assert cache_bytes(out.past_key_values) == numbers * len(given["input_ids"]) * 4
    assert numbers < sum(old.cache_per_token * tokens for old, _ in changes.values())


def test_a_text_in_pieces_is_the_text() -> None:
    _, _, emitted, _ = made("llama-gqa-sdpa", MIXED)
    ids = torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    cache, parts = DynamicCache(config=emitted.model.config), list[torch.Tensor]()
    with torch.no_grad():
        for piece in ids.split([9, 1, 7, 1, 1, 11], 1):
            parts.append(emitted.model(piece, past_key_values=cache).logits)
        assert relative(emitted.model(ids).logits, torch.cat(parts, 1)) <= 1e-5
    assert cache.get_seq_length() == 30


def test_queries_in_tiles_and_by_the_operator_are_queries_at_once() -> None:
    """A text of several tiles: by the operator, by torch's own attention tile by tile, padded, and by the oracle."""
    model, _, emitted, changes = made("llama-gqa-sdpa", BlockSparse(streaming([4, 4, 0, 0], [40, 40, 300, 300])))
    ids = torch.randint(3, 90, (2, 600), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :290] = 0
    reference, plain = copy.deepcopy(model), copy.deepcopy(emitted.model)
    for module in plain.modules():
        if hasattr(module, "reattn"):
            module.reattn.algebra = None
    with torch.no_grad():
        for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
            with masked(reference, {n: (old, new.site.mask) for n, (old, new) in changes.items()}, given):
                expected = reference(**given).logits
            for one in (emitted.model, plain):
                got = one(**given).logits
                keep = mask.bool() if "attention_mask" in given else torch.ones_like(mask).bool()
                assert relative(expected[keep], got[keep]) <= 1e-5


SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_beams": 3},
    {"use_cache": False},
    {"num_beams": 2, "do_sample": True},
    {"cache_implementation": "static"},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_way_to_generate(settings: dict[str, Any]) -> None:
    """At the limit the original's text; where tokens are dropped, the text without a cache."""
    model, given, emitted, _ = made("llama-gqa-sdpa", None)
    given = {n: v for n, v in given.items() if isinstance(v, torch.Tensor)}
    bounded = made("llama-gqa-sdpa", MIXED)[2].model
    pairs = [((model, settings), (emitted.model, settings))]
    pairs += [((bounded, {**settings, "use_cache": False, "cache_implementation": None}), (bounded, settings))]
    for pair in pairs:
        texts: list[Any] = []
        for one, own in pair:
            torch.manual_seed(0)
            generate: Any = one.generate
            texts.append(generate(**given, **{"do_sample": False, **own}, max_new_tokens=10, pad_token_id=0))
        assert torch.equal(texts[0], texts[1])


def test_what_cannot_be_taken_back_is_refused() -> None:
    bounded, given = made("llama-gqa-sdpa", MIXED)[2].model, made("llama-gqa-sdpa", MIXED)[1]
    generate: Any = bounded.generate
    with pytest.raises(ValueError, match="cannot be taken back"):
        generate(given["input_ids"][1:], max_new_tokens=8, pad_token_id=0, prompt_lookup_num_tokens=2)


def test_a_kernel_without_masks_by_head_is_refused() -> None:
    bounded = copy.deepcopy(made("llama-gqa-sdpa", MIXED)[2].model)
    bounded.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="takes no mask by head"):
        bounded(torch.tensor([[5, 6, 7]]))


def test_copies_train_export_and_compile() -> None:
    _, given, emitted, _ = made("llama-gqa-sdpa", NARROW)
    twin = copy.deepcopy(emitted.model)
    assert torch.equal(twin(**given).logits, emitted.model(**given).logits)
    twin.train()
    twin(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in twin.parameters())
    twin.eval()
    expected, exported = run_exported(twin, given)
    assert relative(expected, exported) <= 1e-5
    torch._dynamo.reset()
    compiled: Any = torch.compile(twin, fullgraph=True, backend="eager")
    assert relative(twin(given["input_ids"]).logits, compiled(given["input_ids"], use_cache=False).logits) <= 1e-5


def test_a_module_that_asks_for_no_kernel_is_refused() -> None:
    model, given, sites = found("gptj-eager")
    changes = {s.name: (s, NARROW.rewrite(s, gather(s, named_tensors(model)), None)) for s in sites}
    emitted = emit_sparse(model, changes, given)
    assert emitted.forms == {}
    assert all("computes its attention itself" in why for why in emitted.refused.values())


def test_patches_of_an_image_read_their_neighbours() -> None:
    """A class token reads all and is read by all."""
    model, given, sites = found("vit-eager")
    patches = (model.config.image_size // model.config.patch_size,) * 2
    near = neighbourhood((2, 2), patches, 1) | ~(window(1) | ~window(1))
    from rewrite.mask import global_

    target = BlockSparse(near | global_(1))
    assert all(target.refuse(s) is None and not looks_back(s) for s in sites)
    changes = {s.name: (s, target.rewrite(s, gather(s, named_tensors(model)), None)) for s in sites}
    emitted = emit_sparse(model, changes, given)
    assert emitted.refused == {}
    assert differs_in_logits(model, emitted.model, given) is not None


def test_a_wider_mask_than_the_window_of_its_source_is_no_mask_of_it() -> None:
    _, _, sites = found("gemma2-eager")
    narrow = next(s for s in sites if "window" in str(s.mask))
    reason = BlockSparse(causal & window(64)).refuse(narrow)
    assert reason is not None
    assert "which the site's own mask" in reason
