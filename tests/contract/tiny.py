"""Tiny random transformers with their attention written down by hand: what emission is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from rewrite.site import Site
from tests.contract.by_hand import site, with_row_norm, with_sink

Made = tuple[PreTrainedModel, list[Site]]
H, LAYERS, HEADS = 64, 2, 4
LLAMA: dict[str, Any] = {"hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": 99}
LLAMA |= {"num_key_value_heads": HEADS, "intermediate_size": 48, "pad_token_id": 0, "max_position_embeddings": 64}
BART: dict[str, Any] = {"d_model": H, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "vocab_size": 99}
BART |= {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "pad_token_id": 0, "eos_token_id": 2}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 2}


def settled(config: Any, kind: str) -> PreTrainedModel:
    """Built with noise on every vector, or ones and zeros would hide what is not carried over."""
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def apart(kind: str, config: Any, where: str, names: str, alter: Callable[[Site, str], Site] | None = None) -> Made:
    """A decoder with separate projections, `names` "q k v o", in modules `where`."""
    model = settled(config, kind)
    paths = [where.format(i) for i in range(LAYERS)]
    found = [site(model, p, *names.split(), HEADS, HEADS, "apart") for p in paths]
    return model, [alter(s, s.name) for s in found] if alter else found


def llama() -> Made:
    return apart("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA), "model.layers.{}.self_attn", PROJ)


def qwen3() -> Made:
    config = transformers.Qwen3Config(**LLAMA, head_dim=16)
    return apart("Qwen3ForCausalLM", config, "model.layers.{}.self_attn", PROJ)


def olmo2() -> Made:
    config = transformers.Olmo2Config(**LLAMA)
    norm: Callable[[Site, str], Site] = lambda s, p: with_row_norm(s, f"{p}.k_norm.weight")  # noqa: E731
    return apart("Olmo2ForCausalLM", config, "model.layers.{}.self_attn", PROJ, norm)


def gpt_oss() -> Made:
    config = transformers.GptOssConfig(**LLAMA, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    sink: Callable[[Site, str], Site] = lambda s, p: with_sink(s, f"{p}.sinks")  # noqa: E731
    return apart("GptOssForCausalLM", config, "model.layers.{}.self_attn", PROJ, sink)


def opt() -> Made:
    config = transformers.OPTConfig(
        hidden_size=H, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=48, vocab_size=99,
        word_embed_proj_dim=H, max_position_embeddings=64, dropout=0.1, pad_token_id=0,
    )  # fmt: skip
    return apart("OPTForCausalLM", config, "model.decoder.layers.{}.self_attn", "q_proj k_proj v_proj out_proj")


def gptj() -> Made:
    config = transformers.GPTJConfig(
        n_embd=H, n_layer=LAYERS, n_head=HEADS, rotary_dim=8, vocab_size=99, n_positions=64
    )
    return apart("GPTJForCausalLM", config, "transformer.h.{}.attn", "q_proj k_proj v_proj out_proj")


def _fused(kind: str, config: Any, where: str, qkv: str, out: str, layout: str) -> Made:
    model = settled(config, kind)
    return model, [site(model, where.format(i), qkv, qkv, qkv, out, HEADS, HEADS, layout) for i in range(LAYERS)]


def gpt2() -> Made:
    config = transformers.GPT2Config(n_embd=H, n_layer=LAYERS, n_head=HEADS, vocab_size=99, n_positions=64)
    return _fused("GPT2LMHeadModel", config, "transformer.h.{}.attn", "c_attn", "c_proj", "blocks")


def phi3() -> Made:
    config = transformers.Phi3Config(**LLAMA)
    return _fused("Phi3ForCausalLM", config, "model.layers.{}.self_attn", "qkv_proj", "o_proj", "blocks")


def neox() -> Made:
    config = transformers.GPTNeoXConfig(
        hidden_size=H, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48, vocab_size=99
    )
    return _fused("GPTNeoXForCausalLM", config, "gpt_neox.layers.{}.attention", "query_key_value", "dense", "turns")


def bloom() -> Made:
    config = transformers.BloomConfig(hidden_size=H, n_layer=LAYERS, n_head=HEADS, vocab_size=99, pad_token_id=0)
    where = "transformer.h.{}.self_attention"
    return _fused("BloomForCausalLM", config, where, "query_key_value", "dense", "turns")


def mpt() -> Made:
    config = transformers.MptConfig(d_model=H, n_layers=LAYERS, n_heads=HEADS, vocab_size=99, max_seq_len=64)
    return _fused("MptForCausalLM", config, "transformer.blocks.{}.attn", "Wqkv", "out_proj", "blocks")


def bart() -> Made:
    model = settled(transformers.BartConfig(**BART), "BartForConditionalGeneration")
    names = "q_proj k_proj v_proj out_proj".split()
    places = ["encoder.layers.{}.self_attn", "decoder.layers.{}.self_attn", "decoder.layers.{}.encoder_attn"]
    return model, [site(model, f"model.{p}".format(i), *names, HEADS, HEADS, "apart") for p in places for i in (0, 1)]


def t5() -> Made:
    config = transformers.T5Config(
        d_model=H, num_layers=LAYERS, num_decoder_layers=LAYERS, num_heads=HEADS, d_kv=16, d_ff=48, vocab_size=99,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = settled(config, "T5ForConditionalGeneration")
    places = ["encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention"]
    places.append("decoder.block.{}.layer.1.EncDecAttention")
    return model, [site(model, p.format(i), *"qkvo", HEADS, HEADS, "apart") for p in places for i in (0, 1)]


PROJ = "q_proj k_proj v_proj o_proj"
STOCK: dict[str, Callable[[], Made]] = {
    "llama": llama,
    "qwen3": qwen3,
    "olmo2": olmo2,
    "gpt_oss": gpt_oss,
    "phi3": phi3,
}
GROUPED: dict[str, Callable[[], Made]] = {"gpt2": gpt2, "opt": opt, "neox": neox, "bart": bart, "t5": t5}
VIEW: dict[str, Callable[[], Made]] = {"gptj": gptj, "bloom": bloom, "mpt": mpt}
ALL = STOCK | GROUPED | VIEW


def inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Two rows of tokens, the first one padded on the left."""
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    return given | ({"decoder_input_ids": ids[:, 1:6]} if model.config.is_encoder_decoder else {})
