"""Projections of keys and values as products of a given size, in closed form.

With N a root of what errors of the rows W x cost, and U the top eigenvectors of N E[(W x)(W x)ᵀ] Nᵀ, the best product
of rank r is (N⁻¹ U)(Uᵀ N W): of keys and values together for one latent, of each alone for two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from passes.eigen import eigh, rooted
from passes.factor_known import Rows
from passes.factor_shape import Ranks, Sides
from passes.gqa_source import FLOOR
from rewrite.heads import Factor, Factors, Heads, Weights


@dataclass(frozen=True)
class Way:
    """What measuring chooses: the factor of the keys' errors against the values', and whether keys and values have
    a latent each."""

    factor: float
    apart: bool


@dataclass(frozen=True, eq=False)
class Basis:
    """Eigenvectors of weighted rows, the largest first."""

    values: Tensor
    vectors: Tensor
    root: Tensor
    back: Tensor
    """The inverse of `root`."""

    def lost(self, rank: int | None) -> float:
        """What is lost at a rank."""
        return 0.0 if rank is None else float(self.values[rank:].sum())

    @cached_property
    def losses(self) -> Tensor:
        """(rows + 1,) the same for every rank."""
        return torch.cat([self.values.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])

    def product(self, weight: Tensor, rank: int) -> Factor:
        """`weight` (rows, inputs) at a rank, its latent with numbers of mean square 1."""
        u, values = self.vectors[:, :rank], self.values[:rank]
        floor = FLOOR * max(float(values.max()), torch.finfo(torch.float64).tiny)
        size = torch.where(values > floor, values, torch.ones_like(values)).sqrt()
        return Factor(self.back @ u * size, u.T @ self.root @ weight / size[:, None])

    def left(self, mean: Tensor, rank: int) -> Tensor:
        """What of a constant (rows,) is not given back."""
        u = self.vectors[:, :rank]
        return mean - self.back @ (u @ (u.T @ (self.root @ mean)))


def _basis(second: Tensor, root: Tensor, back: Tensor) -> Basis:
    gram = root @ second @ root.T
    values, vectors = eigh((gram + gram.T) / 2)
    return Basis(values.flip(0).clamp(min=0), vectors.flip(1), root, back)


@dataclass(frozen=True, eq=False)
class Solver:
    """The closed form of one site."""

    rows: Rows
    weights: Weights
    sides: Sides

    @cached_property
    def _k(self) -> Basis:
        n, (root, back) = self.rows.keys, rooted(self.rows.key_cost)
        return _basis(self.rows.second[:n, :n], torch.block_diag(*root), torch.block_diag(*back))

    @cached_property
    def _v(self) -> Basis:
        n, (root, back) = self.rows.keys, rooted(self.rows.value_cost)
        return _basis(self.rows.second[n:, n:], torch.block_diag(*root), torch.block_diag(*back))

    @cached_property
    def _both(self) -> dict[float, Basis]:
        return {}

    def _joint(self, factor: float) -> Basis:
        if factor not in self._both:
            k, v = self._k, self._v
            root = torch.block_diag(k.root * factor**0.5, v.root)
            self._both[factor] = _basis(self.rows.second, root, torch.block_diag(k.back / factor**0.5, v.back))
        return self._both[factor]

    def best(self, way: Way, rank: int) -> tuple[Ranks, float]:
        """The ranks of this way that hold no more numbers than one latent of `rank`, and what they lose."""
        if not way.apart:
            return (rank,), self._joint(way.factor).lost(rank)
        k, v = way.factor * self._k.losses, self._v.losses
        pairs = self.sides.pairs(rank)
        lost = [(0.0 if i is None else float(k[i])) + (0.0 if j is None else float(v[j])) for i, j in pairs]
        at = min(range(len(pairs)), key=lost.__getitem__)
        return pairs[at], lost[at]

    def ways(self, factor: float, rank: int) -> list[Way]:
        """The ways there are at a size."""
        apart = [Way(factor, True)] if self.sides.pairs(rank) else []
        return [*apart, *([Way(factor, False)] if self.sides.same else [])]

    def lost(self, factor: float, rank: int) -> float:
        """What is lost at `rank` in the best way."""
        return min(self.best(way, rank)[1] for way in self.ways(factor, rank))

    def nothing(self, factor: float) -> float:
        """What is lost without keys and values."""
        return factor * float(self._k.losses[0]) + float(self._v.losses[0])

    def made(self, way: Way, rank: int) -> tuple[Factors, Weights]:
        """The products, and the weights that go with them."""
        ranks, _ = self.best(way, rank)
        k, v = self.weights.k, self.weights.v
        if len(ranks) == 1:
            return self._together(self._joint(way.factor), rank)
        parts = [
            (None, torch.zeros_like(heads.gain).flatten())
            if r is None
            else (basis.product(heads.weight.flatten(0, 1), r), basis.left(mean, r))
            for heads, basis, mean, r in zip((k, v), (self._k, self._v), self._means, ranks, strict=True)
        ]
        factors = Factors(parts[0][0], parts[1][0])
        return factors, filled(self.weights, self.rows.site.kv_of, factors, parts[0][1], parts[1][1])

    @property
    def _means(self) -> tuple[Tensor, Tensor]:
        return self.rows.mean[: self.rows.keys], self.rows.mean[self.rows.keys :]

    def _together(self, basis: Basis, rank: int) -> tuple[Factors, Weights]:
        n, weights = self.rows.keys, self.weights
        whole = basis.product(torch.cat([weights.k.weight.flatten(0, 1), weights.v.weight.flatten(0, 1)]), rank)
        left = basis.left(self.rows.mean, rank)
        factors = Factors(Factor(whole.up[:n], whole.down), Factor(whole.up[n:], whole.down))
        return factors, filled(weights, self.rows.site.kv_of, factors, left[:n], left[n:])


def exact(weights: Weights, sides: Sides) -> tuple[Factors, Weights]:
    """Products that lose nothing: the inputs themselves, or the rows themselves, whichever are fewer."""
    k, v = weights.k.weight.flatten(0, 1), weights.v.weight.flatten(0, 1)
    if not sides.same:
        return Factors(_whole(k), _whole(v)), weights
    both = _whole(torch.cat([k, v]))
    return Factors(Factor(both.up[: len(k)], both.down), Factor(both.up[len(k) :], both.down)), weights


def _whole(weight: Tensor) -> Factor:
    rows, inputs = weight.shape
    one = torch.eye(min(rows, inputs), dtype=torch.float64)
    return Factor(weight, one) if inputs <= rows else Factor(one, weight)


def filled(weights: Weights, kv_of: Sequence[int], factors: Factors, k_left: Tensor, v_left: Tensor) -> Weights:
    """The weights that the products multiply out to. Constants that they leave out go to the projections' own biases;
    of the values to the output's where there is no other."""
    k, v = _with(weights.k, factors.k, k_left), _with(weights.v, factors.v, v_left)
    bias = weights.out_bias
    if bias is not None and weights.v.bias is None:
        lost = (v_left.reshape(weights.v.gain.shape) * weights.v.gain)[list(kv_of)]
        bias = bias + torch.einsum("ohd,hd->o", weights.out, lost)
    return replace(weights, k=k, v=v, out_bias=bias)


def _with(heads: Heads, factor: Factor | None, left: Tensor) -> Heads:
    bias = None if heads.bias is None else heads.bias + left.reshape(heads.gain.shape)
    return replace(
        heads,
        weight=heads.weight if factor is None else (factor.up @ factor.down).reshape(heads.weight.shape),
        bias=bias,
    )
