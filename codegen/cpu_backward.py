"""Gradients of block-sparse attention on a CPU: the forward's pieces again, probabilities recomputed from its lse.

Sums over pieces have one order, so that a second pass gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.cpu import fits, scores
from codegen.options import Options
from codegen.pieces import GRADIENTS, PRODUCTS, Run
from codegen.work import Work, biased, exact, works
from rewrite.mask import Mask


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Mask,
    options: Options,
    bias_grad: bool = False,
) -> dict[str, Tensor]:
    """Gradients "q", "k" and "v", "sinks" where there are some, and "bias" where it is asked for."""
    dtype = exact(q)
    do, o = grad.to(dtype).contiguous(), o.to(dtype)
    delta = (do * o).sum(-1)
    # probabilities of rows without keys become 0, not NaN
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    full = [x.to(dtype) for x in (q, k, v)]
    full = [x if x.stride(-1) == 1 else x.contiguous() for x in full]
    sums = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in full]
    dbias = torch.zeros(options.bias.shape, dtype=dtype) if bias_grad and options.bias is not None else None
    if fits(k, v, options) and dbias is None:
        for work in works(q, k, mask, options, GRADIENTS):
            _fused(work, full, (do, o, lse[..., None]), sums)
    else:
        for work in works(q, k, mask, options, PRODUCTS):
            _products(work, full, (do, lse[..., None], delta[..., None]), sums, dbias)
    found = {name: x.to(q.dtype) for name, x in zip("qkv", sums, strict=True)}
    if dbias is not None and options.bias is not None:
        found["bias"] = dbias.to(options.bias.dtype)
    if options.sinks is not None:
        share = torch.exp(options.sinks.to(dtype)[:, None] - lse)
        found["sinks"] = -(share * delta).sum((0, 2)).to(options.sinks.dtype)
    return found


def _fused(work: Work, qkv: list[Tensor], given: tuple[Tensor, Tensor, Tensor], sums: list[Tensor]) -> None:
    """Adds what one piece gives to the gradients of q, k and v, by torch's own kernel."""
    q, do, o, lse = (work.queries(x) for x in (qkv[0], *given))
    dq = torch.zeros_like(q)
    for run in work.runs:
        k, v = (work.keys(x, run) for x in qkv[1:])
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse[..., 0], 0.0, False, attn_mask=work.added(run), scale=work.options.scale
        )
        for total, part in zip((dq, *(work.keys(x, run) for x in sums[1:])), found, strict=True):
            total += part
    work.put(sums[0], dq)


def _products(
    work: Work, qkv: list[Tensor], given: tuple[Tensor, Tensor, Tensor], sums: list[Tensor], dbias: Tensor | None
) -> None:
    """The same for what torch's kernel cannot do, and for the gradient of the bias."""
    q, do, lse, delta = (work.queries(x) for x in (qkv[0], *given))
    dq, scale, cap = torch.zeros_like(q), work.options.scale, work.options.softcap
    for run in work.runs:
        k, v, dk, dv = (work.keys(x, run) for x in (*qkv[1:], *sums[1:]))
        added = work.added(run)
        s = scores(q, k, None, work.options)
        p = torch.exp((s if added is None else s + added) - lse)
        dv += p.mT @ do
        ds = (do @ v.mT).sub_(delta).mul_(p)
        if dbias is not None:
            _add_bias(dbias, ds, work, run)
        if cap is not None:
            ds *= 1 - (s / cap).square_()
        ds *= scale
        dq += ds @ k
        dk += ds.mT @ q
    work.put(sums[0], dq)


def _add_bias(dbias: Tensor, ds: Tensor, work: Work, run: Run) -> None:
    """Adds gradients of scores (b, g, rows, s) to those of the bias, summed where it is broadcast."""
    piece = work.piece
    rows, heads, queries = (b - a for a, b in (piece.rows, piece.heads, piece.queries))
    part = biased(dbias, piece, run)
    part += ds.reshape(rows, heads, queries, run.last - run.first).sum_to_size(part.shape)
