"""What merging heads needs to know about a site: second moments of its queries, keys and values, and its distances.

From calibration sums where there are any, else from the weights alone (inputs white, distances unknown).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passes.moments import coordinates, frequencies
from rewrite.heads import Heads, Weights
from rewrite.site import Norm, Operand, Sink, Site, Softcap

SUPPOSED = 1024
"""Tokens that attention is supposed to reach where nothing was measured."""
PRIOR = 5
"""What the weights say of second moments counts as so many tokens per row of the keys: few tokens have directions of
their own, which a merge would follow. Those of a text are no independent draws, hence more than 1."""
PRIOR_DISTANCES = 1
"""The same for distances, whose moments are no matrix to be divided by."""
FLOOR = 1e-12
"""What is smaller than this part of the layer's largest value counts as nothing (a dead head)."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moment of all heads at once, (g, d, g, d), and the mean, (g, d); neither is centred."""

    second: Tensor
    mean: Tensor

    def of(self, members: tuple[int, ...]) -> Gram:
        """The same of some heads."""
        pick = list(members)
        return Gram(self.second[pick][:, :, pick], self.mean[pick])

    @property
    def centred(self) -> Tensor:
        """The covariance, (g, d, g, d)."""
        return self.second - torch.einsum("ga,hb->gahb", self.mean, self.mean)


@dataclass(frozen=True, eq=False)
class Facts:
    """Moments of one site. Complex arrays are in the coordinates of `passes.moments.coordinates`."""

    site: Site
    q: Tensor
    """(h, d, d) E[q qᵀ]."""
    k: Gram
    v: Gram
    k_inverse: Tensor
    """(g,) E[1/rho] of the key norm, rho what it divides by; ones without a norm."""
    v_inverse: Tensor
    far: Tensor
    """(h, d, d) E[e^{i(φ_a - φ_b)Δ}] under attention: how the rope turns errors of the keys."""
    mean_far: Tensor
    """(h, d, d) the part of `far` that all keys of a query share; zero where softmax does not ignore it."""
    even: Tensor
    """(h, d, d) as `far`, every visible key equal."""
    value_weight: Tensor
    """(h, dv, dv) what an error of the head's value costs at the output: W_oᵀ W_o."""
    key_weight: Tensor
    """(h,) what a squared error of the head's score costs at the output."""
    unitary: Tensor
    """(d, d) the map to the complex coordinates."""
    measured: bool

    @property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Query heads of every kv head."""
        return readers(self.site)


def readers(site: Site) -> tuple[tuple[int, ...], ...]:
    """Query heads of every kv head."""
    return tuple(tuple(j for j, g in enumerate(site.kv_of) if g == i) for i in range(site.k.heads))


def shift_invariant(site: Site) -> bool:
    """Softmax ignores what all scores of a query share, unless a cap or a sink compares them with a constant."""
    return not any(isinstance(m, (Softcap, Sink)) for m in site.mods)


def facts(site: Site, weights: Weights, moments: Mapping[str, Tensor] | None) -> Facts:
    """Moments of the site from calibration sums, drawn towards those of the weights where tokens are few; or from
    the weights alone."""
    supposed = _facts(site, weights, None)
    if moments is None:
        return supposed
    seen, rows, tokens = _facts(site, weights, moments), site.k.rows.size, float(moments["k_gram"][-1, -1])
    share, distances = (n * rows / (n * rows + tokens) for n in (PRIOR, PRIOR_DISTANCES))
    return replace(
        seen,
        q=_drawn(seen.q, supposed.q, share),
        k=_about_the_mean(seen.k, supposed.k, share),
        v=_about_the_mean(seen.v, supposed.v, share),
        far=torch.lerp(seen.far, supposed.far, distances),
        mean_far=torch.lerp(seen.mean_far, supposed.mean_far, distances),
        even=torch.lerp(seen.even, supposed.even, distances),
    )


def _drawn(seen: Tensor, supposed: Tensor, share: float) -> Tensor:
    """(..., d, d) between what was seen and what is supposed, made as large in all as what was seen."""
    size, wanted = (float(x.diagonal(dim1=-2, dim2=-1).sum()) for x in (supposed, seen))
    return torch.lerp(seen, supposed * (wanted / max(size, 1e-300)), share)


def _about_the_mean(seen: Gram, supposed: Gram, share: float) -> Gram:
    """The covariance so; the mean stays, which few tokens tell well enough."""
    rows = seen.mean.numel()
    spread = _drawn(seen.centred.reshape(rows, rows), supposed.centred.reshape(rows, rows), share)
    return Gram(spread.reshape(seen.second.shape) + torch.einsum("ga,hb->gahb", seen.mean, seen.mean), seen.mean)


def _facts(site: Site, weights: Weights, moments: Mapping[str, Tensor] | None) -> Facts:
    if moments is None:
        q, k, v = (_from_weights(h, o) for h, o in ((weights.q, site.q), (weights.k, site.k), (weights.v, site.v)))
        each = torch.arange(site.heads)
        q_gram = q.second[each, :, each]
        inverse = tuple(_inverse_from_weights(h, o.norm) for h, o in ((weights.k, site.k), (weights.v, site.v)))
    else:
        k, v = _gram(moments["k_gram"], site.k), _gram(moments["v_gram"], site.v)
        q_gram = moments["q_gram"] / moments["k_gram"][-1, -1]
        inverse = tuple(moments[n][:-1] / moments[n][-1] for n in ("k_inverse", "v_inverse"))
    far, mean_far, even = _phases(site, None if moments is None else moments["phases"])
    value_weight = torch.einsum("ohd,ohe->hde", weights.out, weights.out)
    kv = torch.tensor(site.kv_of)
    spread = v.centred[kv, :, kv]
    scale = torch.tensor(site.scale, dtype=torch.float64).expand(site.heads)
    return Facts(
        site=site,
        q=q_gram,
        k=k,
        v=v,
        k_inverse=inverse[0],
        v_inverse=inverse[1],
        far=far,
        mean_far=mean_far if shift_invariant(site) else torch.zeros_like(mean_far),
        even=even,
        value_weight=value_weight,
        key_weight=floored(torch.einsum("hde,hed->h", value_weight, spread) * scale.square()),
        unitary=coordinates(site.k.rope, site.k.dim),
        measured=moments is not None,
    )


def floored(weights: Tensor) -> Tensor:
    """Weights of heads with dead ones raised to a small part of the layer's largest: none divides by zero."""
    return weights.clamp(min=max(float(weights.max()) * FLOOR, torch.finfo(torch.float64).tiny))


