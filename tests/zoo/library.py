"""Model types of transformers, made tiny with random weights: two layers, width 64, four heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from rewrite.examples import propose
from tests.zoo.entry import Call, Entry, settled

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "head_dim": 8,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip


def tiny(config: Any, model: str, attention: str) -> Call:
    """The model with noise on every weight, and the inputs that its own signature and config ask for."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    made: nn.Module = settled(getattr(transformers, model)(config))
    failure: Exception | None = None
    for example in propose(made):
        try:
            with torch.no_grad():
                made(**example.kwargs)
        except Exception as error:
            failure = failure or error
        else:
            return made, example.kwargs
    raise RuntimeError(f"no example inputs fit {model}") from failure


def flat(config: str, model: str, base: dict[str, Any], more: dict[str, Any], attention: str) -> Call:
    return tiny(getattr(transformers, config)(**{**base, **more}), model, attention)


def entries(
    family: str, base: dict[str, Any], rows: list[tuple[str, str, str, dict[str, Any]]], only: dict[str, str]
) -> list[Entry]:
    """Every row with both attention implementations, but where `only` names the one that it has."""
    return [
        Entry(family, f"{name}-{attention}", partial(flat, config, model, base, more, attention))
        for name, config, model, more in rows
        for attention in ("sdpa", "eager")
        if only.get(name, attention) == attention
    ]
