"""What a site's original weights see on one batch, read off the captured graph: projections, heads, probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from codegen.eager import operand
from passes.moments import SiteBatch
from passes.region import Env, Machine, Slice, projected, run_slice
from rewrite.errors import BadUsage

ALL = slice(None)
SINGLE = 1 << 24
"""Scores of one window from which on probabilities are computed in single precision, as the model itself has them."""


def site_batch(
    machine: Machine,
    part: Slice,
    env: Env,
    keep: Tensor | None,
    tensors: Callable[[str], Tensor],
    inverse: Tensor | None,
) -> SiteBatch:
    """What a site's original weights see on one batch whose boundary is known; `inverse` as in `SiteBatch.back`."""
    local = run_slice(machine, part, env, {}, part.entry)
    site = part.site
    u = {which: projected(part, local, which).double() for which in "qkv"}
    values = {
        which: operand(o, torch.split(u[which], [r.rows for r in o.roots], -1), tensors, None, turned=False)
        for which, o in (("q", site.q), ("k", site.k), ("v", site.v))
    }

    def some(windows: slice, at: Tensor | None) -> Tensor:
        return _probabilities(machine, part, local, env, windows, at)

    return SiteBatch(site, u, values["q"], values["k"], values["v"], lambda: some(ALL, None), keep, some, inverse)


def _probabilities(
    machine: Machine, part: Slice, local: Env, env: Env, windows: slice, queries: Tensor | None
) -> Tensor:
    """(windows, heads, queries, keys) from the core's own operation, whatever mask and bias it was given."""

    def look(node: Node) -> Any:
        return next(values[node] for values in (local, env, machine.state) if node in values)

    for node in part.nodes:
        name = str(node.target)
        if "softmax" in name:
            p = local[node]
            p = (p if p.dim() == 4 else p.reshape(-1, part.site.heads, *p.shape[-2:]))[windows]
            return (p if queries is None else p[:, :, queries]).double()
        if "scaled_dot_product_attention" in name:
            args: Any = map_arg(node.args, look)
            kwargs: Any = map_arg(node.kwargs, look)
            return sdpa_probabilities(*args, **kwargs, windows=windows, queries=queries)
    raise BadUsage("calibration", f"{part.site.name}: no probabilities to read", "leave the calibration out")


def sdpa_probabilities(  # the argument list is that of the operator, then windows and queries
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    windows: slice = ALL,
    queries: Tensor | None = None,
) -> Tensor:
    """(windows, heads, queries, keys) in float64, of some windows and some queries; `queries` None means all."""
    at = torch.arange(q.shape[-2]) if queries is None else queries
    q, k = q[windows][..., at, :], k[windows]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if enable_gqa else k
    exact = torch.float32 if q[0, ..., 0].numel() * k.shape[-2] >= SINGLE else torch.float64
    scores = q.to(exact) * (scale if scale is not None else q.shape[-1] ** -0.5) @ k.to(exact).transpose(-1, -2)
    if is_causal:
        scores.masked_fill_(torch.arange(scores.shape[-1]) > at[:, None], -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask[windows] if attn_mask.dim() == q.dim() and len(attn_mask) > 1 else attn_mask
        attn_mask = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., at, :]
        masked = attn_mask.dtype == torch.bool
        scores.masked_fill_(~attn_mask, -torch.inf) if masked else scores.add_(attn_mask.to(exact))
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True)).nan_to_num_().double()
