"""M read as gain, rotation and gain: pairs, angles, frequencies; equal for all heads or refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from passes.find.matrix import Matrix
from passes.find.roots import NotLifted
from rewrite.site import Rope

LOOSE = 1e-6
"""Tables of sines are often float32."""
STEP = 1e-5
"""Tolerance of equal steps between angles."""


@dataclass(frozen=True, eq=False)
class Turn:
    """The matrix M_t = token[t] * after * Rot(angles[t]) * gain, column by column.

    rows (h, d), gain and after (h, d), token (t,), pairs (p, 2) dims, angles (t, p).
    """

    rows: Tensor
    gain: Tensor
    after: Tensor
    token: Tensor
    pairs: Tensor
    angles: Tensor

    def turn(self, x: Tensor, back: bool = False) -> Tensor:
        """Rotate (h, t, d), or back."""
        first, second = x[..., self.pairs[:, 0]], x[..., self.pairs[:, 1]]
        cos, sin = self.angles.cos(), self.angles.sin() * (-1 if back else 1)
        out = x.clone()
        out[..., self.pairs[:, 0]] = cos * first - sin * second
        out[..., self.pairs[:, 1]] = sin * first + cos * second
        return out


def decode(matrix: Matrix, letter: str) -> Turn:
    """Pairs first, then what is constant over the tokens."""
    heads, tokens, dim, _ = matrix.values.shape
    token = _token_gain(matrix.values)
    values = matrix.values / token[:, None, None]
    paired = matrix.rows[0, :, 1] >= 0
    if ((matrix.rows[:, :, 1] >= 0) != paired).any():
        raise NotLifted(f"heads of {letter} rotate different dims")
    rows = matrix.rows[:, :, 0].clone()
    gain, after = values[:, 0, :, 0].clone(), torch.ones(heads, dim, dtype=torch.float64)
    plain = values[:, :, ~paired, 0]
    if not torch.allclose(plain, plain[:, :1].expand_as(plain), LOOSE, 1e-12):
        raise NotLifted(f"the gain of {letter} changes from token to token, not alike for all dims")
    pairs = torch.empty(0, 2, dtype=torch.int64)
    angles = torch.empty(tokens, 0, dtype=torch.float64)
    if paired.any():
        pairs = _pairs(matrix.rows, paired, letter)
        blocks, own = _blocks(matrix.rows, values, pairs)
        outer, inner, angles = _factor(blocks, letter)
        for i in (0, 1):
            rows[:, pairs[:, i]] = own[..., i]
            gain[:, pairs[:, i]] = inner[..., i]
            after[:, pairs[:, i]] = outer[..., i]
        if (after != 1).any():
            # the gains stand after the rotation: those of dims that do not rotate with them
            after[:, ~paired], gain[:, ~paired] = gain[:, ~paired], torch.ones(())
    return Turn(rows, gain, after, token, pairs, angles)


def _token_gain(values: Tensor) -> Tensor:
    """One factor per token for all of M, 1 where it does not change."""
    energy = values.square().sum((0, 2, 3)).sqrt()
    token = energy / energy[0]
    return torch.ones_like(token) if (token - 1).abs().max() < LOOSE else token


def _pairs(rows: Tensor, paired: Tensor, letter: str) -> Tensor:
    """(p, 2): the two columns that read the same two rows, the lower first; alike in all heads."""
    dims = torch.nonzero(paired).reshape(-1)
    key = rows.sort(-1).values
    code = key[:, dims, 0] * (int(rows.max()) + 1) + key[:, dims, 1]
    order = torch.argsort(code, dim=1, stable=True)
    same = code.gather(1, order)
    well = same.shape[1] % 2 == 0 and bool((same[:, ::2] == same[:, 1::2]).all())
    if not well or bool((same[:, 2::2] == same[:, 1:-1:2]).any()):
        raise NotLifted(f"two rows meet in a column of {letter}, but not as a rotation with fixed gains")
    found = dims[order].reshape(len(rows), -1, 2).sort(-1).values
    by_first = torch.argsort(found[..., 0], dim=1)
    found = found.gather(1, by_first[..., None].expand_as(found))
    if (found != found[:1]).any():
        raise NotLifted(f"heads of {letter} pair different dims")
    return found[0]


def _blocks(rows: Tensor, values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(h, t, p, 2, 2) blocks of M, and (h, p, 2) the row that belongs to either column."""
    ends = rows[:, pairs]
    low, high = ends[:, :, 0].amin(-1), ends[:, :, 0].amax(-1)
    entries = values[:, :, pairs]
    is_low = (ends == low[..., None, None])[:, None]
    first = torch.where(is_low, entries, 0.0).sum(-1)
    second = torch.where(~is_low, entries, 0.0).sum(-1)
    blocks = torch.stack([first, second], -1)
    # a rotation is near one at the first token: the larger diagonal says which row is whose
    along, across = blocks[..., 0, 0] * blocks[..., 1, 1], blocks[..., 0, 1] * blocks[..., 1, 0]
    swap = along[:, 0].abs() < across[:, 0].abs()
    blocks = torch.where(swap[:, None, :, None, None], blocks.flip(-1), blocks)
    own = torch.stack([torch.where(swap, high, low), torch.where(swap, low, high)], -1)
    return blocks, own


