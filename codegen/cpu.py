"""Block-sparse attention on a CPU: only what the schedule visits is computed, so that a sparse mask costs less time.

A piece is a tile of queries and the runs of keys that it reads. Each run is attended to by itself, and the results are
merged by their logarithms of sums. The query heads of a kv head become rows over the same keys, which are never copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.options import Options
from codegen.pieces import FUSED, PRODUCTS
from codegen.work import exact, works
from rewrite.mask import Mask

Part = tuple[Tensor, Tensor]
"""(o, lse) of some of the keys: (b, g, rows, dv) and (b, g, rows)."""


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: Options) -> Part:
    """(o, lse) as codegen/options.py has them."""
    kernel, manner = (_fused, FUSED) if fits(k, v, options) else (_products, PRODUCTS)
    o, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), torch.full(q.shape[:-1], -torch.inf, dtype=exact(q))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    for work in works(q, k, mask, options, manner):
        rows = work.queries(q)
        parts = [kernel(rows, work.read(k, p), work.read(v, p), work.hidden(p), options) for p in work.parts]
        o_piece, lse_piece = _merged(parts)
        work.put(o, o_piece)
        work.put(lse[..., None], lse_piece[..., None])
    if options.sinks is not None:
        _sink(o, lse, options, k.shape[2])
    return o, lse


def fits(k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether torch's own kernel can compute a run."""
    return options.softcap is None and k.shape[-1] == v.shape[-1]


def _fused(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, options: Options) -> Part:
    """One run by torch's own kernel."""
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added, scale=options.scale)
    if added is not None:
        # the kernel gives 0 where a row has no keys
        lse = torch.where(added.amax(-1) == -torch.inf, -torch.inf, lse)
    return o, lse


def _products(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, options: Options) -> Part:
    """One run by two products, for what torch's kernel cannot do."""
    q, k, v = (x.to(exact(x)) for x in (q, k, v))
    s = scores(q, k, added, options)
    top = s.amax(-1, keepdim=True)
    p = s.sub_(top.masked_fill_(top == -torch.inf, 0)).exp_()
    total = p.sum(-1, keepdim=True)
    return (p @ v).div_(total.masked_fill(total == 0, 1)), (top + total.log()).squeeze(-1)


def scores(q: Tensor, k: Tensor, added: Tensor | None, options: Options) -> Tensor:
    """(b, g, rows, keys) as the softmax takes them."""
    s = (q * options.scale) @ k.mT
    if options.softcap is not None:
        s = s.div_(options.softcap).tanh_().mul_(options.softcap)
    return s if added is None else s.add_(added)


def _merged(parts: list[Part]) -> Part:
    """(o, lse) of all the keys of a piece."""
    if len(parts) == 1:
        return parts[0]
    lse_parts = torch.stack([lse for _, lse in parts])
    lse = lse_parts.logsumexp(0)
    shares = (lse_parts - lse.masked_fill(lse == -torch.inf, 0)).exp_()[..., None]
    o = parts[0][0] * shares[0]
    for (part, _), share in zip(parts[1:], shares[1:], strict=True):
        o.addcmul_(part, share)
    return o, lse


def _sink(o: Tensor, lse: Tensor, options: Options, keys: int) -> None:
    """Sinks take their share of rows that are no padding, in place."""
    if options.sinks is None:
        return
    spans = options.spans(o.shape[0], o.shape[2], keys)
    for row, (queries, _) in enumerate(spans):
        before = lse[row, :, :queries]
        after = torch.logaddexp(before, options.sinks[:, None].to(before))
        o[row, :, :queries] *= (before - after).exp_()[..., None].to(o.dtype)
        lse[row, :, :queries] = after
