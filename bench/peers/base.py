"""What all published latent conversions have in common: some channels of the keys turn, the rest shares a latent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from passes.mla_refuse import refuse_site
from passes.mla_shape import budget, constants_are_free, features
from passes.mla_source import known
from passes.refit import HELD_BACK, Measured, Sums, refit
from rewrite.heads import Latents, Rewritten, Weights
from rewrite.site import Latent, Rope, Site

if TYPE_CHECKING:
    from passes import Stats


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthogonal basis of the keys of all heads, (g*d, g*d): rows 2j and 2j + 1 of the first turn together by
    `frequencies[j]`, all later ones lose their rotation."""

    rows: Tensor
    frequencies: Tensor

    @property
    def rope_dim(self) -> int:
        """How many rows turn."""
        return 2 * len(self.frequencies)


@dataclass(frozen=True, eq=False)
class Spread:
    """What a low rank is to keep: `second` (features, features), the moment of y - `about`; `about` (features,) is
    kept exactly by the output's bias."""

    second: Tensor
    about: Tensor


@dataclass(frozen=True, eq=False)
class Still:
    """How what does not turn is compressed: the moment of y, a factor of the still keys while directions are chosen,
    and the choice, from the moment of still keys and values and the number of the former."""

    second: Tensor
    key_scale: float
    directions: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Peer(ABC):
    """A conversion to `cache`, a share of the source's numbers per token. `refit` solves the output projection anew
    on the calibration, which none of them published."""

    name: ClassVar[str] = "peer"
    needs: ClassVar[frozenset[str]] = frozenset()

    cache: float
    refit: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.cache <= 1:
            raise ValueError(f"cache must be more than 0 and at most 1, got {self.cache}")

    def for_site(self, index: int, total: int) -> Peer:
        """Alike for all sites."""
        del index, total
        return self

    def refuse(self, site: Site) -> str | None:
        """Why this site must stay as it is."""
        reason = refuse_site(site, self.rebuilt(site))
        if reason is None and starts(site):
            return "its rotation starts at an angle that is not 0, which this conversion does not know"
        if reason is None and budget(site, self.cache) <= self.rope_dim(site):
            return (
                f"{self.cache:g} of its {site.cache_per_token} cached numbers leaves nothing beside the "
                f"{self.rope_dim(site)} that turn; a cache above {self.rope_dim(site) / features(site):.3g} does"
            )
        return reason

    def after(self, site: Site) -> Site:
        """The site with a latent."""
        turned = self.rope_dim(site)
        return replace(site, form=Latent(budget(site, self.cache) - turned, turned, self.rebuilt(site)))

    def rewrite(self, site: Site, weights: Weights, stats: Stats | None) -> Rewritten:
        """Compress keys and values."""
        reason = self.refuse(site)
        if reason is not None:
            raise ValueError(f"{site.name}: {reason}")
        spread = self.spread(site, weights, stats)
        basis = self.basis(site, stats)
        rank = budget(site, self.cache) - basis.rope_dim
        still = Still(spread.second, self.key_scale(site, basis, spread), partial(self.directions, rank=rank))
        latents = assembled(site, basis, still, self.rebuilt(site))
        made, notes = shifted(site, weights, latents, spread.about), list[str]()
        if self.refit and stats is not None:
            made, note = refit(made, measured(stats.latent(latents), made.out_bias is not None))
            notes += [note] if note else []
        form = Latent(latents.rank, latents.rope_dim, self.rebuilt(site))
        return Rewritten(replace(site, form=form), made, tuple(range(site.heads)), tuple(notes), latents)

    def lossless(self, site: Site) -> Peer:
        """All numbers that there are; methods that take the rotation from some lose by that all the same."""
        del site
        return replace(self, cache=1.0)

    def rebuilt(self, site: Site) -> bool:
        """Whether keys are expanded and turned at every step."""
        del site
        return False

    def rope_dim(self, site: Site) -> int:
        """Numbers cached turned."""
        del site
        return 0

    def key_scale(self, site: Site, basis: Basis, spread: Spread) -> float:
        """Factor of the still keys while ranks are chosen."""
        del site, basis, spread
        return 1.0

    def directions(self, second: Tensor, keys: int, rank: int) -> Tensor:
        """(n, rank) orthonormal: what is cached of still keys (the first `keys`) and values, from their moment."""
        del keys
        return top(second, rank)

    @abstractmethod
    def spread(self, site: Site, weights: Weights, stats: Stats | None) -> Spread:
        """The moments that a low rank is to keep."""

    @abstractmethod
    def basis(self, site: Site, stats: Stats | None) -> Basis:
        """Which keys turn."""


