"""How many numbers the projections of keys and values hold as products, and at which sizes these are fewer.

With n inputs and rows D_k, D_v: one latent of rank r for both holds r (n + D_k + D_v) numbers, two apart hold
r_k (n + D_k) + r_v (n + D_v). So a size is stated as the rank of one latent, and two apart are the same size where they
hold no more numbers than that one. A projection whose product would hold more than itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewrite.site import Operand, Site

Ranks = tuple[int | None, ...]
"""As in `rewrite.site.Factored`."""


@dataclass(frozen=True)
class Side:
    """One projection: the numbers of a token that it reads, and those that it gives."""

    inputs: int
    rows: int

    @property
    def dense(self) -> int:
        """Numbers of its matrix."""
        return self.inputs * self.rows

    @property
    def full(self) -> int:
        """The rank at which a product can be any matrix."""
        return min(self.inputs, self.rows)

    def cost(self, rank: int | None) -> int:
        """Numbers of a product of `rank`; of the matrix where there is none."""
        return self.dense if rank is None else rank * (self.inputs + self.rows)

    def within(self, numbers: int) -> int | None:
        """The largest rank whose product holds no more than `numbers`; None where the matrix itself holds no more."""
        return None if numbers >= self.dense else numbers // (self.inputs + self.rows)


@dataclass(frozen=True)
class Sides:
    """Both projections; `same` where they read the very same numbers, so that one latent can serve both."""

    k: Side
    v: Side
    same: bool

    @property
    def dense(self) -> int:
        """Numbers of both matrices."""
        return self.k.dense + self.v.dense

    @property
    def each(self) -> int:
        """Numbers per rank of one latent."""
        return max(self.k.inputs, self.v.inputs) + self.k.rows + self.v.rows

    @property
    def most(self) -> int:
        """The largest rank of one latent that holds fewer numbers than the matrices."""
        return (self.dense - 1) // self.each

    @property
    def least(self) -> int:
        """The smallest rank whose numbers suffice for a latent of each projection that needs its own."""
        return 1 if self.same else -(-(self.k.cost(1) + self.v.cost(1)) // self.each)

    def cost(self, ranks: Sequence[int | None]) -> int:
        """Numbers that projections of these ranks hold."""
        if len(ranks) == 1:
            return self.each * (ranks[0] or 0)
        return self.k.cost(ranks[0]) + self.v.cost(ranks[1])

    @property
    def full(self) -> Ranks:
        """Ranks at which nothing can be lost, whatever they cost."""
        return (min(self.k.inputs, self.k.rows + self.v.rows),) if self.same else (self.k.full, self.v.full)

    def pairs(self, rank: int) -> list[tuple[int | None, int | None]]:
        """All pairs of ranks for two latents apart that hold no more numbers than one of `rank`."""
        numbers, found = self.each * rank, list[tuple[int | None, int | None]]()
        for k in (*range(1, (self.k.dense - 1) // self.k.cost(1) + 1), None):
            left = numbers - self.k.cost(k)
            if left >= self.v.cost(1):
                found.append((k, self.v.within(left)))
        return [pair for pair in found if pair != (None, None)]

    def even(self, rank: int) -> Ranks:
        """Ranks where nothing was measured: one latent, or two of one rank."""
        return (rank,) if self.same else (each := self.each * rank // (self.k.cost(1) + self.v.cost(1)), each)


def sides(site: Site) -> Sides:
    """The sizes of a site's projections of keys and values."""
    k, v = site.k.roots[0], site.v.roots[0]
    same = k.source == v.source and k.columns == v.columns
    return Sides(Side(k.columns, site.k.rows.size), Side(v.columns, site.v.rows.size), same)


def share_rank(site: Site, share: float) -> int:
    """The rank that is a share of the rows of both projections."""
    return int(share * (site.k.rows.size + site.v.rows.size) + 1e-9)


def refuse_rank(site: Site, rank: int) -> str | None:
    """Why a latent of `rank` numbers makes the projections no smaller."""
    have = sides(site)
    if have.least <= rank <= have.most:
        return None
    k, v = have.k, have.v
    matrices = f"projections of {k.inputs} × {k.rows} and {v.inputs} × {v.rows}"
    if have.most < have.least:
        return f"its {matrices} hold {have.dense} numbers, and no latent of theirs holds fewer"
    if rank < have.least:
        return f"rank {rank} is too little for two latents, one for each of its inputs; use {have.least} or more"
    return (
        f"nothing is cached, so a latent is to save work: rank {rank} of {matrices} would hold {rank * have.each} "
        f"numbers, now {have.dense}; at most {have.most} saves"
    )


def refuse_rows(site: Site) -> str | None:
    """Why the rows of keys and values are not rows of their own."""
    seen: dict[tuple[str, int], str] = {}
    for name, operand in (("queries", site.q), ("keys", site.k), ("values", site.v)):
        for key in _places(operand):
            other = seen.setdefault(key, name)
            if other != name:
                return f"its {other} and {name} read the same row of {key[0]}, which could only change for both"
        if len(np.unique(operand.rows)) != operand.rows.size:
            return f"heads of its {name} read the same rows of {operand.roots[0].tensor}"
    return None


def _places(operand: Operand) -> list[tuple[str, int]]:
    root = operand.roots[0]
    return [(root.tensor, int(start)) for start in root.starts[operand.rows.reshape(-1)]]
