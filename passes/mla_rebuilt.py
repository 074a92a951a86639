"""The rebuilt form: one latent of keys and values, from which keys are expanded, normed and turned at every step.

Where the keys have a norm the latent is of raw ones, which are linear in the inputs as the values are; what an error of
theirs costs is what it costs behind the norm, through the norm's derivative at the tokens seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from passes.eigen import eigh, eigvalsh, rooted
from passes.gqa_source import PRIOR
from passes.mla_absorb import balanced
from passes.mla_influence import Influence, influence, mixed, query_metric
from passes.mla_scene import Scene
from passes.mla_search import ALONE, WIDE_FACTORS, Trials, search_factor, wide
from passes.mla_source import Known, known, per_kv_head
from passes.moments import divisor, raw_gram
from rewrite.heads import KeyNorm, Latents, Weights
from rewrite.modules import caches_raw, key_norm, raw_site, raw_weights
from rewrite.site import Site

if TYPE_CHECKING:
    from passes import Stats

Moments = Literal["mixed", "plain", "white"]
DRAWN = 1024
"""Tokens that stand for the inputs where nothing is measured."""


@dataclass(frozen=True)
class Way:
    """What measuring chooses: the moments that a low rank is to keep, whether errors count as what they cost or all
    alike, and the factor of the keys' errors against the values'.

    Moments: "mixed" half those inside one query's attention, "plain" of all tokens, "white" those of white inputs; the
    latter stand for some tokens in the former, or a latent follows the directions of few."""

    factor: float
    priced: bool = True
    moments: Moments = "mixed"


UNMEASURED = Way(ALONE, moments="plain")
"""Where nothing is measured."""


@dataclass(frozen=True, eq=False)
class Rebuilder:
    """The closed form of one site, for any way. Rows are those that are cached: of raw keys where these have a norm."""

    seen: Known
    """Of these rows"""
    key_cost: Tensor
    """(n, m, m) what errors of the keys cost, n * m = g * d"""
    value_cost: Tensor
    """(g, dv, dv)"""
    norm: KeyNorm | None
    moments: Mapping[str, Tensor]

    def losses(self, way: Way) -> Tensor:
        """(features + 1,) expected squared error of the output, to first order, for every rank from 0 on."""
        values = eigvalsh(self._gram(way, self._roots(way)[0])).clamp(min=0)
        return torch.cat([values.cumsum(0).flip(0), torch.zeros(1, dtype=values.dtype)])

    def enough(self, keep: float, full: int) -> int:
        """The least rank, of at most `full`, at which no more than 1 - `keep` of what the output hangs on is lost."""
        losses = self.losses(UNMEASURED)
        fits = losses <= (1 - keep) * losses[0]
        return min(max(int(fits.to(torch.int8).argmax()), 1), full)

    def latents(self, way: Way, rank: int) -> Latents:
        """The maps with `rank` numbers a token."""
        site, keys = self.seen.site, self.seen.keys
        root, back = self._roots(way)
        _, vectors = eigh(self._gram(way, root))
        u = vectors[:, len(vectors) - rank :].flip(1)
        up, kv = back @ u, list(site.kv_of)
        none = torch.zeros(site.heads, 0, site.k.dim, dtype=torch.float64)
        made = Latents(
            down=u.T @ root,
            turn=torch.zeros(0, len(root), dtype=torch.float64),
            read=torch.zeros(site.heads, rank, site.k.dim, dtype=torch.float64),
            query_turn=none,
            up_v=up[keys:].reshape(site.v.heads, site.v.dim, rank)[kv],
            frequencies=torch.zeros(0, dtype=torch.float64),
            up_k=up[:keys].reshape(site.k.heads, site.k.dim, rank),
            key_norm=self.norm,
        )
        return balanced(made, self.seen.second)

    def _gram(self, way: Way, root: Tensor) -> Tensor:
        gram = root @ self.moments[way.moments] @ root.T
        return (gram + gram.T) / 2

    def _roots(self, way: Way) -> tuple[Tensor, Tensor]:
        """(features, features) twice: N with |N δ|² what an error δ costs, and its inverse."""
        f, keys = len(self.seen.mean), self.seen.keys
        factor = torch.ones(f, dtype=torch.float64)
        factor[:keys] = way.factor**0.5
        if not way.priced:
            return factor.diag(), (1 / factor).diag()
        root, back = self._priced
        return root * factor[:, None], back / factor

    @cached_property
    def _priced(self) -> tuple[Tensor, Tensor]:
        """The same at factor 1, for every way."""
        parts = zip(rooted(self.key_cost), rooted(self.value_cost), strict=True)
        root, back = (torch.block_diag(*k, *v) for k, v in parts)
        return root, back


def search_way(error: Callable[[Way], float], site: Site) -> Way:
    """The way with the least measured error: a factor first, then other moments, then every error alike; of wide
    sites few of them, as each takes an eigendecomposition."""
    trials = Trials(error)
    if wide(site):
        now = trials.best(Way(f) for f in WIDE_FACTORS)
        return trials.best([replace(now, moments="plain")])
    now = search_factor(trials, Way)
    now = trials.best([replace(now, moments="plain")])
    return trials.best(Way(1.0, False, moments) for moments in ("plain", "white"))


def cached_rows(site: Site, weights: Weights, stats: Stats | None) -> Known:
    """What is known of the rows that are cached."""
    moments, tokens = (None, 0) if stats is None else (stats.moments, stats.tokens)
    if not caches_raw(site):
        seen = known(site, weights, moments, tokens)
        # a constant in keys that turn is not free
        return replace(seen, centred=seen.centred and site.k.rope is None)
    if stats is not None:
        moments = {**stats.moments, "kv_gram": torch.stack([raw_gram(batch) for batch in stats.batches()]).sum(0)}
    return replace(known(raw_site(site), raw_weights(weights), moments, tokens), centred=False)


def rebuilder(site: Site, weights: Weights, stats: Stats | None, stage: Sequence[Scene]) -> Rebuilder:
    """What is known of a site: from the calibration, of which `stage` is a part, or from the weights alone."""
    moments, tokens = (None, 0) if stats is None else (stats.moments, stats.tokens)
    seen, behind, norm = (
        cached_rows(site, weights, stats),
        known(site, weights, moments, tokens),
        key_norm(site, weights),
    )
    felt = influence(stage, behind, raw=norm is not None) if stage else unfelt(behind)
    key_cost = per_kv_head(site, query_metric(behind) * felt.score_cost[:, None, None])
    if norm is not None:
        key_cost = through(norm, key_cost, raw_rows(stage, seen.second[: seen.keys, : seen.keys], site.k.heads))
    white, prior = cached_rows(site, weights, None).spread, PRIOR * len(seen.mean) / max(tokens, 1)

    def with_prior(second: Tensor) -> Tensor:
        share = prior * second.diagonal().sum() / white.diagonal().sum().clamp(min=1e-300)
        return second + white * share

    return Rebuilder(
        seen,
        key_cost,
        per_kv_head(site, behind.value_cost * felt.value_share[:, None, None]),
        norm,
        {
            "mixed": with_prior(mixed(seen, felt.within)) if stage else white,
            "plain": with_prior(seen.spread) if stage else white,
            "white": white,
        },
    )


def unfelt(seen: Known) -> Influence:
    """Without calibration."""
    return Influence(seen.score_cost, torch.ones_like(seen.score_cost), torch.zeros_like(seen.second))


def raw_rows(stage: Sequence[Scene], second: Tensor, heads: int) -> Tensor:
    """(tokens, g, d) raw keys: those of the scenes, or draws of their second moment (g*d, g*d)."""
    if stage:
        rows = torch.cat([scene.raw.flatten(0, 1) for scene in stage])[:, : len(second)].double()
    else:
        root, _ = rooted(second[None])
        make = torch.Generator().manual_seed(0)
        rows = torch.randn(DRAWN, len(second), generator=make, dtype=torch.float64) @ root[0]
    return rows.unflatten(1, (heads, -1))


def through(norm: KeyNorm, cost: Tensor, raw: Tensor) -> Tensor:
    """(n, m, m) what errors of raw keys (tokens, g, d) cost on average, from what those of normed ones do, (g, d, d).

    With x the key (its mean taken away by a layer norm) and ρ what the norm divides it by, the norm's derivative is
    gain (1 - u uᵀ) / ρ, u = x / (ρ √n) (l2: x / ρ); its square splits into weighted second moments of u.
    """
    kind, m = norm.norm.kind, cost.shape[-1]
    cost = cost * norm.gain[:, :, None] * norm.gain[:, None, :]
    inverse = 1 / divisor(norm.norm, raw)[..., 0].expand(raw.shape[:2])
    if norm.norm.over == "row":
        cost, raw, inverse = torch.block_diag(*cost)[None], raw.flatten(1)[:, None], inverse[:, :1]
        m = cost.shape[-1]
    centre = torch.eye(m, dtype=torch.float64) - (1 / m if kind == "layer" else 0.0)
    u = (raw @ centre) * inverse[..., None] / (1.0 if kind == "l2" else m**0.5)
    weight = inverse.square() / len(u)
    squares = torch.einsum("tn,tni,tnj->nij", weight, u, u)
    sizes = torch.einsum("tni,nij,tnj->tn", u, cost, u)
    cross = squares @ cost
    both = torch.einsum("tn,tni,tnj->nij", weight * sizes, u, u)
    return centre @ (weight.sum(0)[:, None, None] * cost - cross - cross.mT + both) @ centre
