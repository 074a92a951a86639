"""What ONNX Runtime GenAI and optimum load: the config that the former reads beside a model, and a sentence where a
cache is none that they can hold.

GenAI reads all from its config, optimum from the model's: it makes an empty cache of num_attention_heads heads of
hidden_size / num_attention_heads, or by num_key_value_heads and head_dim where it knows that a class has them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from rewrite.onnx.caches import Slot

CONFIG = "genai_config.json"
INPUTS = ("input_ids", "attention_mask", "position_ids")


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


def loaders(model: Any, slots: Sequence[Slot], form: str) -> str:
    """The sentence on what loads a folder."""
    reason = refuse(slots)
    if reason is not None:
        return f"ONNX Runtime GenAI and optimum do not load it: {reason}"
    if form == "shared":
        return "ONNX Runtime GenAI loads it; optimum does not, as its empty cache has no room to write into"
    source = model.config.get_text_config()
    ((heads, width),) = {size for slot in slots for size in slot.tensors}
    queries, hidden = (int(getattr(source, name, None) or 0) for name in ("num_attention_heads", "hidden_size"))
    held = {"num_key_value_heads": (heads, queries), "head_dim": (width, hidden // max(queries, 1))}
    fields = {name: mine for name, (mine, taken) in held.items() if mine != taken}
    if not fields:
        return "ONNX Runtime GenAI and optimum load it"
    if any(getattr(source, name, None) != mine for name, mine in fields.items()):
        told = " × ".join(str(getattr(source, name, None) or taken) for name, (_, taken) in held.items())
        return (
            f"ONNX Runtime GenAI loads it; optimum does not: by the config its cache is {told}, not {heads} × {width}"
        )
    asked = " and ".join(fields)
    return f"ONNX Runtime GenAI loads it, and optimum where it reads {asked} of model type {source.model_type}"


def config(model: Any, slots: Sequence[Slot], inputs: Collection[str], filename: str, *, shared: bool) -> str:
    """The text of genai_config.json, of a graph with these inputs; `shared`: past and present are one buffer."""
    source = model.config.get_text_config()
    ((heads, width),) = {size for slot in slots for size in slot.tensors}
    context = int(getattr(source, "max_position_embeddings", 2048))
    decoder = {
        "session_options": {"provider_options": []},
        "filename": filename,
        **{name: getattr(source, name) for name in ("hidden_size", "num_attention_heads") if hasattr(source, name)},
        "num_key_value_heads": heads,
        "num_hidden_layers": len(slots),
        "head_size": width,
        "inputs": {
            **{name: name for name in INPUTS if name in inputs},
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
            # any decoder that is fully described: the names of classes are a fixed list there, with rules of their own
            "type": "decoder",
            "vocab_size": source.vocab_size,
            "context_length": context,
            **_tokens(getattr(model, "generation_config", None), source),
            "decoder": decoder,
        },
        "search": {"max_length": context, "past_present_share_buffer": shared, "do_sample": False, "num_beams": 1},
    }
    return json.dumps(made, indent=2) + "\n"


def _tokens(*sources: Any) -> dict[str, Any]:
    """The special tokens that the first source to know them names; none is made up."""
    found: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        told = (getattr(source, name, None) for source in sources)
        value = next((v for v in told if v is not None), None)
        found |= {} if value is None else {name: value}
    return found