def _factor(blocks: Tensor, letter: str) -> tuple[Tensor, Tensor, Tensor]:
    """B_t = diag(outer) Rot(theta_t) diag(inner), outer and inner (h, p, 2), theta (t, p)."""
    for turned in (False, True):
        b = blocks.transpose(-1, -2) if turned else blocks
        inner = b.square().sum(-2).sqrt()
        steady = torch.allclose(inner, inner[:, :1].expand_as(inner), LOOSE, 0.0)
        across = (b[..., 0, 0] * b[..., 0, 1] + b[..., 1, 0] * b[..., 1, 1]).abs()
        if steady and bool((across <= LOOSE * inner.prod(-1)).all()):
            return _angles(b, inner[:, 0], turned, letter)
    raise NotLifted(f"two rows meet in a column of {letter}, but not as a rotation with fixed gains")


def _angles(b: Tensor, inner: Tensor, turned: bool, letter: str) -> tuple[Tensor, Tensor, Tensor]:
    inner = inner.clone()
    mirrored = (b[..., 0, 0] * b[..., 1, 1] - b[..., 0, 1] * b[..., 1, 0])[:, 0] < 0
    inner[..., 1] = torch.where(mirrored, -inner[..., 1], inner[..., 1])
    theta = torch.atan2(b[..., 1, 0] / inner[:, None, :, 0], b[..., 0, 0] / inner[:, None, :, 0])
    # a negative gain and half a turn are one thing
    flip = (theta[:, 0].abs() - np.pi).abs() < 1e-9
    inner = torch.where(flip[..., None], -inner, inner)
    theta = torch.where(flip[:, None], _wrap(theta + np.pi), theta)
    if (_wrap(theta - theta[:1]).abs() > STEP).any():
        raise NotLifted(f"heads of {letter} rotate by different angles")
    angles = theta[0] * (-1 if turned else 1)
    ones = torch.ones_like(inner)
    return (inner, ones, angles) if turned else (ones, inner, angles)


def _wrap(x: Tensor) -> Tensor:
    return torch.remainder(x + np.pi, 2 * np.pi) - np.pi


def rope(turn: Turn) -> Rope | None:
    """Frequencies and start where angles step evenly, else their table."""
    if not len(turn.pairs):
        return None
    angles = turn.angles
    tokens = len(angles)
    steps = _wrap(angles[1:] - angles[:-1])
    pairs = turn.pairs.numpy()
    even = tokens > 1 and bool((_wrap(steps - steps[:1]).abs() < STEP).all())
    if not even:
        nothing = np.empty(0)
        return Rope(pairs, nothing, nothing, angles.numpy())
    along = torch.arange(tokens, dtype=torch.float64)
    unrolled = angles[:1] + torch.cat([torch.zeros_like(steps[:1]), _unrolled(steps)])
    centred = along - along.mean()
    frequency = (centred[:, None] * unrolled).sum(0) / centred.square().sum()
    start = unrolled.mean(0) - frequency * along.mean()
    start = torch.where(_wrap(start).abs() < STEP, torch.zeros_like(start), _wrap(start))
    return Rope(pairs, frequency.numpy(), start.numpy())


def _unrolled(steps: Tensor) -> Tensor:
    """Sums of steps that are equal modulo a turn."""
    return torch.cumsum(steps[:1] + _wrap(steps - steps[:1]), 0)
