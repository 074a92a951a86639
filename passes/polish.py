"""Gauss-Newton on the true error of the attention's output: the last word on merged heads.

The unknowns are the maps from the source's queries, keys and values to the merged ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from passes import Stats
from passes.gauss_newton import Problem
from passes.gqa_build import Parts
from passes.polish_scene import Maps, Normed, Scene, capped, normed, scenes, turned, whiten
from rewrite.heads import Weights
from rewrite.site import Operand, Site

TOKENS = 8192
"""Calibration tokens that are looked at."""
NEGLIGIBLE = 1e-3
"""Relative error of the output that no step is worth taking against."""
ENOUGH = 8
"""So many equations per unknown are needed: outputs times tokens that fit."""


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
    problem = Problem(stage, Merged(parts.gains), source.out_bias is not None, stats.share)
    start, now = problem.descend(white.enter(parts), _flat(parts), steps, negligible=NEGLIGIBLE, enough=ENOUGH)
    if now is start:
        return parts
    q, k, v = white.leave(now.maps, parts)
    bias = now.out[:, -1] if parts.out_bias is not None else None
    shape = parts.out.shape
    return replace(parts, q=q, k=k, v=v, out=now.out[:, : shape[1] * shape[2]].reshape(shape), out_bias=bias)


def _flat(parts: Parts) -> Tensor:
    out = parts.out.flatten(1)
    return out if parts.out_bias is None else torch.cat([out, parts.out_bias[:, None]], 1)


@dataclass(frozen=True, eq=False)
class Linear:
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
class Merged:
    """The attention as a function of its maps; `gains` (heads, dim) of q, k and v."""

    gains: tuple[Tensor, Tensor, Tensor]

    def run(self, scene: Scene, maps: Maps) -> Linear:
        """The attention with some maps."""
        site, kv, gains = scene.site, list(scene.kv_of), self.gains
        nq, nk = normed(site.q.norm, _times(scene.q, maps.q)), normed(site.k.norm, _times(scene.k, maps.k))
        q, k = _placed(site.q, gains[0], nq.value, scene.at), _placed(site.k, gains[1], nk.value)[:, kv]
        v = _placed(site.v, gains[2], _times(scene.v, maps.v))[:, kv]
        score, slope = capped(site, q @ k.transpose(-1, -2) * scene.scale)
        logits = score + scene.added
        if scene.sink is not None:
            p = torch.cat([logits, scene.sink], -1).softmax(-1)[..., :-1]
        else:
            p = torch.nan_to_num(logits.softmax(-1))
        return Linear(scene, nq, nk, q, k, v, p, p * (slope * scene.scale), p @ v)

    def push(self, line: Linear, maps: Maps, step: Maps) -> Tensor:
        """Change of the heads' outputs, (b, h, t, d)."""
        site, scene, kv, gains = line.scene.site, line.scene, list(line.scene.kv_of), self.gains
        dq = _placed(site.q, gains[0], line.nq.push(_times(scene.q, step.q)), scene.at)
        dk = _placed(site.k, gains[1], line.nk.push(_times(scene.k, step.k)))[:, kv]
        dv = _placed(site.v, gains[2], _times(scene.v, step.v))[:, kv]
        change = (dq @ line.k.transpose(-1, -2) + line.q @ dk.transpose(-1, -2)) * line.steep
        # Σ p·change is what the normaliser takes back; (p·change) v - z Σ p·change saves one pass over all scores
        return change @ line.v - line.z * change.sum(-1, keepdim=True) + line.p @ dv

    def pull(self, line: Linear, maps: Maps, slope: Tensor) -> Maps:
        """Transpose of `push`."""
        site, scene, gains = line.scene.site, line.scene, self.gains
        gs = (slope @ line.v.transpose(-1, -2) - (slope * line.z).sum(-1, keepdim=True)) * line.steep
        groups = len(gains[1])
        gq = line.nq.pull(_lifted(site.q, gains[0], gs @ line.k, scene.at))
        gk = line.nk.pull(_lifted(site.k, gains[1], _gathered(gs.transpose(-1, -2) @ line.q, scene.kv_of, groups)))
        gv = _lifted(site.v, gains[2], _gathered(line.p.transpose(-1, -2) @ slope, scene.kv_of, groups))
        return Maps(_outer(gq, scene.q), _outer(gk, scene.k), _outer(gv, scene.v))


def _placed(operand: Operand, gain: Tensor, u: Tensor, at: Tensor | None = None) -> Tensor:
    return turned(u * gain[:, None].to(u.dtype), operand.rope, at)


def _lifted(operand: Operand, gain: Tensor, slope: Tensor, at: Tensor | None = None) -> Tensor:
    """Transpose of `_placed`."""
    return turned(slope, operand.rope, at, back=True) * gain[:, None].to(slope.dtype)


def _times(rows: Tensor, maps: Tensor) -> Tensor:
    return rows @ maps.to(rows.dtype).transpose(1, 2)


def _gathered(slope: Tensor, kv_of: tuple[int, ...], groups: int) -> Tensor:
    b, _, s, d = slope.shape
    total = torch.zeros(b, groups, s, d, dtype=slope.dtype)
    return total.index_add(1, torch.tensor(kv_of), slope)


def _outer(slope: Tensor, rows: Tensor) -> Tensor:
    return torch.einsum("bnsi,bnsj->nij", slope, rows).double()
