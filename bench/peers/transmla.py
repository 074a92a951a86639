"""TransMLA (arXiv 2502.07864): the rope gathered into one shared head, the rest a balanced joint PCA.

before: k_i, all pairs turning        after: one head of d / collapse channels that turn, a latent for all else

Per fold of `fold` neighbouring frequencies, a real rotation of the channels (heads x frequencies), from PCA of the
keys with re and im as samples, moves the energy to the front. The first fold / collapse of them keep a rotation, at
every collapse-th frequency; the others lose theirs. Still keys are scaled to the values' mean size before the PCA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bench.peers.base import Basis, Peer, Spread, measured_moments, still_basis, top
from rewrite.heads import Weights
from rewrite.site import Site

if TYPE_CHECKING:
    from passes import Stats

SETTINGS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4))
"""(fold, collapse) that are tried."""
NOTHING = 1e-6
"""Size of still keys beside all keys' below which there are none."""


@dataclass(frozen=True)
class TransMLA(Peer):
    """`fold` is FreqFold's M; `collapse` divides the width of the turning head and the fold."""

    name: ClassVar[str] = "transmla"
    needs: ClassVar[frozenset[str]] = frozenset({"kv_gram"})

    fold: int = 1
    collapse: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fold < 1 or self.collapse < 1 or self.fold % self.collapse:
            raise ValueError(f"fold must be a multiple of collapse, got {self.fold} and {self.collapse}")

    def refuse(self, site: Site) -> str | None:
        """Why this site must stay as it is."""
        pairs = _pairs(site)
        if pairs % self.fold:
            return f"its {pairs} frequencies are no multiple of fold {self.fold}"
        return super().refuse(site)

    def rope_dim(self, site: Site) -> int:
        """One head's turning dims, or a part of them."""
        return 2 * _pairs(site) // self.collapse

    def key_scale(self, site: Site, basis: Basis, spread: Spread) -> float:
        """Mean size of the values' channels over that of the still keys'."""
        keys, still = site.k.heads * site.k.dim, basis.rows[basis.rope_dim :]
        energy = torch.einsum("ni,ij,nj->n", still, spread.second[:keys, :keys], still)
        each = spread.second.diagonal()
        size, whole, value = (x.clamp(min=0).sqrt().mean() for x in (energy, each[:keys], each[keys:]))
        # where nothing is left of the keys, rounding must not be blown up to the values' size
        return float(value / size) if size > NOTHING * whole else 1.0

    def spread(self, site: Site, weights: Weights, stats: Stats | None) -> Spread:
        """Activations as they are, biases among them."""
        del weights
        zero = torch.zeros(site.k.heads * site.k.dim + site.v.heads * site.v.dim, dtype=torch.float64)
        return measured_moments(stats, zero)

    def basis(self, site: Site, stats: Stats | None) -> Basis:
        """The rotated channels, the turning ones first."""
        rope, plain = site.k.rope, still_basis(site)
        if rope is None:
            return plain
        g, d = site.k.heads, site.k.dim
        total = measured_moments(stats, torch.zeros(g * d + site.v.heads * site.v.dim).double())
        k = total.second[: g * d, : g * d]
        turning: list[Tensor] = []
        rest = [plain.rows[i * d + e] for i in range(g) for e in range(d) if e not in set(rope.pairs.reshape(-1))]
        frequencies: list[float] = []
        keep = self.fold // self.collapse
        for first in range(0, len(rope.pairs), self.fold):
            fold = range(first, first + self.fold)
            re, im = ([i * d + int(rope.pairs[j, part]) for i in range(g) for j in fold] for part in (0, 1))
            u = top(k[re][:, re] + k[im][:, im], len(re))
            channels = torch.zeros(len(re), 2, g * d, dtype=torch.float64)
            channels[:, 0, re], channels[:, 1, im] = u.T, u.T
            turning.append(channels[:keep].flatten(0, 1))
            rest += [*channels[keep:].flatten(0, 1)]
            frequencies += [float(rope.frequencies[first + s * self.collapse]) for s in range(keep)]
        return Basis(torch.cat([*turning, torch.stack(rest)]), torch.tensor(frequencies, dtype=torch.float64))


def _pairs(site: Site) -> int:
    return 0 if site.k.rope is None else len(site.k.rope.pairs)
