"""Latents written by hand, and a model that computes them by the oracle: what stock emission is held to."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from codegen.latent import attention, features
from rewrite.heads import Heads, Latents, Rewritten, Weights
from rewrite.layout import gather
from rewrite.mask import causal
from rewrite.site import Latent, Site
from tests.contract.by_hand import site, tensors_of
from tests.contract.tiny import LLAMA, settled
from tests.sites import half_rope

Changes = dict[str, tuple[Site, Rewritten]]


def llama(
    kv_heads: int, kind: str = "Llama", heads: int = 4, dim: int = 16, **more: Any
) -> tuple[PreTrainedModel, list[Site]]:
    """A tiny random decoder of this family and its sites; no token ends a text, so lengths can be compared."""
    settings = LLAMA | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    settings |= {"bos_token_id": None, "eos_token_id": None} | more
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = settled(config, f"{kind}ForCausalLM")
    names = "q_proj k_proj v_proj o_proj".split()
    return model, [
        plain(site(model, f"model.layers.{i}.self_attn", *names, heads, kv_heads, "apart"))
        for i in range(config.num_hidden_layers)
    ]


def plain(made: Site) -> Site:
    """Causal, rotated by halves, scaled by the width."""
    rope = half_rope(made.q.dim)
    q, k = replace(made.q, rope=rope), replace(made.k, rope=rope)
    return replace(made, q=q, k=k, mask=causal, scale=(made.q.dim**-0.5,))


def changed(model: PreTrainedModel, given: Mapping[str, tuple[Site, Latents]]) -> Changes:
    """The rewritten sites, with the source's own weights."""
    out: Changes = {}
    for name, (one, latents) in given.items():
        form = Latent(latents.rank, latents.rope_dim)
        weights = gather(one, tensors_of(model))
        out[name] = (one, Rewritten(replace(one, form=form), weights, tuple(range(one.heads)), (), latents))
    return out


def refitted(changes: Changes, factor: float = 1.1) -> Changes:
    """Other output projections than the source's: where those are taken, it shows."""
    return {
        name: (one, replace(new, weights=replace(new.weights, out=factor * new.weights.out)))
        for name, (one, new) in changes.items()
    }


def exact(one: Site) -> Latents:
    """All values cached as they are, all keys of all heads turned: what computes the source itself."""
    rope = one.k.rope
    if rope is None:
        raise ValueError("a site without rope has no rotated channels")
    g, d, dv = one.k.heads, one.k.dim, one.v.dim
    pairs = torch.from_numpy(rope.pairs).reshape(-1)
    eye = torch.eye(g * d + g * dv, dtype=torch.float64)
    query_turn = torch.zeros(one.heads, g, d, d, dtype=torch.float64)
    up_v = torch.zeros(one.heads, dv, g, dv, dtype=torch.float64)
    for h, i in enumerate(one.kv_of):
        query_turn[h, i] = torch.eye(d, dtype=torch.float64)[pairs]
        up_v[h, :, i] = torch.eye(dv, dtype=torch.float64)
    return Latents(
        down=eye[g * d :],
        turn=eye[torch.cat([pairs + i * d for i in range(g)])],
        read=torch.zeros(one.heads, g * dv, d, dtype=torch.float64),
        query_turn=query_turn.flatten(1, 2),
        up_v=up_v.flatten(2),
        frequencies=torch.from_numpy(rope.frequencies).repeat(g),
    )


def truncated(one: Site, weights: Weights, rank: int, pairs: Sequence[int]) -> Latents:
    """The strongest directions of keys and values, and some pairs of the mean key: bad, but every part is used."""
    rope = one.k.rope
    if rope is None:
        raise ValueError("a site without rope has no rotated channels")
    g, d, dv = one.k.heads, one.k.dim, one.v.dim
    y = torch.cat([weights.k.weight.flatten(0, 1), weights.v.weight.flatten(0, 1)])
    down = torch.linalg.svd(y).U[:, :rank].T.contiguous()
    keys, values = down[:, : g * d].unflatten(1, (g, d)), down[:, g * d :].unflatten(1, (g, dv))
    picked = torch.eye(d, dtype=torch.float64)[torch.from_numpy(rope.pairs)[list(pairs)].reshape(-1)]
    return Latents(
        down=down,
        turn=torch.cat([picked.repeat(1, g) / g, picked.new_zeros(len(picked), g * dv)], 1),
        read=keys[:, list(one.kv_of)].transpose(0, 1),
        query_turn=picked.expand(one.heads, -1, -1),
        up_v=values[:, list(one.kv_of)].permute(1, 2, 0),
        frequencies=torch.from_numpy(rope.frequencies)[list(pairs)],
    )


def cut(model: PreTrainedModel, sites: Sequence[Site], ranks: Sequence[int], pairs: Sequence[Sequence[int]]) -> Changes:
    """Truncated latents, a rank and pairs for each layer, and refitted outputs."""
    made = {
        s.name: (s, truncated(s, gather(s, tensors_of(model)), rank, some))
        for s, rank, some in zip(sites, ranks, pairs, strict=True)
    }
    return refitted(changed(model, made))


@contextmanager
def oracle(model: PreTrainedModel, changes: Changes) -> Generator[PreTrainedModel]:
    """The source with the oracle's attention in place of its own: unpadded, without a cache."""
    hooks = [
        model.get_submodule(name).register_forward_hook(_by_latents(one, new), with_kwargs=True)
        for name, (one, new) in changes.items()
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _by_latents(one: Site, new: Rewritten) -> Any:
    def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x = kwargs["hidden_states"].double()
        latents = new.latents
        if latents is None:
            raise ValueError("no latents")
        q, k, v = (_heads(h, x) for h in (new.weights.q, new.weights.k, new.weights.v))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        z = attention(latents, one, q, features(k, v), added=torch.zeros(()).masked_fill(~seen, -torch.inf))
        out = torch.einsum("bhtd,ohd->bto", z, new.weights.out).to(kwargs["hidden_states"].dtype)
        return (out, *output[1:])

    return hook


def _heads(heads: Heads, x: Tensor) -> Tensor:
    """(b, heads, t, dim)."""
    return torch.einsum("btc,hdc->bhtd", x, heads.weight * heads.gain[..., None])
