"""One low rank for keys and values together, the rope on keys that are rebuilt at every step.

The plain form is the singular value decomposition of the stacked projections; CARE (arXiv 2603.17946) takes it of
C^1/2 Wᵀ, C the second moment of the inputs, which is the best rank for the activations. Every layer has the same rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bench.peers.base import Basis, Peer, Spread, biases, from_weights, measured_moments, still_basis
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
    """The same in the metric of the calibration's inputs."""

    name: ClassVar[str] = "care"
    needs: ClassVar[frozenset[str]] = frozenset({"kv_gram"})

    def spread(self, site: Site, weights: Weights, stats: Stats | None) -> Spread:
        """Measured inputs."""
        return measured_moments(stats, biases(site, weights))
