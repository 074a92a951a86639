"""Damped Gauss-Newton on the true error of an attention's output, whatever the unknowns in it are.

The output projection is solved in closed form for each of their values. Steps are Levenberg-Marquardt: conjugate
gradients on the linearised attention, kept only where the error falls on tokens that did not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from passes.refit import RIDGES, Sums, head_rows, kept_sums, solved
from rewrite.ranks import ALONE, Share

INNER = 8
"""Conjugate gradients a step; each costs about three forward passes of the attention."""
DAMPING = 1e-2
SETTLED = 0.02
"""A step that changes the error by less than this part is the last."""

M = TypeVar("M", bound="Unknowns")
S = TypeVar("S", bound="Seen", contravariant=True)
L = TypeVar("L", bound="Line")


class Unknowns(Protocol):
    """A point of the space that is searched."""

    @property
    def parts(self) -> Sequence[Tensor]:
        """All numbers."""
        ...

    def of(self: M, parts: Sequence[Tensor]) -> M:
        """Another point, of these numbers."""
        ...

    def plus(self: M, step: M, size: float = 1.0) -> M:
        """This and `size` times a step."""
        ...

    def dot(self: M, other: M) -> float:
        """Inner product."""
        ...


class Seen(Protocol):
    """Some windows of calibration."""

    @property
    def out(self) -> Tensor:
        """(b, t, outputs) of the original."""
        ...

    @property
    def fits(self) -> Tensor:
        """(b, t) tokens that fit, as 0 and 1 or false and true."""
        ...

    @property
    def judges(self) -> Tensor:
        """(b, t) tokens that judge."""
        ...


class Line(Protocol):
    """One scene's attention at a point."""

    @property
    def scene(self) -> Any:
        """The scene."""
        ...

    @property
    def z(self) -> Tensor:
        """(b, h, t, d) of the heads."""
        ...


class Attention(Protocol[S, M, L]):
    """The attention as a function of its unknowns, and its derivative."""

    def run(self, scene: S, maps: M) -> L:
        """The attention."""
        ...

    def push(self, line: L, maps: M, step: M) -> Tensor:
        """Change of the heads' outputs, (b, h, t, d)."""
        ...

    def pull(self, line: L, maps: M, slope: Tensor) -> M:
        """Transpose of `push`: slopes (b, h, t, d) of the heads' outputs to slopes of the unknowns."""
        ...


@dataclass(frozen=True, eq=False)
class Point(Generic[M]):
    """Unknowns with their output projection (outputs, h*d [+ 1]) and the relative errors."""

    maps: M
    out: Tensor
    fits: float
    judges: float


