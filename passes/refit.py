"""The output projection, solved anew for what the converted heads give, and the measured error of a conversion.

With z the converted heads' outputs and y the original attention's output on the same input:
W_o <- W_o + (S_yz - W_o S_zz)(S_zz + λ)⁻¹, a ridge towards the W_o that was there, not towards nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from passes import Stats, Weights

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
"""λ relative to the mean energy of z; unseen text chooses."""
WORTH = 1e-3
"""A refit that helps by less than this part is not worth its noise."""
EXACT = 1e-13
"""Relative error below which there is nothing to repair but rounding."""
HELD_BACK = 4
"""One of so many tokens of every batch judges and does not fit."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Second moments of z̃ (z, and 1 behind it where the output has a bias) and y."""

    zz: Tensor
    yz: Tensor
    yy: float
    count: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.zz + other.zz, self.yz + other.yz, self.yy + other.yy, self.count + other.count)

    def error(self, out: Tensor) -> float:
        """Squared error of `out` @ z̃ against y, relative to the energy of y."""
        wrong = self.yy - 2 * float((out * self.yz).sum()) + float(((out @ self.zz) * out).sum())
        return max(wrong, 0.0) / self.yy if self.yy > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Measured:
    """Sums of the tokens that fit and of those that judge."""

    fit: Sums
    held: Sums


def measure(stats: Stats, weights: Weights, kv_of: tuple[int, ...], batches: int | None = None) -> Measured:
    """Run the site with `weights` on the calibration, or on the first `batches` of it."""
    fit: Sums | None = None
    held: Sums | None = None
    for z, y in islice(stats.attend(weights, kv_of), batches):
        flat = z.double().flatten(1)
        if weights.out_bias is not None:
            flat = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
        cut = len(flat) - len(flat) // HELD_BACK
        first, second = _sums(flat[:cut], y[:cut]), _sums(flat[cut:], y[cut:])
        fit, held = first if fit is None else fit + first, second if held is None else held + second
    if fit is None or held is None:
        raise ValueError("the calibration holds no batch")
    return Measured(fit, held)


def refit(weights: Weights, seen: Measured) -> tuple[Weights, str | None]:
    """The weights with the output projection refitted, and a note where unseen tokens spoke against it."""
    there = _flat(weights)
    before = seen.held.error(there)
    after, ridge = min((seen.held.error(solved(there, seen.fit, r)), r) for r in RIDGES)
    if seen.held.count == 0 or not after < before * (1 - WORTH) or before < EXACT:
        return (
            weights,
            f"output projection left as it was: refitting it gave {after:.3g} on unseen text, not {before:.3g}",
        )
    return _shaped(weights, solved(there, seen.fit + seen.held, ridge)), None


def refitted_error(weights: Weights, seen: Measured) -> float:
    """Relative error on unseen tokens after a refit, or without one where that is better."""
    there = _flat(weights)
    return min(seen.held.error(there), *(seen.held.error(solved(there, seen.fit, r)) for r in RIDGES))


def solved(out: Tensor, sums: Sums, ridge: float) -> Tensor:
    """The refitted projection, (outputs, h*d [+ 1])."""
    mean = float(sums.zz.diagonal().mean())
    loaded = sums.zz + max(ridge * mean, 1e-300) * torch.eye(len(sums.zz), dtype=sums.zz.dtype)
    root = torch.linalg.cholesky((loaded + loaded.T) / 2)
    return out + torch.cholesky_solve((sums.yz - out @ sums.zz).T, root).T


def _sums(z: Tensor, y: Tensor) -> Sums:
    y = y.double()
    return Sums(z.T @ z, y.T @ z, float(y.square().sum()), len(z))


def _flat(weights: Weights) -> Tensor:
    out = weights.out.flatten(1)
    return out if weights.out_bias is None else torch.cat([out, weights.out_bias[:, None]], 1)


def _shaped(weights: Weights, flat: Tensor) -> Weights:
    if weights.out_bias is None:
        return replace(weights, out=flat.reshape(weights.out.shape))
    return replace(weights, out=flat[:, :-1].reshape(weights.out.shape), out_bias=flat[:, -1])
