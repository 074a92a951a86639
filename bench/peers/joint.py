"""One low rank for keys and values, the rope on keys that are rebuilt at every step.

The plain form is the singular value decomposition of the stacked projections; CARE (arXiv 2603.17946) takes it of
C^1/2 Wᵀ, C the second moment of the inputs, which is the best rank for the activations. Every layer has the same rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bench.peers.base import Basis, Peer, Spread, biases, from_weights, measured_moments, still_basis, top
from rewrite.heads import Weights
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

    def directions(self, second: Tensor, keys: int, rank: int) -> Tensor:
        """Of both, or of each."""
        if not self.apart:
            return super().directions(second, keys, rank)
        first = min(rank - rank // 2, keys)
        return torch.block_diag(top(second[:keys, :keys], first), top(second[keys:, keys:], rank - first))
