"""The map from projection rows to one operand, M_t, with at most two rows behind a column, and the norm before it.

    operand[h, t, d] = offset[h, t, d] + sum_r M[h, t, d, r] * n(u)[t, r]        n: identity, rms or layer norm

Reverse derivatives give M whatever the norm: with x = n(u), N rows in its group and a cotangent c on the result,
the gradient is (w - x (w.x)/N) / s for rms and that less its mean for a layer norm, where w = M^T c is wanted, s is the
known size of u, and w.x = c.y is known too. So w = s * grad + x (c.y) / N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from passes.find.bits import spell
from passes.find.roots import NotLifted

Kind = Literal["rms", "layer"]
LARGE = 1e6
"""Inputs at which an eps vanishes."""
TINY = 1e-10
"""Relative to the largest entry of M: nothing."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """`rows` (h, d, 2), -1 where there is none, `values` (h, t, d, 2), `offset` (h, t, d), `group` (h, rows): norm."""

    rows: Tensor
    values: Tensor
    offset: Tensor
    kind: Kind | None = None
    group: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Probe:
    """The operand of one block as a function of all root outputs: (positions, rows) -> (heads, t, d)."""

    letter: str
    run: Callable[[Tensor], Tensor]
    at: Tensor
    """The position behind each token."""
    positions: int
    rows: int

    def noise(self, size: float, seed: int) -> Tensor:
        """Random root outputs."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.positions, self.rows, dtype=torch.float64, generator=generator) * size


def matrix(probe: Probe) -> Matrix:
    """M, by bits where each column reads one row, by derivatives elsewhere."""
    return _by_bits(probe) or _by_derivatives(probe)


def _by_bits(probe: Probe) -> Matrix | None:
    low, high = probe.noise(1.0, 21), probe.noise(1.0, 22)

    def run(choice: Tensor) -> Tensor:
        return probe.run(torch.where(choice, high, low))

    quick, ends = run(torch.arange(probe.rows) % 3 == 1), (probe.run(low), probe.run(high))
    same = [(quick - end).abs() <= 1e-11 * quick.abs() for end in ends]
    if not (same[0] | same[1]).all():
        return None
    spelled = spell(probe.rows, run)
    item = spelled.item[:, 0]
    if spelled.mixed.any() or (spelled.item != item[:, None]).any() or (item < 0).any():
        return None
    up, down = ends[0], probe.run(-low)
    offset = (up + down) / 2
    behind = low[probe.at][:, item].permute(1, 0, 2)
    values = (up - offset) / behind
    twice = probe.run(2 * low) - offset
    if not torch.allclose(twice, 2 * (up - offset), 1e-9, 1e-12):
        return None
    rows = torch.stack([item, torch.full_like(item, -1)], -1)
    return Matrix(rows, torch.stack([values, torch.zeros_like(values)], -1), _clean(offset, up))


def _clean(offset: Tensor, value: Tensor) -> Tensor:
    """Rounding is no offset."""
    return torch.where(offset.abs() <= 1e-12 * value.abs().max(), 0.0, offset)


def _kind(probe: Probe, u: Tensor, y: Tensor, offset: Tensor) -> Kind | None:
    """Linear, or invariant under a factor (rms), or under a shift too (layer)."""
    odd = y - offset
    near = 1e-7 * odd.abs().max()
    twice = probe.run(2 * u) - offset
    linear, still = (twice - 2 * odd).abs() <= near, (twice - odd).abs() <= near
    if linear.all():
        return None
    if still.all():
        moved = probe.run(u + 0.37 * LARGE) - y
        return "layer" if (moved.abs() <= near).all() else "rms"
    letter = probe.letter
    if (linear | still).all():
        raise NotLifted(f"a norm acts on some columns of {letter} and not on others")
    raise NotLifted(f"{letter} is not linear, and not one norm, between projection and core")


class _Sizes:
    """What the correction needs of each norm group: rows, normed inputs, their size, and how many they are."""

    def __init__(self, kind: Kind, group: Tensor, u: Tensor) -> None:
        self.sets, self.of_head = torch.unique(group, dim=0, return_inverse=True)
        if (self.sets.sum(0) > 1).any():
            raise NotLifted("norms over groups of rows that overlap")
        self.of_row = self.sets.to(torch.int64).argmax(0)
        self.count = self.sets.sum(1)
        weight = self.sets.to(u.dtype) / self.count[:, None]
        mean = u @ weight.T if kind == "layer" else torch.zeros(len(u), len(self.sets), dtype=u.dtype)
        centred = (u - mean[:, self.of_row]) * self.sets.any(0)
        self.size = (centred.square() @ weight.T).sqrt()
        self.normed = centred / self.size[:, self.of_row]
        self.kind = kind

    def corrected(self, grad: Tensor, against: Tensor) -> Tensor:
        """w of a gradient (t, rows); `against` (t, groups) is c.y of each group."""
        w = grad * self.size[:, self.of_row] + self.normed * (against / self.count)[:, self.of_row]
        if self.kind == "layer":
            for members in self.sets:
                w[:, members] -= w[:, members].median(1, keepdim=True).values
        return w * self.sets.any(0)


