"""The oracle for sites that cache a latent: attention from `Latents`, absorbed or rebuilt, in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.eager import normed, rotated, scored
from rewrite.heads import Latents
from rewrite.site import Rope, Sink, Site

EXPANDED = 1 << 31
"""Multiplications with cached vectors from which on these are expanded head by head, where that takes fewer."""


def features(k: Tensor, v: Tensor) -> Tensor:
    """(b, s, features) from v (b, g, s, dv) and k (b, g, s, d) before the rope; for latents with a `key_norm` raw k."""
    return torch.cat([k.transpose(1, 2).flatten(2), v.transpose(1, 2).flatten(2)], -1)


def rotation(frequencies: Tensor) -> Rope:
    """The rope of the cached channels: pairs (2j, 2j + 1)."""
    f = frequencies.double().cpu().numpy()
    pairs = torch.arange(2 * len(f)).view(-1, 2).numpy()
    return Rope(pairs, f, f * 0.0)


def cached(latents: Latents, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """(c, r): (b, s, rank) and (b, s, rope_dim) of tokens at positions `at` (s,) or (b, s)."""
    c, r = y @ latents.down.to(y).T, y @ latents.turn.to(y).T
    return c, rotated(rotation(latents.frequencies), r[:, None], at)[:, 0]


def keys(latents: Latents, site: Site, c: Tensor, at: Tensor) -> Tensor:
    """(b, g, s, d): the rebuilt form's keys, turned."""
    if latents.up_k is None:
        raise ValueError("only the rebuilt form has keys")
    k = torch.einsum("bsr,gdr->bgsd", c, latents.up_k.to(c))
    if latents.key_norm is not None:
        k = normed(latents.key_norm.norm, k) * latents.key_norm.gain.to(k)[:, None]
    return k if site.k.rope is None else rotated(site.k.rope, k, at)


def turned(latents: Latents, site: Site, q: Tensor, q_at: Tensor) -> Tensor:
    """(b, h, t, width): what of the queries turns, which in the rebuilt form is all of them."""
    if latents.up_k is not None:
        return q if site.q.rope is None else rotated(site.q.rope, q, q_at)
    moving = torch.einsum("bhtd,hpd->bhtp", q, latents.query_turn.to(q))
    return rotated(rotation(latents.frequencies), moving, q_at)


def expanded(
    latents: Latents, site: Site, q: Tensor, y: Tensor, at: Tensor, q_at: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), each (b, h, tokens, width), of heads whose attention is that from the latent: what several queries at
    once take least work by. Products before scale, cap, bias and mask."""
    c, r = cached(latents, y, at)
    moving = turned(latents, site, q, q_at)
    v = torch.einsum("bsr,hdr->bhsd", c, latents.up_v.to(c))
    if latents.up_k is not None:
        return moving, keys(latents, site, c, at)[:, list(site.kv_of)], v
    still = torch.einsum("bsr,hrd->bhsd", c, latents.read.to(c))
    return torch.cat([q, moving], -1), torch.cat([still, r[:, None].expand(-1, q.shape[1], -1, -1)], -1), v


def scores(latents: Latents, site: Site, q: Tensor, y: Tensor, at: Tensor, q_at: Tensor) -> Tensor:
    """(b, h, t, s) before scale, cap, bias and mask. q (b, h, t, d) before the rope, at positions `q_at`."""
    c, r = cached(latents, y, at)
    moving = turned(latents, site, q, q_at)
    if latents.up_k is not None:
        return moving @ keys(latents, site, c, at)[:, list(site.kv_of)].transpose(-1, -2)
    read = latents.read.to(q)
    if _expands(q.shape[1] * q.shape[2] * y.shape[1], latents.rank, q.shape[2], q.shape[3]):
        still = q @ (read.mT.flatten(0, 1) @ c.mT).unflatten(1, (q.shape[1], -1))
    else:
        still = torch.einsum("bhtd,hrd->bhtr", q, read) @ c[:, None].transpose(-1, -2)
    if moving.numel() * y.shape[1] > EXPANDED:
        # heads as rows: the cached channels are not copied for each
        return still + (moving.flatten(1, 2) @ r.mT).unflatten(1, q.shape[1:3])
    return still + moving @ r[:, None].transpose(-1, -2)


def outputs(latents: Latents, p: Tensor, y: Tensor) -> Tensor:
    """(b, h, t, dv): the heads' outputs under probabilities p (b, h, t, s)."""
    c, up_v = y @ latents.down.to(y).T, latents.up_v.to(y)
    if _expands(p.shape[1] * p.shape[2] * p.shape[3], latents.rank, p.shape[2], up_v.shape[1]):
        return p @ (up_v.flatten(0, 1) @ c.mT).unflatten(1, (p.shape[1], -1)).mT
    return torch.einsum("bhtr,hdr->bhtd", p @ c[:, None], up_v)


def _expands(scores: int, rank: int, queries: int, dim: int) -> bool:
    """Whether `scores` (heads x queries x keys) are sums over `dim` numbers of each head, not over the cached ones."""
    # keys are expanded once for all queries
    return scores * rank > EXPANDED and dim * (queries + rank) < rank * queries


def attention(
    latents: Latents,
    site: Site,
    q: Tensor,
    y: Tensor,
    *,
    added: Tensor | None = None,
    sink: Tensor | None = None,
    at: Tensor | None = None,
    q_at: Tensor | None = None,
) -> Tensor:
    """(b, h, t, dv). `added` (b, h, t, s): mask and biases of the scores, -inf where nothing is seen; `sink`
    (b, h, t, 1): one more logit that carries no value. Queries stand at the last positions unless `q_at` says."""
    at = torch.arange(y.shape[1]) if at is None else at
    q_at = at[..., y.shape[1] - q.shape[2] :] if q_at is None else q_at
    s_bhts = scored(site, scores(latents, site, q, y, at, q_at), mask=added)
    if any(isinstance(m, Sink) for m in site.mods):
        if sink is None:
            raise ValueError("a site with sinks needs the sink's logits")
        p = torch.cat([s_bhts, sink], -1).softmax(-1)[..., :-1]
    else:
        p = torch.nan_to_num(s_bhts.softmax(-1))
    return outputs(latents, p, y)
