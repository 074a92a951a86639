"""What errors of keys and values cost at the output, to first order, measured on what attention really mixes.

A score error δ of head l changes the output by W_o,l Cov_p(v, δ): only what varies inside one query's attention counts.
An error of the values is averaged by attention before it counts. Both are far from what plain moments say: by three
orders of magnitude from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.eager import rotated
from passes.gqa_source import floored
from passes.mla_basis import keys_values
from passes.mla_scene import Scene
from passes.mla_source import Known, after

QUERIES = 2048
"""Queries of one scene that are looked at, at most."""
WORK = 1 << 33
"""Multiplications per scene; with wide heads and long windows fewer queries are looked at."""


@dataclass(frozen=True, eq=False)
class Influence:
    """Per query head what a squared score error costs and what averaging leaves of the values' energy, (h,) each, and
    the covariance of y inside a query's attention, (features, features), averaged over heads and queries."""

    score_cost: Tensor
    value_share: Tensor
    within: Tensor


def influence(stage: Iterable[Scene], known: Known, raw: bool = False) -> Influence:
    """Measured on some queries of every scene; `raw`: `within` is of raw keys."""
    site, f = known.site, len(known.mean)
    score, queries = torch.zeros(site.heads, dtype=torch.float64), 0
    mean = torch.zeros(site.heads, site.v.dim, dtype=torch.float64)
    second = torch.zeros(site.heads, site.v.dim, site.v.dim, dtype=torch.float64)
    within = torch.zeros(f, f, dtype=torch.float64)
    metric = query_metric(known)
    for scene in stage:
        p = _some(scene)
        queries += p.shape[0] * p.shape[2]
        k, v = _keys_values(scene, known.basis)
        for head, i in enumerate(site.kv_of):
            score[head] += _felt(p[:, head], k[:, i], v[:, i], metric[head], known.value_cost[head])
            average = (p[:, head] @ v[:, i]).flatten(0, 1).double()
            mean[head] += average.sum(0)
            second[head] += average.T @ average
        within += _within(p, scene.raw if raw else scene.y)
    mean, second = mean / queries, second / queries
    averaged = second - torch.einsum("hd,he->hde", mean, mean)
    k_cov, v_cov = _covariances(known)
    scale = torch.tensor(site.scale, dtype=torch.float64).expand(site.heads) * after(site)
    felt = score / queries / torch.einsum("hde,hed->h", metric, k_cov).clamp(min=1e-300)
    share = torch.einsum("hde,hed->h", known.value_cost, averaged)
    share = share / torch.einsum("hde,hed->h", known.value_cost, v_cov).clamp(min=1e-300)
    return Influence(floored(felt * scale.square()), floored(share), within / queries / site.heads)


def mixed(known: Known, within: Tensor) -> Tensor:
    """(features, features): half the moments of all tokens, half those inside one query's attention."""
    return halves(known.spread, within)


def halves(spread: Tensor, within: Tensor) -> Tensor:
    """Half the one and half the other, of equal trace."""
    size = spread.diagonal().sum() / within.diagonal().sum().clamp(min=1e-300)
    return (spread + within * size) / 2


def _some(scene: Scene) -> Tensor:
    """(b, h, t, s) attention of some queries."""
    b, h, t, s = scene.p.shape
    site = scene.site
    most = max(1, min(QUERIES, WORK // (h * s * site.k.dim * site.v.dim)) // b)
    return scene.p[:, :, :: -(-t // most)]


def _keys_values(scene: Scene, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """(b, g, s, d) turned, and (b, g, s, dv)."""
    site = scene.site
    k, v = keys_values(site, basis, scene.y)
    k = k.unflatten(-1, (site.k.heads, -1)).transpose(1, 2)
    k = k if site.k.rope is None else rotated(site.k.rope, k, scene.keys_at)
    return k, v.unflatten(-1, (site.v.heads, -1)).transpose(1, 2)


def query_metric(known: Known) -> Tensor:
    """(h, d, d) what an error of the key does to the score: E[q qᵀ], of turning pairs their mean size alone, which is
    what is left wherever the query stands."""
    metric = torch.zeros_like(known.q)
    plain = known.plain
    metric[:, plain[:, None], plain] = known.q[:, plain[:, None], plain]
    a, b = known.pairs[:, 0], known.pairs[:, 1]
    size = (known.q[:, a, a] + known.q[:, b, b]) / 2
    metric[:, a, a], metric[:, b, b] = size, size
    return metric


def _felt(p: Tensor, k: Tensor, v: Tensor, metric: Tensor, cost: Tensor) -> float:
    """Sum over queries of tr(M X B Xᵀ), X the covariance of keys and values under the query's attention."""
    total = 0.0
    for row, keys, values in zip(p, k, v, strict=True):
        x = torch.einsum("ts,sd,sv->tdv", row, keys, values)
        x = (x - torch.einsum("td,tv->tdv", row @ keys, row @ values)).double()
        total += float((torch.einsum("de,tev->tdv", metric, x) * (x @ cost)).sum())
    return total


def _within(p: Tensor, y: Tensor) -> Tensor:
    weight = p.sum((1, 2))
    rows = y.flatten(0, 1).double() * weight.reshape(-1, 1).double().sqrt()
    means = torch.einsum("bhts,bsx->bhtx", p, y).flatten(0, 2).double()
    return rows.T @ rows - means.T @ means


def _covariances(known: Known) -> tuple[Tensor, Tensor]:
    """(h, d, d) and (h, dv, dv) of each query head's own keys and values."""
    kv = list(known.site.kv_of)
    k, v = known.blocks(known.second - torch.outer(known.mean, known.mean))
    return k[kv], v[kv]