def _by_derivatives(probe: Probe) -> Matrix:
    u = probe.noise(LARGE, 23)
    with torch.no_grad():
        y = probe.run(u)
        offset = (y + probe.run(-u)) / 2
        kind = _kind(probe, u, y, offset)
    tape = _Tape(probe, u)
    heads, tokens, dim = y.shape
    generator = torch.Generator().manual_seed(24)
    cotangents = torch.rand(tokens, dim, dtype=torch.float64, generator=generator) + 0.5
    raw = torch.stack([tape.pull(h, slice(None), cotangents).abs().amax(0) for h in range(heads)])
    reads = raw > TINY * raw.max()
    odd = y - offset
    sizes = None if kind is None else _Sizes(kind, reads, u[probe.at])
    of_head = reads if sizes is None else _own_rows(tape, sizes, reads, odd, cotangents)
    share = torch.rand(heads, dtype=torch.float64, generator=generator) + 0.5
    rows, values = _columns(tape, sizes, of_head, odd, share)
    return Matrix(rows, values, _clean(offset, y), kind, None if kind is None else reads)


class _Tape:
    """One forward pass to pull cotangents back through."""

    def __init__(self, probe: Probe, u: Tensor) -> None:
        self.probe = probe
        self.u = u.clone().requires_grad_(True)
        with torch.enable_grad():
            self.y = probe.run(self.u)

    def pull(self, heads: int | slice, dims: int | slice, cotangent: Tensor) -> Tensor:
        """The gradient (t, rows) of the cotangent on some heads and dims."""
        if not self.y.requires_grad:
            raise NotLifted(f"{self.probe.letter} does not hang on the projection smoothly")
        full = torch.zeros_like(self.y)
        full[heads, :, dims] = cotangent
        (grad,) = torch.autograd.grad(self.y, self.u, full, retain_graph=True)
        return grad[self.probe.at]


def _own_rows(tape: _Tape, sizes: _Sizes, reads: Tensor, odd: Tensor, cotangents: Tensor) -> Tensor:
    """(h, rows): the rows a head reads apart from the norm's statistics."""
    heads, _, dim = odd.shape
    if len(sizes.sets) > 1 or heads == 1:
        return reads
    own = torch.zeros_like(reads)
    # a quarter of the columns at a time: the median must fall on rows that are not read
    for part in torch.arange(dim).chunk(4):
        for h in range(heads):
            dims = slice(int(part[0]), int(part[-1]) + 1)
            against = (cotangents[:, dims] * odd[h, :, dims]).sum(1, keepdim=True)
            w = sizes.corrected(tape.pull(h, dims, cotangents[:, dims]), against).abs().amax(0)
            own[h] |= w > 1e-9 * w.max()
    return own


def _columns(tape: _Tape, sizes: _Sizes | None, of_head: Tensor, odd: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (h, d, 2) and values (h, t, d, 2), one pull for each column of all heads."""
    heads, tokens, dim = odd.shape
    rows = torch.full((heads, dim, 2), -1)
    values = torch.zeros(heads, tokens, dim, 2, dtype=torch.float64)
    spread = (share[:, None] * of_head).sum(0).clamp(min=1e-300)
    for d in range(dim):
        w = tape.pull(slice(None), d, share[:, None].expand(heads, tokens))
        if sizes is not None:
            against = torch.zeros(tokens, len(sizes.sets), dtype=torch.float64)
            against.index_add_(1, sizes.of_head, (share[:, None] * odd[:, :, d]).T)
            w = sizes.corrected(w, against)
        w = w / spread
        reads = of_head & (w.abs().amax(0) > TINY * w.abs().max())
        _two(tape.probe.letter, reads, w, rows[:, d], values[:, :, d])
    return rows, values


def _two(letter: str, reads: Tensor, w: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write the at most two rows behind a column of each head, and their values."""
    count = reads.sum(1)
    if int(count.max()) > 2:
        raise NotLifted(f"a column of {letter} mixes {int(count.max())} projection rows")
    if int(count.min()) == 0:
        raise NotLifted(f"a column of {letter} is constant")
    head, row = torch.nonzero(reads, as_tuple=True)
    place = torch.arange(len(head)) - torch.cumsum(count, 0).sub(count)[head]
    rows[head, place] = row
    values[head, :, place] = w[:, row].T
