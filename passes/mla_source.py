"""What compressing keys and values into a latent needs to know about a site: moments of y, and what errors cost.

y (features,) of a token: keys of all kv heads after norm, gain and shift and before the rope, then values.
From calibration sums where there are any, else from the weights alone (inputs white, distances supposed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passes.gqa_source import SUPPOSED, facts, floored, readers, shift_invariant
from passes.gqa_values import carries_mean
from passes.mla_basis import basis, keys_values
from passes.moments import frequencies
from rewrite.heads import Latents, Weights
from rewrite.shared import shared
from rewrite.site import Site


@dataclass(frozen=True, eq=False)
class Known:
    """Moments of one site; complex numbers stand for its rotating pairs."""

    site: Site
    second: Tensor
    """(features, features) E[y yᵀ]"""
    mean: Tensor
    """(features,)"""
    q: Tensor
    """(h, d, d) E[q qᵀ]"""
    stand_in: Tensor
    """(h, pairs) complex: E[e^{iθΔ}] under attention, the best constant in place of the rotation"""
    value_cost: Tensor
    """(h, dv, dv) what an error of the head's value costs at the output: W_oᵀ W_o"""
    score_cost: Tensor
    """(h,) what a squared error of the head's score costs at the output"""
    mix: Tensor | None
    """(features, features) what stands for the second moment where it was measured better"""
    centred: bool
    """A constant in y changes nothing that the output's bias cannot give back."""
    basis: Tensor | None = None
    """(keys and values, features) from y to them; None where y is them (passes/mla_basis.py)"""

    @property
    def key_rows(self) -> Tensor:
        """(g, d, features) keys as a function of y."""
        return self._rows[: self.keys].unflatten(0, (self.site.k.heads, -1))

    @property
    def value_rows(self) -> Tensor:
        """(g, dv, features) values as a function of y."""
        return self._rows[self.keys :].unflatten(0, (self.site.v.heads, -1))

    def of_keys(self, maps: Tensor) -> Tensor:
        """(n, features): maps of the keys, (n, g * d), as maps of y."""
        if self.basis is not None:
            return maps @ self.basis[: self.keys]
        return torch.cat([maps, maps.new_zeros(len(maps), len(self.mean) - self.keys)], 1)

    @property
    def _rows(self) -> Tensor:
        return torch.eye(len(self.mean), dtype=torch.float64) if self.basis is None else self.basis

    def blocks(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """(g, d, d) and (g, dv, dv) moments of every head's own keys and values, of moments of y."""
        site, first = self.site, self.keys
        g, d, dv = site.k.heads, site.k.dim, site.v.dim
        if self.basis is not None:
            return tuple(x @ moments @ x.mT for x in (self.key_rows, self.value_rows))  # type: ignore[return-value]
        k = torch.stack([moments[i * d :, i * d :][:d, :d] for i in range(g)])
        return k, torch.stack([moments[first + i * dv :, first + i * dv :][:dv, :dv] for i in range(g)])

    def paired(self, a: Tensor, b: Tensor) -> Tensor:
        """(g, g, pairs) second moments of dim a[j] of one head's keys with dim b[j] of another's."""
        site, first = self.site, self.keys
        if self.basis is not None:
            rows = self.key_rows
            return torch.einsum("ijx,njx->inj", rows[:, a] @ self.second, rows[:, b])
        k = self.second[:first, :first].reshape(site.k.heads, site.k.dim, site.k.heads, site.k.dim)
        return k[:, a][:, :, :, b].diagonal(dim1=1, dim2=3)

    @property
    def spread(self) -> Tensor:
        """(features, features) the second moment that counts: the covariance where constants are free."""
        if self.mix is not None:
            return self.mix
        return self.second - torch.outer(self.mean, self.mean) if self.centred else self.second

    @property
    def keys(self) -> int:
        """How many of the features are keys."""
        return self.site.k.heads * self.site.k.dim

    @property
    def pairs(self) -> Tensor:
        """(pairs, 2) dims of a head that turn together."""
        rope = self.site.k.rope
        return torch.zeros(0, 2, dtype=torch.long) if rope is None else torch.from_numpy(rope.pairs).long()

    @property
    def plain(self) -> Tensor:
        """Dims of a head that never turn."""
        return plain_dims(self.site)


def plain_dims(site: Site) -> Tensor:
    """Dims of a key head that never turn."""
    still = torch.ones(site.k.dim, dtype=torch.bool)
    if site.k.rope is not None:
        still[torch.from_numpy(site.k.rope.pairs).long().reshape(-1)] = False
    return still.nonzero()[:, 0]


def known(site: Site, weights: Weights, moments: Mapping[str, Tensor] | None, tokens: int = 0) -> Known:
    """From calibration sums over `tokens` queries, or from the weights alone."""
    if moments is None:
        second, mean, q = _from_weights(site, weights)
        stand_in = _supposed(site)
    else:
        total = moments["kv_gram"] / moments["kv_gram"][-1, -1]
        second, mean = (total + total.T)[:-1, :-1] / 2, total[-1, :-1]
        q = moments["q_gram"] / max(tokens, 1)
        stand_in = _measured(site, moments["turns"])
    value_cost = torch.einsum("ohd,ohe->hde", weights.out, weights.out)
    scale = torch.tensor(site.scale, dtype=torch.float64).expand(site.heads) * after(site)
    made = Known(
        site=site,
        second=second,
        mean=mean,
        q=(q + q.transpose(1, 2)) / 2,
        stand_in=stand_in,
        value_cost=value_cost,
        score_cost=scale,
        mix=None,
        centred=shift_invariant(site) and carries_mean(site, weights),
        basis=basis(site, weights),
    )
    _, spread = made.blocks(second - torch.outer(mean, mean))
    cost = torch.einsum("hde,hed->h", value_cost, spread[list(site.kv_of)]) * scale.square()
    return replace(made, score_cost=floored(cost))


def after(site: Site) -> float:
    """The factor that scores take from what stands behind the rope."""
    factor = 1.0
    for values in (site.q.after, site.k.after):
        factor *= 1.0 if values is None else float(values.constant.reshape(-1)[0])
    return factor


def per_kv_head(site: Site, values: Tensor) -> Tensor:
    """(g, ...) sums over the query heads that read a kv head, of (h, ...)."""
    return torch.stack([values[list(heads)].sum(0) for heads in readers(site)])


def start_gap(site: Site) -> Tensor:
    """(pairs,) angle between key and query at distance 0."""
    q, k = site.q.rope, site.k.rope
    if q is None or k is None:
        return torch.zeros(0, dtype=torch.float64)
    return torch.from_numpy(k.start - q.start).double()


def shifted(seen: Known, weights: Weights, latents: Latents) -> Weights:
    """The output's bias with the mean of the values that the latent does not give back."""
    if weights.out_bias is None or not seen.centred:
        return weights
    site = seen.site
    _, values = keys_values(site, seen.basis, seen.mean)
    mean = values.reshape(site.v.heads, site.v.dim)[list(site.kv_of)]
    lost = mean - latents.up_v @ (latents.down @ seen.mean)
    return replace(weights, out_bias=weights.out_bias + torch.einsum("ohd,hd->o", weights.out, lost))


def _from_weights(site: Site, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    if shared(site) is not None:
        size = weights.k.weight.shape[-1]
        q = weights.q.weight * weights.q.gain[..., None]
        return torch.eye(size, dtype=q.dtype), torch.zeros(size, dtype=q.dtype), q @ q.mT
    base = facts(site, weights, None)
    parts: list[tuple[Tensor, Tensor]] = []
    for heads, inverse in ((weights.k, base.k_inverse), (weights.v, base.v_inverse)):
        factor = heads.gain * inverse[:, None]
        bias = torch.zeros_like(factor) if heads.bias is None else factor * heads.bias
        parts.append(((heads.weight * factor[..., None]).flatten(0, 1), bias.flatten()))
    (k, kb), (v, vb) = parts
    mean = torch.cat([kb, vb])
    if site.k.roots[0].source == site.v.roots[0].source and k.shape[1] == v.shape[1]:
        w = torch.cat([k, v])
        second = w @ w.T
    else:
        second = torch.block_diag(k @ k.T, v @ v.T)
    return second + torch.outer(mean, mean), mean, base.q


def _measured(site: Site, sums: Tensor) -> Tensor:
    """(h, pairs) complex."""
    total = torch.view_as_complex(sums.contiguous())
    rope = site.k.rope
    pairs = [] if rope is None else rope.pairs[:, 0].tolist()
    return total[:, pairs] / total[:, -1:].real.clamp(min=1e-300)


def _supposed(site: Site) -> Tensor:
    """Attention that falls with the distance as 1 / (1 + distance), which is near what trained heads do on average."""
    ahead = bool(site.mask.table(2, 2)[0, 1])
    distance = torch.arange(-SUPPOSED, SUPPOSED + 1 if ahead else 1, dtype=torch.float64)
    p = 1 / (1 + distance.abs())
    pairs = [] if site.k.rope is None else site.k.rope.pairs[:, 0].tolist()
    angles = distance[:, None] * frequencies(site.k)[pairs]
    mean = ((p / p.sum())[:, None] * torch.polar(torch.ones_like(angles), angles)).sum(0)
    return mean.expand(site.heads, -1)
