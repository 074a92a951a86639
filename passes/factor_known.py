"""What making the projections of keys and values low-rank needs to know about a site: moments of what they give before
norm and rope and without their biases, and what errors of that cost at the output.

From calibration sums where there are any, else from the weights alone (inputs white, distances supposed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes import Stats
from passes.factor_shape import sides
from passes.gqa_source import shift_invariant
from passes.mla_influence import halves, influence, query_metric
from passes.mla_rebuilt import raw_rows, through, unfelt
from passes.mla_scene import Scene
from passes.mla_source import known, per_kv_head
from passes.moments import SiteBatch
from rewrite.heads import Heads, KeyNorm, Weights
from rewrite.site import Output, Site


@dataclass(frozen=True, eq=False)
class Rows:
    """One site's rows W x of keys, then values: n = g * d + g * dv."""

    site: Site
    second: Tensor
    """(n, n) E[(W x)(W x)ᵀ], or the covariance of rows whose mean is free; within a query's attention too where that
    was measured"""
    mean: Tensor
    """(n,) E[W x]"""
    key_cost: Tensor
    """(n, m, m) what errors of the rows of keys cost, n * m = g * d"""
    value_cost: Tensor
    """(g, dv, dv)"""

    @property
    def keys(self) -> int:
        """How many of the rows are keys."""
        return self.site.k.heads * self.site.k.dim


def rows_known(site: Site, weights: Weights, stats: Stats | None, stage: Sequence[Scene]) -> Rows:
    """From calibration, of which `stage` is a part, or from the weights alone."""
    behind = known(site, weights, None if stats is None else stats.moments, 0 if stats is None else stats.tokens)
    felt = influence(stage, behind, raw=site.k.norm is not None) if stage else unfelt(behind)
    second, mean = _moments(site, weights, stats)
    free = [_free(site.k.rows.size, keys_free(site, weights)), _free(site.v.rows.size, values_free(site, weights))]
    mean_free = mean * torch.cat(free)
    spread = second - torch.outer(mean_free, mean_free)
    key_cost = per_kv_head(site, query_metric(behind) * felt.score_cost[:, None, None])
    value_cost = per_kv_head(site, behind.value_cost * felt.value_share[:, None, None])
    if site.k.norm is None:
        key_cost, key_gain = _scaled(key_cost, weights.k.gain), weights.k.gain
    else:
        key_cost = through(KeyNorm(site.k.norm, weights.k.gain), key_cost, _raw_keys(site, weights, stage, second))
        key_gain = torch.ones_like(weights.k.gain)
    gain = torch.cat([key_gain.flatten(), weights.v.gain.flatten()])
    return Rows(
        site,
        second=_mixed(spread, felt.within, gain) if stage else spread,
        mean=mean,
        key_cost=key_cost,
        value_cost=_scaled(value_cost, weights.v.gain),
    )


def _raw_keys(site: Site, weights: Weights, stage: Sequence[Scene], second: Tensor) -> Tensor:
    """(tokens, g, d) what the norm of the keys is given: that of the scenes, or draws of the second moment."""
    keys = site.k.rows.size
    rows = raw_rows(stage, second[:keys, :keys], site.k.heads)
    return rows if stage else rows + _bias(weights.k).unflatten(0, (site.k.heads, -1))


def keys_free(site: Site, weights: Weights) -> bool:
    """Whether a constant in what the projection gives can be given back by its bias, or moves all scores of a query."""
    return weights.k.bias is not None or (site.k.rope is None and site.k.norm is None and shift_invariant(site))


def values_free(site: Site, weights: Weights) -> bool:
    """Whether a constant in the values can be given back by their bias or the output's."""
    return weights.v.bias is not None or (isinstance(site.out, Output) and weights.out_bias is not None)


def _free(count: int, free: bool) -> Tensor:
    return torch.full((count,), float(free), dtype=torch.float64)


def _bias(heads: Heads) -> Tensor:
    return (torch.zeros_like(heads.gain) if heads.bias is None else heads.bias).flatten()


def _scaled(cost: Tensor, gain: Tensor) -> Tensor:
    """The cost (g, d, d) of errors before a gain (g, d)."""
    return cost * gain[:, :, None] * gain[:, None, :]


def _mixed(spread: Tensor, within: Tensor, gain: Tensor) -> Tensor:
    """Half the moments of all tokens, half those inside one query's attention: the latter are of what stands behind the
    gain."""
    back = torch.where(gain == 0, torch.zeros_like(gain), 1 / gain)
    return halves(spread, within * back[:, None] * back)


def _moments(site: Site, weights: Weights, stats: Stats | None) -> tuple[Tensor, Tensor]:
    """Second moment and mean of W x."""
    if stats is None:
        k, v = weights.k.weight.flatten(0, 1), weights.v.weight.flatten(0, 1)
        w = torch.cat([k, v]) if sides(site).same else torch.block_diag(k, v)
        return w @ w.T, torch.zeros(len(w), dtype=torch.float64)
    bias = torch.cat([_bias(weights.k), _bias(weights.v)])
    total = sum((_gram(batch, bias) for batch in stats.batches()), torch.zeros((), dtype=torch.float64))
    total = total / total[-1, -1]
    return (total + total.T)[:-1, :-1] / 2, total[-1, :-1]


def _gram(batch: SiteBatch, bias: Tensor) -> Tensor:
    """(n + 1, n + 1) sum over the tokens that count, with a 1 behind them."""
    parts = [
        batch.u[n][..., torch.from_numpy(o.rows.reshape(-1))] for n, o in (("k", batch.site.k), ("v", batch.site.v))
    ]
    rows = torch.cat(parts, -1).flatten(0, -2).double() - bias
    if batch.keep is not None and batch.keep.numel() == len(rows):
        rows = rows[batch.keep.reshape(-1)]
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return rows.T @ rows
