"""Gauss-Newton on the true error of the attention's output: the last word on merged heads.

The unknowns are the maps from the source's queries, keys and values to the merged ones; the output projection is
solved in closed form for each of them. Steps are Levenberg-Marquardt: conjugate gradients on the linearised
attention, kept only where the error falls; the result is kept only where it falls on tokens that did not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passes import Stats
from passes.gqa_build import Parts
from passes.polish_scene import REAL, Maps, Normed, Scene, capped, normed, scenes, turned, whiten
from passes.refit import RIDGES, Sums, head_rows, kept_sums, solved
from rewrite.heads import Weights
from rewrite.site import Operand, Site

TOKENS = 8192
"""Calibration tokens that are looked at."""
INNER = 8
"""Conjugate gradients a step; each costs about three forward passes of the attention."""
DAMPING = 1e-2
NEGLIGIBLE = 1e-3
"""Relative error of the output that no step is worth taking against."""
ENOUGH = 8
"""So many equations per unknown are needed: outputs times tokens that fit."""
SETTLED = 0.02
"""A step that changes the error by less than this part is the last."""


def polishes(site: Site) -> bool:
    """Whether the attention can be run from its maps: angles that are affine in the position, no factor per token."""
    operands = (site.q, site.k, site.v)
    plain = all(o.rope is None or o.rope.table is None for o in operands)
    bare = site.v.norm is None and all(o.token_gain is None and o.shift is None for o in operands)
    return (
        plain
        and bare
        and all(a is None or a.tensor is None for a in (site.q.after, site.k.after))
        and site.v.after is None
    )


def polish(site: Site, source: Weights, parts: Parts, stats: Stats, steps: int) -> Parts:
    """The parts with less output error on unseen tokens, or as they were."""
    white = whiten(stats, parts, TOKENS)
    stage = [*scenes(stats, parts, white, source, TOKENS)]
    problem = _Problem(stage, parts.gains, source.out_bias is not None)
    maps, out = white.enter(parts), _flat(parts)
    start = problem.at(maps, out)
    if start.judges < NEGLIGIBLE or problem.equations < ENOUGH * sum(m.numel() for m in maps.parts):
        return parts
    now = problem.solve(maps, out)
    damping = DAMPING
    for _ in range(steps):
        trial = problem.solve(now.maps.plus(problem.step(now, damping)), out)
        gain, worse = 1 - trial.judges / max(now.judges, 1e-300), damping * 16
        now, damping = (trial, damping / 4) if gain > 0 else (now, worse)
        if abs(gain) < SETTLED:
            break
    if not now.judges < start.judges:
        return parts
    q, k, v = white.leave(now.maps, parts)
    bias = now.out[:, -1] if parts.out_bias is not None else None
    shape = parts.out.shape
    return replace(parts, q=q, k=k, v=v, out=now.out[:, : shape[1] * shape[2]].reshape(shape), out_bias=bias)


def _flat(parts: Parts) -> Tensor:
    out = parts.out.flatten(1)
    return out if parts.out_bias is None else torch.cat([out, parts.out_bias[:, None]], 1)


@dataclass(frozen=True, eq=False)
class _Point:
    """Maps with their output projection (outputs, h*d [+ 1]) and the relative errors."""

    maps: Maps
    out: Tensor
    fits: float
    judges: float


@dataclass(frozen=True, eq=False)
class _Linear:
    """One scene's attention at a point."""

    scene: Scene
    nq: Normed
    nk: Normed
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    steep: Tensor
    """p times what a score grows by for a change of q·k"""
    z: Tensor


@dataclass(frozen=True, eq=False)
class _Problem:
    stage: Sequence[Scene]
    gains: tuple[Tensor, Tensor, Tensor]
    biased: bool

    @property
    def equations(self) -> float:
        """Outputs of all tokens that fit."""
        return sum(float(scene.fits.sum()) * scene.y.shape[-1] for scene in self.stage)

    def at(self, maps: Maps, out: Tensor) -> _Point:
        """The errors of some maps with an output projection."""
        fit, judge = self._sums(maps)
        return _Point(maps, out, fit.error(out), (judge if judge.yy > 0 else fit).error(out))

    def solve(self, maps: Maps, out: Tensor) -> _Point:
        """The best output projection for some maps, and its errors; unseen tokens choose the ridge, or none."""
        fit, judge = self._sums(maps)
        judge = judge if judge.yy > 0 else fit
        solutions = [out, *(solved(out, fit, ridge) for ridge in RIDGES)]
        best = min(solutions, key=judge.error)
        return _Point(maps, best, fit.error(best), judge.error(best))

    def _sums(self, maps: Maps) -> tuple[Sums, Sums]:
        fit: Sums | None = None
        judge: Sums | None = None
        for scene in self.stage:
            z = head_rows(_run(scene, maps, self.gains).z, self.biased)
            first, second = (kept_sums(z, scene.y, w) for w in (scene.fits, scene.judges))
            fit, judge = first if fit is None else fit + first, second if judge is None else judge + second
        if fit is None or judge is None:
            raise ValueError("the calibration holds no batch")
        return fit, judge

    def step(self, at: _Point, damping: float) -> Maps:
        """(JᵀJ + λ)δ = -Jᵀr by conjugate gradients; λ relative to the curvature along the gradient."""
        lines = [_run(scene, at.maps, self.gains) for scene in self.stage]
        out = at.out[:, : at.out.shape[1] - self.biased]
        heads = out.reshape(len(out), lines[0].q.shape[1], -1).to(REAL)
        x, r = at.maps.plus(at.maps, -1.0), self._downhill(lines, at.out, heads)
        p, size = r, r.dot(r)
        damp: float | None = None
        for _ in range(INNER):
            if size <= 0:
                break
            bent = self._curve(lines, p, heads)
            damp = damping * p.dot(bent) / p.dot(p) if damp is None else damp
            bent = bent.plus(p, damp)
            length = size / p.dot(bent)
            x, r = x.plus(p, length), r.plus(bent, -length)
            old, size = size, r.dot(r)
            p = r.plus(p, size / old)
        return x

    def _downhill(self, lines: Sequence[_Linear], out: Tensor, heads: Tensor) -> Maps:
        total: Maps | None = None
        for line in lines:
            z = head_rows(line.z, self.biased)
            wrong = (line.scene.y.flatten(0, 1) - z @ out.T).reshape(line.scene.y.shape)
            pulled = _pull(line, (wrong * line.scene.fits[..., None]).to(REAL), heads, self.gains)
            total = pulled if total is None else total.plus(pulled)
        if total is None:
            raise ValueError("the calibration holds no batch")
        return total

    def _curve(self, lines: Sequence[_Linear], step: Maps, heads: Tensor) -> Maps:
        total: Maps | None = None
        for line in lines:
            change = torch.einsum("bhtd,ohd->bto", _push(line, step, self.gains), heads)
            pulled = _pull(line, change * line.scene.fits[..., None].to(REAL), heads, self.gains)
            total = pulled if total is None else total.plus(pulled)
        return step if total is None else total


