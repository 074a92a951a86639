"""The oracle: a `Site` re-emitted in eager PyTorch, from the description alone. Every other back end is held to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rewrite.site import Affine, Norm, Operand, Rope, Sink, Site, Softcap, Tensors


def operand(
    o: Operand, u: Sequence[Tensor], tensors: Tensors, positions: Tensor | None = None, turned: bool = True
) -> Tensor:
    """Root outputs, one (b, t, rows) for each root, to (b, heads, t, dim).

    `positions` (t,) or (b, t), 0, 1, ... where it is None. `turned=False` stops before the rope and leaves out what
    stands after it.
    """
    x = torch.cat(list(u), dim=-1)
    rows = torch.as_tensor(o.rows, device=x.device)
    x_bhtd = x[..., rows.reshape(-1)].unflatten(-1, rows.shape).transpose(1, 2)
    if o.norm is not None:
        x_bhtd = normed(o.norm, x_bhtd)
    x_bhtd = x_bhtd * _per_head(o.gain, x, tensors)
    if o.shift is not None:
        x_bhtd = x_bhtd + _per_head(o.shift, x, tensors)
    if not turned:
        return x_bhtd
    at = torch.arange(x.shape[1], device=x.device) if positions is None else positions
    if o.rope is not None:
        x_bhtd = rotated(o.rope, x_bhtd, at)
    if o.after is not None:
        x_bhtd = x_bhtd * _per_head(o.after, x, tensors)
    if o.token_gain is not None:
        token = torch.as_tensor(o.token_gain, dtype=x.dtype, device=x.device)[at]
        x_bhtd = x_bhtd * (token[:, None] if token.ndim == 1 else token[:, None, :, None])
    return x_bhtd


def _per_head(values: Affine, like: Tensor, tensors: Tensors) -> Tensor:
    """(heads, dim) as (heads, 1, dim)."""
    return torch.as_tensor(values.read(tensors), dtype=like.dtype, device=like.device)[:, None]


def normed(norm: Norm, x_bhtd: Tensor) -> Tensor:
    """Over each head, or over all heads of a token at once."""
    axes = (-1,) if norm.over == "head" else (1, 3)
    if norm.kind == "layer":
        x_bhtd = x_bhtd - x_bhtd.mean(axes, keepdim=True)
    square = x_bhtd.square()
    size = square.sum(axes, keepdim=True) if norm.kind == "l2" else square.mean(axes, keepdim=True)
    return x_bhtd * (size + norm.eps).rsqrt()


def rotated(rope: Rope, x_bhtd: Tensor, positions: Tensor) -> Tensor:
    """Pair j turned by start[j] + frequencies[j] * position, or by its table of angles."""
    first, second = (_places(rope.pairs[:, i], x_bhtd.device) for i in (0, 1))
    angles = angles_at(rope, positions)
    angles = angles[:, None] if angles.ndim == 3 else angles
    cos, sin = angles.cos().to(x_bhtd.dtype), angles.sin().to(x_bhtd.dtype)
    a, b = x_bhtd[..., first], x_bhtd[..., second]
    out = x_bhtd.clone()
    out[..., first] = cos * a - sin * b
    out[..., second] = sin * a + cos * b
    return out


def _places(dims: np.ndarray, device: torch.device) -> slice | Tensor:
    """The dims as a slice where they lie evenly: a view costs a fraction of a gather and of its backward."""
    steps = set(np.diff(dims).tolist())
    if len(steps) == 1 and (step := steps.pop()) > 0:
        return slice(int(dims[0]), int(dims[-1]) + 1, step)
    return torch.as_tensor(dims, device=device)


def angles_at(rope: Rope, positions: Tensor) -> Tensor:
    """(..., pairs) in float64, in radians."""
    if rope.table is not None:
        return torch.as_tensor(rope.table, device=positions.device)[positions]
    frequencies, start = (torch.as_tensor(x, device=positions.device) for x in (rope.frequencies, rope.start))
    return start + positions.to(torch.float64)[..., None] * frequencies


def logits(site: Site, q: Tensor, k: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """(b, h, t, s) scores as the softmax takes them, without sinks. `mask`: bool keeps where True, else it is added."""
    of = torch.as_tensor(site.kv_of, device=q.device)
    return scored(site, q @ k[:, of].transpose(-1, -2), mask=mask, bias=bias)


def scored(site: Site, products: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """(b, h, t, s) products of queries and keys as the softmax takes them: scaled, capped, biased, masked."""
    s_bhts = products * torch.as_tensor(site.scale, dtype=products.dtype, device=products.device)[:, None, None]
    for mod in site.mods:
        if isinstance(mod, Softcap):
            s_bhts = mod.cap * torch.tanh(s_bhts / mod.cap)
    if bias is not None:
        s_bhts = s_bhts + bias
    if mask is None:
        return s_bhts
    return s_bhts.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s_bhts + mask


def probabilities(
    site: Site,
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    tensors: Tensors | None = None,
) -> Tensor:
    """(b, h, t, s); rows sum to one, or to less where a sink takes its part."""
    s_bhts = logits(site, q, k, mask=mask, bias=bias)
    sinks = [mod for mod in site.mods if isinstance(mod, Sink)]
    if not sinks:
        return s_bhts.softmax(-1)
    if tensors is None:
        raise ValueError("a site with sinks needs its tensors")
    extra = [torch.as_tensor(mod.logits.read(tensors), dtype=q.dtype, device=q.device) for mod in sinks]
    columns = torch.stack(extra, -1)[:, None].expand(*s_bhts.shape[:-1], len(sinks))
    return torch.cat([s_bhts, columns], -1).softmax(-1)[..., : s_bhts.shape[-1]]


def attention(
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    tensors: Tensors | None = None,
) -> Tensor:
    """(b, h, t, dv) from q (b, h, t, d), k (b, g, s, d) and v (b, g, s, dv)."""
    of = torch.as_tensor(site.kv_of, device=v.device)
    return probabilities(site, q, k, mask=mask, bias=bias, tensors=tensors) @ v[:, of]
