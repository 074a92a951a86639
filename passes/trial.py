"""One site's attention on one batch, from what the original gives: queries, keys, values, and what is added to scores.

The original's probabilities give mask and additive biases back: log p - f(original score) is what was added, up to a
number per query that softmax ignores. So nothing here needs to know how the model spells its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.eager import rotated, scored
from codegen.latent import attention, features
from passes.masked import masked_outputs
from passes.mla_basis import of_tokens
from passes.moments import SiteBatch, apart, windowed
from rewrite.heads import Latents, Rewritten
from rewrite.site import Affine, Sink, Site, Sparse

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Trial:
    """q (b, h, t, d), k (b, g, s, d), v (b, g, s, dv), before the rope; p (b, h, t, s)."""

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    raw_k: Tensor
    """(b, g, s, d) keys before their norm, where they have one"""
    p: Tensor
    added: Tensor
    """(b, h, t, s) mask and biases; -inf where nothing is seen"""
    sink: Tensor | None
    """(b, h, t, 1) the logit of what attention leaves out"""
    at: Tensor
    """(t,) positions of the queries"""
    back: Tensor | None
    """(features, keys and values) as in the batch"""

    @property
    def y(self) -> Tensor:
        """(b, s, features) what a latent is made of."""
        return of_tokens(self.k, self.v, self.back)

    @property
    def raw(self) -> Tensor:
        """The same with keys before their norm."""
        return features(self.raw_k, self.v)

    def latent(self, latents: Latents) -> Tensor:
        """(b, h, t, dv): the heads' outputs with a latent in place of keys and values."""
        y = self.y if latents.key_norm is None else self.raw
        return attention(latents, self.site, self.q, y, added=self.added, sink=self.sink, q_at=self.at)

    def original(self) -> Tensor:
        """(b, h, t, dv): the heads' outputs."""
        return self.p @ self.v[:, list(self.site.kv_of)]


def trial(
    batch: SiteBatch, windows: slice = ALL, queries: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Trial:
    """Some windows of the batch and some of their queries, or all, taken apart. Factors that stand after the rope, one
    number each, are in `q`."""
    batch = windowed(batch)
    site, (t, s) = batch.site, (batch.q.shape[2], batch.k.shape[2])
    of = torch.arange(t) if queries is None else queries
    exact, at_q = batch.some(windows, of)[..., :s], of + s - t
    # keys behind the last one that is seen, as a causal mask leaves them, would only cost time
    seen = (exact.amax((0, 1, 2)) > 0).nonzero()
    last = int(seen[-1]) + 1 if len(seen) else s
    exact, at = exact[..., :last], torch.arange(last)
    q = (batch.q[windows][:, :, of] * (uniform(site.q.after) * uniform(site.k.after))).to(dtype)
    k, v = batch.k[windows][:, :, :last].to(dtype), batch.v[windows][:, :, :last].to(dtype)
    p = exact.to(dtype)
    turned_q = q if site.q.rope is None else rotated(site.q.rope, q, at_q)
    turned_k = k if site.k.rope is None else rotated(site.k.rope, k, at)
    plain = scored(site, turned_q @ turned_k[:, list(site.kv_of)].transpose(-1, -2))
    added = plain.neg_().add_(p.clamp(min=torch.finfo(dtype).tiny).log_()).masked_fill_(p <= 0, -torch.inf)
    sink = None
    if any(isinstance(m, Sink) for m in site.mods):
        sink = (1 - exact.sum(-1, keepdim=True)).clamp(min=1e-300).log().to(dtype)
    raw_k = k if site.k.norm is None else batch.raw_k[windows][:, :, :last].to(dtype)
    return Trial(site, q, k, v, raw_k, p, added, sink, at_q, batch.back)


def heads_outputs(latents: Latents, batch: SiteBatch) -> Tensor:
    """(tokens, h, dv) of every token of the batch."""
    batch = windowed(batch)
    b, h, t, _ = batch.q.shape
    some = apart(t, b * h * batch.k.shape[2])
    z = torch.cat([trial(batch, ALL, queries).latent(latents) for queries in some], 2)
    return z.transpose(1, 2).flatten(0, 1)


def inner(made: Rewritten) -> Callable[[SiteBatch], Tensor] | None:
    """Heads' outputs (tokens, h, dv) of a batch, where the site's own operations give them with no tensors."""
    latents, mask = made.latents, made.site.mask
    if latents is not None:
        return lambda batch: heads_outputs(latents, batch)
    return (lambda batch: masked_outputs(mask, batch)) if isinstance(made.site.form, Sparse) else None


def uniform(after: Affine | None) -> float:
    """The one number of a factor that is alike for all heads and dims."""
    return 1.0 if after is None else float(after.constant.reshape(-1)[0])
