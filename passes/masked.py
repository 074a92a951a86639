"""A site's heads with fewer keys, on one batch: the original's own probabilities, those of hidden keys shared out anew.

Softmax over fewer keys is softmax over all of them, divided by what is left: scores, caps, biases and norms need no
second way. A sink keeps what it had before the division.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from passes.moments import SiteBatch, apart, windowed
from rewrite.mask import Mask
from rewrite.site import Sink

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Part:
    """Some queries of a batch: p (b, h, t, s) the original's probabilities, v (b, h, s, dv), positions in keys."""

    p: Tensor
    v: Tensor
    at: Tensor
    """(t,) positions of the queries"""
    sink: Tensor | float = 0.0
    """(b, h, t, 1) what p lacks of one, which a sink takes"""

    def outputs(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Of heads that read where `keep` (h or 1, t, s) is True: z (b, h, t, dv), and the probability (b, h, t, 1) of
        what is not read."""
        kept = self.p * keep
        # a sum of what is left, for one less what is hidden would be all rounding where a peak is hidden
        left = kept.sum(-1, keepdim=True) + self.sink
        return (kept @ self.v).div_(left.clamp_min(torch.finfo(self.p.dtype).tiny)), 1 - left


def parts(batch: SiteBatch, dtype: torch.dtype = torch.float64) -> Iterator[Part]:
    """All queries of a batch, some at a time."""
    batch = windowed(batch)
    (b, h, t, _), s = batch.q.shape, batch.k.shape[2]
    sunk = any(isinstance(mod, Sink) for mod in batch.site.mods)
    v = batch.v[:, list(batch.site.kv_of)].to(dtype)
    for queries in apart(t, b * h * s):
        p = batch.some(ALL, queries)[..., :s].to(dtype)
        yield Part(p, v, queries + s - t, (1 - p.sum(-1, keepdim=True)).clamp_min(0) if sunk else 0.0)


def masked_outputs(mask: Mask, batch: SiteBatch) -> Tensor:
    """(tokens, h, dv) of every token of the batch."""
    found = [part.outputs(table(mask, part.at, part.p.shape[-1], batch.site.heads))[0] for part in parts(batch)]
    return torch.cat(found, 2).transpose(1, 2).flatten(0, 1)


def table(mask: Mask, at: Tensor, keys: int, heads: int) -> Tensor:
    """(heads or 1, queries, keys) booleans at the positions `at` of the queries."""
    return torch.from_numpy(mask.by_head(at.numpy()[:, None], np.arange(keys)[None], heads))
