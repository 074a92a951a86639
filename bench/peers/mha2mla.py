"""MHA2MLA (arXiv 2502.14837): some pairs of every head keep their rope, the rest and the values share one low rank.

A head's pairs are kept by E|q_j| E|k_j|, the bound on their part of the score; the low rank is the singular value
decomposition of the stacked projections, weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bench.peers.base import Basis, Peer, Spread, from_weights, still_basis
from passes.gqa_source import readers
from passes.moments import SiteBatch
from rewrite.heads import Weights
from rewrite.site import Site

if TYPE_CHECKING:
    from passes import Stats

SETTINGS = tuple(range(15))
"""Pairs per head that are tried."""


@dataclass(frozen=True)
class MHA2MLA(Peer):
    """`pairs` of every kv head keep their rotation."""

    name: ClassVar[str] = "mha2mla"

    pairs: int = 1

    def refuse(self, site: Site) -> str | None:
        """Why this site must stay as it is."""
        have = 0 if site.k.rope is None else len(site.k.rope.pairs)
        if have and not 0 <= self.pairs <= have:
            return f"{self.pairs} pairs of every head are to turn, and {have} do"
        return super().refuse(site)

    def rope_dim(self, site: Site) -> int:
        """Of all heads."""
        return 0 if site.k.rope is None else 2 * self.pairs * site.k.heads

    def spread(self, site: Site, weights: Weights, stats: Stats | None) -> Spread:
        """White inputs."""
        del stats
        return from_weights(site, weights)

    def basis(self, site: Site, stats: Stats | None) -> Basis:
        """Coordinates as they are, the turning ones first."""
        rope, plain = site.k.rope, still_basis(site)
        if rope is None or self.pairs == 0:
            return plain
        if stats is None:
            raise ValueError("pairs are chosen by activations; give calibration")
        best = pair_norms(site, stats).argsort(dim=1, descending=True, stable=True)[:, : self.pairs]
        turning = [
            head * site.k.dim + int(at) for head in range(site.k.heads) for j in best[head] for at in rope.pairs[int(j)]
        ]
        rest = [i for i in range(len(plain.rows)) if i not in set(turning)]
        frequencies = torch.from_numpy(rope.frequencies).double()[best.reshape(-1)]
        return Basis(plain.rows[turning + rest], frequencies)


def pair_norms(site: Site, stats: Stats) -> Tensor:
    """(g, pairs) E|q_j| E|k_j|, summed over the query heads that read a kv head."""
    q, k = (torch.zeros(o.heads, len(_pairs(site)), dtype=torch.float64) for o in (site.q, site.k))
    for batch in stats.batches():
        q, k = q + _norms(batch, "q"), k + _norms(batch, "k")
    return torch.stack([q[list(heads)].sum(0) for heads in readers(site)]) * k


def _pairs(site: Site) -> Tensor:
    return torch.zeros(0, 2, dtype=torch.long) if site.k.rope is None else torch.from_numpy(site.k.rope.pairs).long()


def _norms(batch: SiteBatch, which: str) -> Tensor:
    """(heads, pairs) sum of the pairs' lengths over tokens."""
    x: Tensor = getattr(batch, which).double()
    return x[..., _pairs(batch.site)].norm(dim=-1).sum((0, 2))
