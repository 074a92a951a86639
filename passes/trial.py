"""One site's attention on one batch, from what the original gives: queries, keys, values, and what is added to scores.

The original's probabilities give mask and additive biases back: log p - f(original score) is what was added, up to a
number per query that softmax ignores. So nothing here needs to know how the model spells its mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.eager import rotated, scored
from codegen.latent import attention
from passes.moments import SiteBatch, windowed
from rewrite.heads import Latents
from rewrite.site import Affine, Sink, Site


@dataclass(frozen=True, eq=False)
class Trial:
    """q (b, h, t, d), k (b, g, s, d), v (b, g, s, dv), before the rope and in float64; p (b, h, t, s)."""

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    added: Tensor
    """(b, h, t, s) mask and biases; -inf where nothing is seen"""
    sink: Tensor | None
    """(b, h, t, 1) the logit of what attention leaves out"""
    y: Tensor
    """(b, s, features) what a latent is made of"""

    def latent(self, latents: Latents) -> Tensor:
        """(b, h, t, dv): the heads' outputs with a latent in place of keys and values."""
        return attention(latents, self.site, self.q, self.y, added=self.added, sink=self.sink)

    def original(self) -> Tensor:
        """(b, h, t, dv): the heads' outputs."""
        return self.p @ self.v[:, list(self.site.kv_of)]


def trial(batch: SiteBatch) -> Trial:
    """The batch taken apart. Factors that stand after the rope, one number each, are in `q`."""
    batch = windowed(batch)
    site = batch.site
    q, k, v = batch.q.double() * uniform(site.q.after) * uniform(site.k.after), batch.k.double(), batch.v.double()
    p = batch.p()[..., : k.shape[2]].double()
    at = torch.arange(k.shape[2])
    turned_q = q if site.q.rope is None else rotated(site.q.rope, q, at[len(at) - q.shape[2] :])
    turned_k = k if site.k.rope is None else rotated(site.k.rope, k, at)
    plain = scored(site, turned_q @ turned_k[:, list(site.kv_of)].transpose(-1, -2))
    added = (p.clamp(min=1e-300).log() - plain).masked_fill(p <= 0, -torch.inf)
    sink = None
    if any(isinstance(m, Sink) for m in site.mods):
        sink = (1 - p.sum(-1, keepdim=True)).clamp(min=1e-300).log()
    return Trial(site, q, k, v, p, added, sink, batch.y.double())


def heads_outputs(latents: Latents, batch: SiteBatch) -> Tensor:
    """(tokens, h, dv) of every token of the batch."""
    z = trial(batch).latent(latents)
    return z.transpose(1, 2).flatten(0, 1)


def uniform(after: Affine | None) -> float:
    """The one number of a factor that is alike for all heads and dims."""
    return 1.0 if after is None else float(after.constant.reshape(-1)[0])
