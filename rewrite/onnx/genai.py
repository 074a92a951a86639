"""The config that ONNX Runtime GenAI reads beside a model, and why there is none where its cache has no such shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rewrite.onnx.caches import Slot


def refuse(slots: Sequence[Slot]) -> str | None:
    """Why neither ONNX Runtime GenAI nor optimum can hold this cache."""
    if any(slot.rank is not None for slot in slots):
        return "they cache keys and values of one width, this file a latent: rewrite.onnx.run decodes it"
    if any(slot.bound is not None for slot in slots):
        return "their caches hold every token, this one drops some: rewrite.onnx.run decodes it"
    sizes = sorted({size for slot in slots for size in slot.tensors})
    if len(sizes) > 1:
        told = ", ".join(f"{heads} × {width}" for heads, width in sizes)
        return f"they have one cache shape for all layers, this file has {told}: rewrite.onnx.run decodes it"
    return None


def config(model: Any, slots: Sequence[Slot], filename: str, *, shared: bool) -> str:
    """The text of genai_config.json."""
    source = model.config.get_text_config()
    ((heads, width),) = {size for slot in slots for size in slot.tensors}
    context = int(getattr(source, "max_position_embeddings", 2048))
    settings = getattr(model, "generation_config", None)

    def token(name: str) -> Any:
        return getattr(settings, name, None) or getattr(source, name, None) or 0

    decoder = {
        "session_options": {"provider_options": []},
        "filename": filename,
        "hidden_size": source.hidden_size,
        "num_attention_heads": source.num_attention_heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": len(slots),
        "head_size": width,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    made = {
        "model": {
            "type": source.model_type,
            "vocab_size": source.vocab_size,
            "context_length": context,
            **{name: token(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
            "decoder": decoder,
        },
        "search": {"max_length": context, "past_present_share_buffer": shared, "do_sample": False, "num_beams": 1},
    }
    return json.dumps(made, indent=2) + "\n"