def _placed(operand: Operand, gain: Tensor, u: Tensor, at: Tensor | None = None) -> Tensor:
    return turned(u * gain[:, None].to(u.dtype), operand.rope, at)


def _lifted(operand: Operand, gain: Tensor, slope: Tensor, at: Tensor | None = None) -> Tensor:
    """Transpose of `_placed`."""
    return turned(slope, operand.rope, at, back=True) * gain[:, None].to(slope.dtype)


def _times(rows: Tensor, maps: Tensor) -> Tensor:
    return rows @ maps.to(rows.dtype).transpose(1, 2)


def _run(scene: Scene, maps: Maps, gains: tuple[Tensor, Tensor, Tensor]) -> _Linear:
    site, kv = scene.site, list(scene.kv_of)
    nq, nk = normed(site.q.norm, _times(scene.q, maps.q)), normed(site.k.norm, _times(scene.k, maps.k))
    q, k = _placed(site.q, gains[0], nq.value, scene.at), _placed(site.k, gains[1], nk.value)[:, kv]
    v = _placed(site.v, gains[2], _times(scene.v, maps.v))[:, kv]
    score, slope = capped(site, q @ k.transpose(-1, -2) * scene.scale)
    logits = score + scene.added
    if scene.sink is not None:
        p = torch.cat([logits, scene.sink], -1).softmax(-1)[..., :-1]
    else:
        p = torch.nan_to_num(logits.softmax(-1))
    return _Linear(scene, nq, nk, q, k, v, p, p * (slope * scene.scale), p @ v)


def _push(line: _Linear, step: Maps, gains: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Change of the heads' outputs, (b, h, t, d)."""
    site, scene, kv = line.scene.site, line.scene, list(line.scene.kv_of)
    dq = _placed(site.q, gains[0], line.nq.push(_times(scene.q, step.q)), scene.at)
    dk = _placed(site.k, gains[1], line.nk.push(_times(scene.k, step.k)))[:, kv]
    dv = _placed(site.v, gains[2], _times(scene.v, step.v))[:, kv]
    change = (dq @ line.k.transpose(-1, -2) + line.q @ dk.transpose(-1, -2)) * line.steep
    # Σ p·change is what the normaliser takes back; (p·change) v - z Σ p·change saves one pass over all scores
    return change @ line.v - line.z * change.sum(-1, keepdim=True) + line.p @ dv


def _pull(line: _Linear, wrong: Tensor, heads: Tensor, gains: tuple[Tensor, Tensor, Tensor]) -> Maps:
    """Transpose of `_push` behind the output projection: (b, t, outputs) to slopes of the maps."""
    site, scene = line.scene.site, line.scene
    gz = torch.einsum("bto,ohd->bhtd", wrong, heads)
    gs = (gz @ line.v.transpose(-1, -2) - (gz * line.z).sum(-1, keepdim=True)) * line.steep
    groups = len(gains[1])
    gq = line.nq.pull(_lifted(site.q, gains[0], gs @ line.k, scene.at))
    gk = line.nk.pull(_lifted(site.k, gains[1], _gathered(gs.transpose(-1, -2) @ line.q, scene.kv_of, groups)))
    gv = _lifted(site.v, gains[2], _gathered(line.p.transpose(-1, -2) @ gz, scene.kv_of, groups))
    return Maps(_outer(gq, scene.q), _outer(gk, scene.k), _outer(gv, scene.v))


def _gathered(slope: Tensor, kv_of: tuple[int, ...], groups: int) -> Tensor:
    b, _, s, d = slope.shape
    total = torch.zeros(b, groups, s, d, dtype=slope.dtype)
    return total.index_add(1, torch.tensor(kv_of), slope)


def _outer(slope: Tensor, rows: Tensor) -> Tensor:
    return torch.einsum("bnsi,bnsj->nij", slope, rows).double()
