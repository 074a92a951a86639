"""The output projection, solved anew for what the converted heads give, and the measured error of a conversion.

With z the converted heads' outputs and y the original attention's output on the same input:
W_o <- W_o + (S_yz - W_o S_zz)(S_zz + λ)⁻¹, a ridge towards the W_o that was there, not towards nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from passes import Stats, Weights

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
"""λ relative to the mean energy of z; unseen text chooses."""
WORTH = 1e-3
"""A refit that helps by less than this part is not worth its noise."""
WIDE = 1024
SKETCH = 256
"""Of more than `WIDE` outputs, on how many sums of them the ridge is chosen."""
HELD_ROWS = 2048
"""Rows that are multiplied at once where there are more than `WIDE` inputs."""
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

    @property
    def numbers(self) -> tuple[Tensor, Tensor, float, int]:
        """All four, in the order in which they are given."""
        return self.zz, self.yz, self.yy, self.count

    def lack(self, out: Tensor) -> Tensor:
        """(outputs, h*d [+ 1]) the moments of what `out` @ z̃ leaves of y, with z̃."""
        return self.yz - out @ self.zz

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
    return measured(islice(stats.attend(weights, kv_of), batches), weights.out_bias is not None)


def measured(trials: Iterable[tuple[Tensor, Tensor]], biased: bool) -> Measured:
    """The sums of trials: the heads' outputs (tokens, heads, dim), and the original's y (tokens, outputs)."""
    fit, held = _Adding(), _Adding()
    for z, y in trials:
        rows = with_one(z.double().flatten(1), biased)
        cut = len(rows) - len(rows) // HELD_BACK
        fit.take(rows[:cut], y[:cut])
        held.take(rows[cut:], y[cut:])
    return Measured(fit.all(), held.all())


class _Adding:
    """Sums of rows as they come. Of wide sites the moments are larger than a batch's rows: these are held until there
    are enough of them, and are then multiplied at once."""

    def __init__(self) -> None:
        self.total: Sums | None = None
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def take(self, z: Tensor, y: Tensor) -> None:
        """Rows z (n, h*d [+ 1]) and y (n, outputs)."""
        self.waiting.append((z, y) if z.shape[1] <= WIDE else (z.float(), y.float()))
        if z.shape[1] <= WIDE or sum(len(rows) for rows, _ in self.waiting) >= HELD_ROWS:
            self._add()

    def all(self) -> Sums:
        """The sums of all that was taken."""
        self._add()
        if self.total is None:
            raise ValueError("the calibration holds no batch")
        return self.total

    def _add(self) -> None:
        if self.waiting:
            more = sums(*(torch.cat(rows) for rows in zip(*self.waiting, strict=True)))
            self.total = more if self.total is None else self.total + more
            self.waiting = []


def output_error(trials: Iterable[tuple[Tensor, Tensor]], weights: Weights) -> float:
    """Squared error of the attention's output relative to the output's energy; trials are (heads' outputs, y)."""
    return relative(squares(z, y, weights) for z, y in trials)


def squares(z: Tensor, y: Tensor, weights: Weights) -> tuple[float, float]:
    """The squared error of one trial's outputs, and the output's energy."""
    # a wide site's products take seconds; single precision rounds far below what any conversion loses
    short = len(weights.out) > WIDE and weights.out[0].numel() > WIDE
    made = torch.einsum("nhd,ohd->no", *(x.float() if short else x for x in (z, weights.out)))
    made = made if weights.out_bias is None else made + weights.out_bias
    return float((made - y).square().sum()), float(y.square().sum())


def relative(found: Iterable[Sequence[float]]) -> float:
    """The sum of squared errors relative to the sum of energies."""
    wrong = total = 0.0
    for error, energy in found:
        wrong, total = wrong + error, total + energy
    return wrong / total if total else 0.0


def refit(weights: Weights, seen: Measured) -> tuple[Weights, str | None]:
    """The weights with the output projection refitted, and a note where unseen tokens spoke against it."""
    there, held = flat(weights), seen.held
    held_lack = held.lack(there)
    energy = max(held.yy, 1e-300)
    before = max(held.yy - float((there * held.yz).sum()) - float((there * held_lack).sum()), 0.0) / energy
    fit_few, held_few = sketched(seen.fit.yz) - sketched(there) @ seen.fit.zz, sketched(held_lack)

    def gain(ridge: float) -> float:
        change = corrected(fit_few, seen.fit.zz, ridge)
        return float((change * (2 * held_few - change @ held.zz)).sum()) / energy

    more, ridge = max((gain(r), -r) for r in RIDGES)
    after, ridge = max(before - more, 0.0), -ridge
    if held.count == 0 or not after < before * (1 - WORTH) or before < EXACT:
        return (
            weights,
            f"output projection left as it was: refitting it gave {after:.3g} on unseen text, not {before:.3g}",
        )
    del held_lack
    return shaped(weights, solved(there, seen.fit + held, ridge)), None


def sketched(lack: Tensor) -> Tensor:
    """Of many outputs, `SKETCH` sums with random signs: their squares' mean is the same, and so is what a ridge gains,
    but for a few parts of a hundred that are alike for all ridges."""
    if len(lack) <= WIDE:
        return lack
    make = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (SKETCH, len(lack)), generator=make).to(lack.dtype) * 2 - 1
    return signs @ lack / SKETCH**0.5