def starts(site: Site) -> bool:
    """Whether a rotation starts anywhere but at 0."""
    ropes: tuple[Rope | None, ...] = (site.q.rope, site.k.rope)
    return any(r is not None and bool(r.start.any()) for r in ropes)


def from_weights(site: Site, weights: Weights) -> Spread:
    """W Wᵀ of keys and values over one another: inputs white, biases apart where the output's bias takes them."""
    seen = known(site, weights, None)
    about = biases(site, weights)
    kept = seen.mean - about
    return Spread(seen.second - torch.outer(seen.mean, seen.mean) + torch.outer(kept, kept), about)


def measured_moments(stats: Stats | None, about: Tensor) -> Spread:
    """E[(y - about)(y - about)ᵀ] over the calibration."""
    if stats is None:
        raise ValueError("this conversion reads activations; give calibration")
    total = stats.moments["kv_gram"] / stats.moments["kv_gram"][-1, -1]
    second, mean = (total + total.T)[:-1, :-1] / 2, total[-1, :-1]
    return Spread(
        second - torch.outer(mean, about) - torch.outer(about, mean) + torch.outer(about, about),
        about,
    )


def biases(site: Site, weights: Weights) -> Tensor:
    """(features,) what y is at input 0, where a constant in it costs nothing; else zeros."""
    bias = known(site, weights, None).mean
    return bias if site.k.rope is None and constants_are_free(site) else torch.zeros_like(bias)


def assembled(site: Site, basis: Basis, still: Still, rebuilt: bool) -> Latents:
    """Keys in the basis: the turning ones cached as they are, the still ones and the values in some directions."""
    g, d, dv, kv = site.k.heads, site.k.dim, site.v.dim, list(site.kv_of)
    turned, rest = basis.rows[: basis.rope_dim], basis.rows[basis.rope_dim :]
    values = torch.eye(site.v.heads * dv, dtype=torch.float64)
    scale = torch.cat([torch.full((len(rest),), still.key_scale), torch.ones(len(values))]).double()
    rows = torch.block_diag(rest, values) * scale[:, None]
    u = still.directions(rows @ still.second @ rows.T, len(rest))
    up = u / scale[:, None]
    up_k = (rest.T @ up[: len(rest)]).reshape(g, d, -1)
    none = torch.zeros(site.heads, 0 if rebuilt else basis.rope_dim, d, dtype=torch.float64)
    query = basis.rows.reshape(-1, g, d).transpose(0, 1)[kv]
    return Latents(
        down=u.T @ rows,
        turn=torch.cat([turned, torch.zeros(len(turned), len(values), dtype=torch.float64)], 1),
        read=torch.zeros_like(up_k.mT[kv]) if rebuilt else up_k.mT[kv],
        query_turn=none if rebuilt else query[:, : basis.rope_dim],
        up_v=up[len(rest) :].reshape(site.v.heads, dv, -1)[kv],
        frequencies=basis.frequencies,
        up_k=up_k if rebuilt else None,
    )


def top(second: Tensor, rank: int) -> Tensor:
    """(n, rank) eigenvectors of the largest eigenvalues."""
    _, vectors = torch.linalg.eigh((second + second.T) / 2)
    return vectors[:, max(len(vectors) - rank, 0) :].flip(1)


def still_basis(site: Site) -> Basis:
    """Nothing turns apart."""
    n = site.k.heads * site.k.dim
    return Basis(torch.eye(n, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))


def shifted(site: Site, weights: Weights, latents: Latents, about: Tensor) -> Weights:
    """The output's bias with what the latent leaves out of the values' constant."""
    if weights.out_bias is None:
        return weights
    keys = site.k.heads * site.k.dim
    constant = about[keys:].reshape(site.v.heads, site.v.dim)[list(site.kv_of)]
    lost = constant - latents.up_v @ (latents.down @ about)
    return replace(weights, out_bias=weights.out_bias + torch.einsum("ohd,hd->o", weights.out, lost))


def measured(trials: Iterable[tuple[Tensor, Tensor]], biased: bool) -> Measured:
    """Moments for a refit from (heads' outputs, original output) per batch."""
    sums: list[Sums] = []
    for z, y in trials:
        flat = z.double().flatten(1)
        flat = torch.cat([flat, torch.ones_like(flat[:, :1])], 1) if biased else flat
        cut = len(flat) - len(flat) // HELD_BACK
        now = [_sums(flat[:cut], y[:cut].double()), _sums(flat[cut:], y[cut:].double())]
        sums = [a + b for a, b in zip(sums, now, strict=True)] if sums else now
    if not sums:
        raise ValueError("the calibration holds no batch")
    return Measured(*sums)


def _sums(z: Tensor, y: Tensor) -> Sums:
    return Sums(z.T @ z, y.T @ z, float(y.square().sum()), len(z))
