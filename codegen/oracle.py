"""The oracle of block-sparse attention: dense, in eager PyTorch, with every option. Every back end is held to it.

Autograd differentiates it, in float64 as in any dtype; it is no back end, for it holds all scores at once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from codegen.options import Options
from rewrite.mask import Mask


def kept(mask: Mask, heads: int, queries: int, spans: list[tuple[int, int]], keys: int) -> Tensor:
    """(b, h, t, s) booleans: which keys each query reads; padding reads nothing and is read by none."""
    table = np.zeros((len(spans), heads, queries, keys), dtype=bool)
    of_head = np.arange(heads)[:, None, None]
    for row, (t, s) in enumerate(spans):
        at_q, at_k = np.arange(t)[:, None] + s - t, np.arange(s)[None]
        table[row, :, :t, :s] = mask.holds(at_q, at_k, of_head, row, s - t)
    return torch.from_numpy(table)


def scores(q: Tensor, k: Tensor, options: Options, spans: list[tuple[int, int]]) -> Tensor:
    """(b, h, t, s) as the softmax takes them, before the mask."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s_bhts = options.scale * (q @ k.transpose(-1, -2))
    if options.softcap is not None:
        s_bhts = options.softcap * torch.tanh(s_bhts / options.softcap)
    if options.bias is not None:
        s_bhts = s_bhts + options.bias
    if options.slopes is not None:
        offset = torch.tensor([s - t for t, s in spans], device=q.device)[:, None, None, None]
        at_q, at_k = (torch.arange(n, device=q.device) for n in s_bhts.shape[2:])
        back = at_q[:, None] + offset - at_k
        s_bhts = s_bhts - options.slopes.to(s_bhts)[:, None, None] * back
    return s_bhts


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: Options) -> tuple[Tensor, Tensor]:
    """(o, lse) in the dtype of q, differentiable in q, k, v, the bias and the sinks."""
    spans = options.spans(q.shape[0], q.shape[2], k.shape[2])
    keep = kept(mask, q.shape[1], q.shape[2], spans, k.shape[2]).to(q.device)
    s_bhts = scores(q, k, options, spans).masked_fill(~keep, -torch.inf)
    real = torch.tensor([t for t, _ in spans], device=q.device)[:, None] > torch.arange(q.shape[2], device=q.device)
    if options.sinks is not None:
        column = options.sinks.to(q)[:, None, None].expand(*s_bhts.shape[:3], 1)
        s_bhts = torch.cat([s_bhts, column.masked_fill(~real[:, None, :, None], -torch.inf)], -1)
    # -inf - 0 keeps rows without keys free of NaN, in the gradient too
    top = s_bhts.detach().amax(-1, keepdim=True) if s_bhts.shape[-1] else s_bhts.new_zeros(*s_bhts.shape[:3], 1)
    top = top.masked_fill(top == -torch.inf, 0)
    p_bhts = torch.exp(s_bhts - top)
    total = p_bhts.sum(-1)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    o = p_bhts[..., : k.shape[2]] @ v / total[..., None]
    return o, (top[..., 0] + total.log()).masked_fill(empty, -torch.inf)
