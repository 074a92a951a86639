"""The latent that loses nothing: all rotating pairs turned, and of the rest the values themselves or what they are a
linear function of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from passes.mla_absorb import balanced
from passes.mla_shape import Shape, constants_are_free, lossless
from passes.mla_source import plain_dims
from rewrite.exact import exact_shared, placed
from rewrite.heads import Heads, Latents, Weights
from rewrite.modules import key_norm, raw_weights
from rewrite.shared import shared
from rewrite.site import Site


def exact(site: Site, weights: Weights, rebuilt: bool, second: Tensor) -> tuple[Latents, Weights]:
    """The latent, and the weights with the output's bias that goes with it."""
    few = shared(site)
    if few is not None:
        return balanced(exact_shared(site, few, weights), second), weights
    shape = lossless(site, rebuilt)
    rows, norm = _still_rows(site, rebuilt), key_norm(site, weights) if rebuilt else None
    basis, constant = _basis(site, weights if norm is None else raw_weights(weights), rows, shape)
    count = site.k.heads * site.k.dim + site.v.heads * site.v.dim
    up = torch.zeros(count, shape.rank, dtype=torch.float64)
    up[rows] = basis
    keys = site.k.heads * site.k.dim
    up_k, up_v = up[:keys].reshape(site.k.heads, site.k.dim, -1), up[keys:].reshape(site.v.heads, site.v.dim, -1)
    kv = list(site.kv_of)
    turn, query_turn, frequencies = _all_pairs(site, count)
    none = torch.zeros(site.heads, 0, site.k.dim, dtype=torch.float64)
    made = Latents(
        down=up.T,
        turn=turn[:0] if rebuilt else turn,
        read=up_k[kv].mT,
        query_turn=none if rebuilt else query_turn,
        up_v=up_v[kv],
        frequencies=frequencies[:0] if rebuilt else frequencies,
        up_k=up_k if rebuilt else None,
        key_norm=norm,
    )
    lost = constant[keys:].reshape(site.v.heads, site.v.dim)[kv]
    moved = torch.einsum("ohd,hd->o", weights.out, lost)
    bias = None if weights.out_bias is None else weights.out_bias + moved
    return balanced(made, second), replace(weights, out_bias=bias)


def _still_rows(site: Site, rebuilt: bool) -> Tensor:
    """Features that are cached as they are."""
    g, d = site.k.heads, site.k.dim
    dims = torch.arange(d) if rebuilt else plain_dims(site)
    keys = (torch.arange(g)[:, None] * d + dims).reshape(-1)
    return torch.cat([keys, torch.arange(g * d, g * d + site.v.heads * site.v.dim)])


def _basis(site: Site, weights: Weights, rows: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """(rows, rank) orthonormal, and the constant (features,) that it leaves out."""
    zero = torch.zeros(site.k.heads * site.k.dim + site.v.heads * site.v.dim, dtype=torch.float64)
    if shape.rank == len(rows):
        return torch.eye(len(rows), dtype=torch.float64), zero
    matrix, bias = (part[rows] for part in _stacked(site, weights, len(rows) > site.v.heads * site.v.dim))
    if constants_are_free(site) and shape.rank == matrix.shape[1]:
        basis, _ = torch.linalg.qr(matrix)
        zero[rows] = bias - basis @ (basis.T @ bias)
        return basis, zero
    basis, _ = torch.linalg.qr(torch.cat([matrix, bias[:, None]], 1))
    return basis[:, : shape.rank], zero


def _stacked(site: Site, weights: Weights, with_keys: bool) -> tuple[Tensor, Tensor]:
    """(features, inputs) and (features,): keys, or zeros for them, and values as a linear function of the tokens."""

    def one(heads: Heads) -> tuple[Tensor, Tensor]:
        bias = torch.zeros_like(heads.gain) if heads.bias is None else heads.bias
        return (heads.weight * heads.gain[..., None]).flatten(0, 1), (bias * heads.gain).flatten()

    (k, kb), (v, vb) = one(weights.k), one(weights.v)
    if not with_keys:
        return torch.cat([torch.zeros(len(k), v.shape[1], dtype=v.dtype), v]), torch.cat([kb, vb])
    same = site.k.roots[0].source == site.v.roots[0].source
    return torch.cat([k, v]) if same else torch.block_diag(k, v), torch.cat([kb, vb])


def _all_pairs(site: Site, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """turn, query_turn and frequencies of every pair of every kv head, read by the head's own queries alone."""
    rope, of_q, g, d = site.k.rope, site.q.rope, site.k.heads, site.k.dim
    if rope is None or of_q is None or rope.table is not None:
        none = torch.zeros(0, dtype=torch.float64)
        return none.reshape(0, count), none.reshape(1, 0, 1).expand(site.heads, 0, d), none
    width = rope.width
    turn = torch.zeros(g, width, count, dtype=torch.float64)
    query_turn = torch.zeros(site.heads, g, width, d, dtype=torch.float64)
    key_map, query_map = placed(rope, d), placed(of_q, d)
    for i in range(g):
        turn[i, :, i * d : (i + 1) * d] = key_map
    for head, i in enumerate(site.kv_of):
        query_turn[head, i] = query_map
    frequencies = torch.from_numpy(rope.frequencies).double().repeat(g)
    return turn.flatten(0, 1), query_turn.flatten(1, 2), frequencies
