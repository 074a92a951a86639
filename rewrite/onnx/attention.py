"""Attention as the file computes it. The query heads that share a kv head are rows of one product, so nothing that is
cached is ever repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.onnx.caches import Handed
from rewrite.onnx.functions import DOMAIN, VERSION

OPTIONS = Mapping[str, Any]
"""What the model passes to its kernel beside the tensors: scaling, softcap, position_bias, sinks."""


def grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: OPTIONS) -> Tensor:
    """(batch, tokens, h, dv) of query (batch, h, tokens, d) and key, value (batch, g, past, d)."""
    shares = softmax(grouped_scores(query * options["scaling"], key), mask, options)
    return (rows(shares, key.shape[1]) @ value).view(*query.shape[:3], value.shape[-1]).transpose(1, 2)


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """(batch, h, tokens, past)."""
    return (rows(query, key.shape[1]) @ key.transpose(-1, -2)).view(*query.shape[:3], key.shape[2])


def rows(x: Tensor, groups: int) -> Tensor:
    """(batch, groups, h / groups * tokens, width) of x (batch, h, tokens, width)."""
    batch, heads, tokens, width = x.shape
    return x if groups == heads else x.reshape(batch, groups, heads // groups * tokens, width)


def softmax(scores: Tensor, mask: Tensor | None, options: OPTIONS) -> Tensor:
    """(batch, h, tokens, past): shares of the scaled scores, with all that a kernel may be asked to add to them."""
    cap, bias, sinks = options.get("softcap"), options.get("position_bias"), options.get("sinks")
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else scores + mask
    if sinks is None:
        return scores.softmax(-1)
    beside = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat((scores, beside), -1).softmax(-1)[..., :-1]


def operator(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: OPTIONS) -> Tensor:
    """The same by the standard operator, which takes fewer kv heads as they are."""
    attributes: dict[str, Any] = {"scale": float(options["scaling"])}
    if options.get("softcap") is not None:
        attributes["softcap"] = float(options["softcap"])
    inputs = (query, key, value) if mask is None else (query, key, value, mask)
    shape = (*query.shape[:3], value.shape[-1])
    made = torch.onnx.ops.symbolic("Attention", inputs, attributes, dtype=query.dtype, shape=shape, version=23)
    return made.transpose(1, 2)


def contrib(query: Tensor, layer: Handed, mask: Tensor | None, options: OPTIONS) -> Tensor:
    """The same by ONNX Runtime's own operator, which writes the new tokens into the buffers too."""
    batch, heads, tokens, width = query.shape
    key, value = layer.new
    total = layer.get_seq_length()
    ends = torch.full((batch,), total - 1, dtype=torch.int32)
    length = torch.full((1,), total, dtype=torch.int32)
    past_key, past_value = layer.held
    flat = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key.shape[1], "scale": float(options["scaling"])}
    if options.get("softcap") is not None:
        attributes["softcap"] = float(options["softcap"])
    inputs = (*flat, past_key, past_value, ends, length, None, None, None, mask)
    out, *layer.held = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=((batch, tokens, heads * width), past_key.shape, past_value.shape),
        version=1,
    )
    return out.view(batch, tokens, heads, width)


def absorbed(
    latent: Any, query: Tensor, held: Tensor, rope_key: Tensor, mask: Tensor | None, options: OPTIONS
) -> Tensor:
    """(batch, tokens, h, dv) of query (batch, h, tokens, d), held (batch, 1, past, rank), rope_key (..., rope_dim)."""
    query = query * options["scaling"]
    shape = (*query.shape[:3], held.shape[2])
    scores = _called("LatentScores", (query, held, latent.read), shape)
    if latent.rope_dim:
        turned = latent.turned(query @ latent.query_turn.transpose(-1, -2))
        scores = scores + _called("RopeScores", (turned, rope_key), shape)
    return _summed(latent, softmax(scores, mask, options), held)


def rebuilt(latent: Any, query: Tensor, held: Tensor, mask: Tensor | None, options: OPTIONS) -> Tensor:
    """The same where keys are rebuilt from the latent, one for each kv head, at every step."""
    key = latent.grouped_keys(held.squeeze(1), 0, latent.call.last(held, query))
    scores = grouped_scores(latent.queries(query) * options["scaling"], key)
    return _summed(latent, softmax(scores, mask, options), held)


def _summed(latent: Any, shares: Tensor, held: Tensor) -> Tensor:
    shape = (*shares.shape[:3], latent.up_v.shape[1])
    return _called("LatentValues", (shares, held, latent.up_v), shape).transpose(1, 2)


def _called(name: str, inputs: tuple[Tensor | nn.Parameter, ...], shape: tuple[Any, ...]) -> Tensor:
    kind = inputs[0].dtype
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", inputs, dtype=kind, shape=shape, version=VERSION)