def refitted_error(weights: Weights, seen: Measured) -> float:
    """Relative error on unseen tokens after a refit, or without one where that is better."""
    there = flat(weights)
    return min(seen.held.error(there), *(seen.held.error(solved(there, seen.fit, r)) for r in RIDGES))


def solved(out: Tensor, sums: Sums, ridge: float) -> Tensor:
    """The refitted projection, (outputs, h*d [+ 1])."""
    if len(out) > WIDE:
        # the same without the largest product; what rounding it costs is far below what a wide site is measured to
        return corrected(sums.yz + _load(sums.zz, ridge) * out, sums.zz, ridge)
    return out + corrected(sums.lack(out), sums.zz, ridge)


def corrected(lack: Tensor, zz: Tensor, ridge: float) -> Tensor:
    """What to add to a projection that leaves `lack` (rows, h*d [+ 1])."""
    loaded = (zz + zz.T) / 2
    loaded.diagonal().add_(_load(zz, ridge))
    return torch.cholesky_solve(lack.T, torch.linalg.cholesky(loaded)).T


def _load(zz: Tensor, ridge: float) -> float:
    return max(ridge * float(zz.diagonal().mean()), 1e-300)


def with_one(rows: Tensor, biased: bool) -> Tensor:
    """(tokens, h*d [+ 1]): a 1 behind every row where the output has a bias."""
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if biased else rows


def sums(z: Tensor, y: Tensor) -> Sums:
    """The moments of rows z (tokens, h*d [+ 1]) and y (tokens, outputs)."""
    y = y.double()
    return Sums(_product(z, z), _product(y, z), float(y.square().sum()), len(z))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Sums over rows; of wide sites within a batch in single precision, whose rounding is far below every ridge."""
    return a.T @ b if b.shape[1] <= WIDE else (a.float().T @ b.float()).double()


def head_rows(z: Tensor, biased: bool) -> Tensor:
    """(tokens, h*d [+ 1]) in float64 from heads' outputs (b, h, t, d)."""
    return with_one(z.double().transpose(1, 2).flatten(2).flatten(0, 1), biased)


def kept_sums(z: Tensor, y: Tensor, keep: Tensor) -> Sums:
    """The moments of those rows that `keep` (b, t) counts; y (b, t, outputs)."""
    rows = keep.reshape(-1) > 0
    return sums(z[rows], y.flatten(0, 1)[rows])


def flat(weights: Weights) -> Tensor:
    """The output projection as it meets z̃, (outputs, h*d [+ 1])."""
    out = weights.out.flatten(1)
    return out if weights.out_bias is None else torch.cat([out, weights.out_bias[:, None]], 1)


def shaped(weights: Weights, out: Tensor) -> Weights:
    """The weights with an output projection in the shape of `flat`."""
    if weights.out_bias is None:
        return replace(weights, out=out.reshape(weights.out.shape))
    return replace(weights, out=out[:, :-1].reshape(weights.out.shape), out_bias=out[:, -1])
