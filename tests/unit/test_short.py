"""A model cut short holds a site of every kind, few tokens, and the true weights."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from rewrite.checkpoint import require_checkpoint
from rewrite.errors import Refused
from rewrite.short import VOCABULARY, aliases, fill, shortened
from rewrite.source import build

QWEN = Path(__file__).parents[2] / "examples" / "models" / "qwen3"


def full(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


def test_as_few_layers_as_hold_what_is_needed():
    config = Gemma2Config(
        vocab_size=5000, hidden_size=16, intermediate_size=16, num_hidden_layers=7, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=4000,
        layer_types=["sliding_attention", "full_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    model = full(Gemma2ForCausalLM, config)
    made = shortened(model, {"model.layers.2.self_attn.q_proj.weight"})
    assert made.config.num_hidden_layers == 3
    assert made.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert made.get_parameter("model.embed_tokens.weight").shape == (VOCABULARY, 16)
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (7, 5000)


def test_the_number_may_have_another_name():
    model = full(GPT2LMHeadModel, GPT2Config(n_layer=5, n_embd=16, n_head=2, vocab_size=900, n_positions=32))
    made = shortened(model, {"transformer.h.0.attn.c_attn.weight"})
    assert made.config.n_layer == 1
    assert made.get_parameter("transformer.wte.weight").shape == (VOCABULARY, 16)


def test_it_has_the_weights_of_the_files():
    source = AutoModelForCausalLM.from_pretrained(QWEN, dtype=torch.float32)
    made = shortened(build(QWEN), {"model.layers.1.self_attn.q_proj.weight"})
    fill(made, require_checkpoint(QWEN))
    ids = torch.arange(20).view(2, 10) + 3
    with torch.no_grad():
        hidden = source.model(ids, output_hidden_states=True).hidden_states[2]
        logits = made(ids).logits
    assert logits.shape[-1] == VOCABULARY
    expected = source.lm_head(source.model.norm(hidden))[..., :VOCABULARY]
    assert torch.allclose(logits, expected, atol=1e-4)
    assert len(set(aliases(made)["lm_head.weight"])) == 2, "what is tied stays tied"


def test_files_that_name_tensors_otherwise_are_refused(tmp_path: Path):
    source = AutoModelForCausalLM.from_pretrained(QWEN)
    source.model.save_pretrained(tmp_path / "base")
    with pytest.raises(Refused, match="which in the files is missing"):
        fill(shortened(build(QWEN), {"model.layers.0.self_attn.q_proj.weight"}), require_checkpoint(tmp_path / "base"))