def _gram(total: Tensor, operand: Operand) -> Gram:
    total = total / total[-1, -1]
    g, d = operand.heads, operand.dim
    return Gram(((total + total.T) / 2)[:-1, :-1].reshape(g, d, g, d), total[-1, :-1].reshape(g, d))


def _from_weights(heads: Heads, operand: Operand) -> Gram:
    """White inputs; where a norm follows, its mean effect is a factor."""
    factor = heads.gain * _inverse_from_weights(heads, operand.norm)[:, None]
    w = heads.weight * factor[..., None]
    mean = factor * heads.bias if heads.bias is not None else torch.zeros_like(factor)
    return Gram(torch.einsum("gax,hbx->gahb", w, w) + torch.einsum("ga,hb->gahb", mean, mean), mean)


def _inverse_from_weights(heads: Heads, norm: Norm | None) -> Tensor:
    """(heads,) 1/ρ of white inputs of unit variance."""
    energy = heads.weight.square().sum((1, 2))
    if heads.bias is not None:
        energy = energy + heads.bias.square().sum(1)
    if norm is None:
        return torch.ones_like(energy)
    if norm.over == "row":
        energy = energy.mean().expand_as(energy) * (len(energy) if norm.kind == "l2" else 1.0)
    size = energy if norm.kind == "l2" else energy / heads.weight.shape[1]
    return (size + norm.eps).rsqrt()


def _phases(site: Site, total: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(far, mean_far, even), each (h, d, d)."""
    if site.k.rope is not None and site.k.rope.table is not None:
        return _uniform(site)
    if total is None:
        return _uniform(site) if site.k.rope is None or site.k.norm is not None else _supposed(site)
    far, mean, even = torch.view_as_complex(total.contiguous())
    start = _starts(site)
    turn = torch.outer(start, start.conj())
    count = far[:, :1, :1].real.clamp(min=1.0)
    return far / count * turn, mean / count * turn, even / even[:, :1, :1].real.clamp(min=1.0) * turn


def _uniform(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Rotating pairs have any phase, so that nothing but equal coordinates goes together: the safe guess where
    angles are a table, or where a norm follows (it makes every error of a merge across pairs larger)."""
    d, rope = site.k.dim, site.k.rope
    turning = torch.zeros(d, dtype=torch.bool)
    if rope is not None:
        turning[torch.from_numpy(rope.pairs.reshape(-1))] = True
    still = (~turning).double()
    plain = torch.outer(still, still)
    full = (plain + torch.diag(turning.double())).to(torch.complex128).expand(site.heads, d, d)
    return full, plain.to(torch.complex128).expand(site.heads, d, d), full


def _supposed(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Attention that falls with the distance as 1 / (1 + distance), which is near what trained heads do on average."""
    ahead = bool(site.mask.table(2, 2)[0, 1])
    distance = torch.arange(-SUPPOSED, SUPPOSED + 1 if ahead else 1, dtype=torch.float64)
    p = 1 / (1 + distance.abs())
    p = (p / p.sum()).to(torch.complex128)
    turn = torch.polar(torch.ones_like(distance)[:, None], distance[:, None] * frequencies(site.k)) * _starts(site)
    far, mean = (turn.T * p) @ turn.conj(), turn.T @ p
    heads = (site.heads, -1, -1)
    return far.expand(heads), torch.outer(mean, mean.conj()).expand(heads), far.expand(heads)


def _starts(site: Site) -> Tensor:
    """(d,) e^{i(start of k - start of q)} per coordinate."""
    angle = torch.zeros(site.k.dim, dtype=torch.float64)
    q, k = site.q.rope, site.k.rope
    if q is not None and k is not None and len(k.start) and len(q.start):
        gap = torch.from_numpy(k.start - q.start).double()
        angle[k.pairs[:, 0]] = gap
        angle[k.pairs[:, 1]] = -gap
    return torch.polar(torch.ones_like(angle), angle)