@dataclass(frozen=True, eq=False)
class Problem(Generic[S, M, L]):
    """An attention on a stage; `biased` where its output has a bias. `share` works on scenes (`Ranks.share`)."""

    stage: Sequence[S]
    attention: Attention[S, M, L]
    biased: bool
    share: Share = ALONE.share

    def descend(self, maps: M, out: Tensor, steps: int, *, negligible: float, enough: int) -> tuple[Point[M], Point[M]]:
        """The start, and the best point of at most `steps` steps: the start itself where its error is `negligible`,
        where there are less than `enough` equations an unknown, or where nothing was better on unseen tokens."""
        start = self.at(maps, out)
        if start.judges < negligible or self.equations < enough * sum(m.numel() for m in maps.parts):
            return start, start
        now, damping = self.solve(maps, out), DAMPING
        for _ in range(steps):
            trial = self.solve(now.maps.plus(self.step(now, damping)), out)
            gain, worse = 1 - trial.judges / max(now.judges, 1e-300), damping * 16
            now, damping = (trial, damping / 4) if gain > 0 else (now, worse)
            if abs(gain) < SETTLED:
                break
        return start, now if now.judges < start.judges else start

    @property
    def equations(self) -> float:
        """Outputs of all tokens that fit."""
        return sum(float(scene.fits.sum()) * scene.out.shape[-1] for scene in self.stage)

    def at(self, maps: M, out: Tensor) -> Point[M]:
        """The errors of some unknowns with an output projection."""
        fit, judge = self._sums(maps)
        return Point(maps, out, fit.error(out), (judge if judge.yy > 0 else fit).error(out))

    def solve(self, maps: M, out: Tensor) -> Point[M]:
        """The best output projection for some unknowns, and its errors; unseen tokens choose the ridge, or none."""
        fit, judge = self._sums(maps)
        judge = judge if judge.yy > 0 else fit
        best = min([out, *(solved(out, fit, ridge) for ridge in RIDGES)], key=judge.error)
        return Point(maps, best, fit.error(best), judge.error(best))

    def _sums(self, maps: M) -> tuple[Sums, Sums]:
        def terms(scene: S) -> list[Any]:
            z = head_rows(self.attention.run(scene, maps).z, self.biased)
            fit, judge = (kept_sums(z, scene.out, keep) for keep in (scene.fits, scene.judges))
            return [*fit.numbers, *judge.numbers]

        sums: list[Sums] = []
        for found in self.share(self.stage, terms):
            more = [Sums(*found[:4]), Sums(*found[4:])]
            sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
        if not sums:
            raise ValueError("the calibration holds no batch")
        return sums[0], sums[1]

    def step(self, at: Point[M], damping: float) -> M:
        """(JᵀJ + λ)δ = -Jᵀr by conjugate gradients; λ relative to the curvature along the gradient."""
        lines = _Lines(self, at)
        x, r = at.maps.plus(at.maps, -1.0), lines.added(lines.downhill)
        p, size = r, r.dot(r)
        damp: float | None = None
        for _ in range(INNER):
            if size <= 0:
                break
            bent = lines.added(partial(lines.curve, p))
            damp = damping * p.dot(bent) / p.dot(p) if damp is None else damp
            bent = bent.plus(p, damp)
            length = size / p.dot(bent)
            x, r = x.plus(p, length), r.plus(bent, -length)
            old, size = size, r.dot(r)
            p = r.plus(p, size / old)
        return x


@dataclass(frozen=True, eq=False)
class _Lines(Generic[S, M, L]):
    """A problem linearised at a point; `known` holds the scenes that this process has come to."""

    problem: Problem[S, M, L]
    at: Point[M]
    known: dict[int, L] = field(default_factory=dict)

    def added(self, slope: Callable[[L], M]) -> M:
        """The sum of a slope over all scenes."""

        def of(place: int) -> Sequence[Tensor]:
            if place not in self.known:
                self.known[place] = self.problem.attention.run(self.problem.stage[place], self.at.maps)
            return slope(self.known[place]).parts

        total = self.at.maps.plus(self.at.maps, -1.0)
        for parts in self.problem.share(range(len(self.problem.stage)), of):
            total = total.plus(self.at.maps.of(parts))
        return total

    def downhill(self, line: L) -> M:
        """-Jᵀr of one scene."""
        made = (head_rows(line.z, self.problem.biased) @ self.at.out.T).reshape(line.scene.out.shape)
        wrong = ((line.scene.out - made) * line.scene.fits[..., None]).to(line.z.dtype)
        slope = torch.einsum("bto,ohd->bhtd", wrong, self._heads(line))
        return self.problem.attention.pull(line, self.at.maps, slope)

    def curve(self, step: M, line: L) -> M:
        """JᵀJ of one scene, times a step."""
        attention, heads = self.problem.attention, self._heads(line)
        change = torch.einsum("bhtd,ohd->bto", attention.push(line, self.at.maps, step), heads)
        change = change * line.scene.fits[..., None].to(heads.dtype)
        return attention.pull(line, self.at.maps, torch.einsum("bto,ohd->bhtd", change, heads))

    def _heads(self, line: L) -> Tensor:
        """(outputs, h, d) the output projection."""
        flat = self.at.out[:, : self.at.out.shape[1] - self.problem.biased]
        return flat.unflatten(1, (line.z.shape[1], -1)).to(line.z.dtype)
