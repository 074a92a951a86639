"""One low rank for keys and values, the rope on keys that are rebuilt at every step.

The plain form is the singular value decomposition of the stacked projections; CARE (arXiv 2603.17946) takes it of
C^1/2 Wᵀ, C the second moment of the inputs, which is the best rank for the activations. Every layer has the same rank.
A norm of the keys stays where it is, on the rebuilt ones; projections of low rank then say the same as a latent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bench.peers.base import Basis, Peer, Spread, biases, from_weights, measured_moments, still_basis, top
from passes.mla_shape import budget
from passes.refit import measure, refit
from rewrite.heads import Rewritten, Weights
from rewrite.site import Site

if TYPE_CHECKING:
    from passes import Stats


@dataclass(frozen=True)
class JointSVD(Peer):
    """Weights alone. Where nothing rotates keys need not be rebuilt: the latent is read as it is."""

    name: ClassVar[str] = "joint svd"

    def rebuilt(self, site: Site) -> bool:
        """Where keys rotate."""
        return site.k.rope is not None

    def rewrite(self, site: Site, weights: Weights, stats: Stats | None) -> Rewritten:
        """A latent; where keys are normed projections of its rank."""
        reason = self.refuse(site)
        if site.k.norm is None or reason is not None:
            return super().rewrite(site, weights, stats)
        rows = torch.cat([h.weight.flatten(0, 1) for h in (weights.k, weights.v)])
        keys = site.k.heads * site.k.dim
        u = self.directions(self.projected(site, weights, rows, stats), keys, budget(site, self.cache))
        low = u @ (u.T @ rows)
        k, v = (
            replace(h, weight=part.reshape(h.weight.shape))
            for h, part in ((weights.k, low[:keys]), (weights.v, low[keys:]))
        )
        made, notes = replace(weights, k=k, v=v), list[str]()
        if self.refit and stats is not None:
            made, note = refit(made, measure(stats, made, site.kv_of))
            notes += [note] if note else []
        return Rewritten(self.after(site), made, tuple(range(site.heads)), tuple(notes))

    def projected(self, site: Site, weights: Weights, rows: Tensor, stats: Stats | None) -> Tensor:
        """(n, n) moment of what the projections' rows, of keys and values, give without their biases."""
        del site, weights, stats
        return rows @ rows.T

    def spread(self, site: Site, weights: Weights, stats: Stats | None) -> Spread:
        """White inputs."""
        del stats
        return from_weights(site, weights)

    def basis(self, site: Site, stats: Stats | None) -> Basis:
        """Nothing turns apart."""
        del stats
        return still_basis(site)


@dataclass(frozen=True)
class CARE(JointSVD):
    """In the metric of the calibration's inputs; `apart` gives keys and values half of the rank each, as its
    evaluation without training does, and its conversion does not."""

    name: ClassVar[str] = "care"
    needs: ClassVar[frozenset[str]] = frozenset({"kv_gram"})

    apart: bool = False

    def spread(self, site: Site, weights: Weights, stats: Stats | None) -> Spread:
        """Measured inputs."""
        return measured_moments(stats, biases(site, weights))

    def projected(self, site: Site, weights: Weights, rows: Tensor, stats: Stats | None) -> Tensor:
        """Measured."""
        if stats is None:
            raise ValueError("this conversion reads activations; give calibration")
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        pairs = (("k", site.k, weights.k), ("v", site.v, weights.v))
        bias = torch.cat(
            [torch.zeros(o.rows.size).double() if h.bias is None else h.bias.flatten() for _, o, h in pairs]
        )
        for batch in stats.batches():
            u = torch.cat([batch.u[n].double()[..., torch.from_numpy(o.rows.reshape(-1))] for n, o, _ in pairs], -1)
            u = u.flatten(0, 1) - bias
            total += u.T @ u
        return total

    def directions(self, second: Tensor, keys: int, rank: int) -> Tensor:
        """Of both, or of each."""
        if not self.apart:
            return super().directions(second, keys, rank)
        first = min(rank - rank // 2, keys)
        return torch.block_diag(top(second[:keys, :keys], first), top(second[keys:, keys:], rank - first))
