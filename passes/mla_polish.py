"""Damped Gauss-Newton on the true error of the attention's output: the last word on a latent's maps.

The unknowns are all maps of the latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codegen.eager import rotated
from codegen.latent import rotation
from passes.eigen import eigh
from passes.gauss_newton import INNER, Problem
from passes.mla_scene import REAL, Scene
from passes.moments import SCORES
from passes.polish_scene import capped
from passes.refit import flat, shaped
from rewrite.heads import Latents, Weights
from rewrite.ranks import ALONE, Share

NEGLIGIBLE = 1e-5
"""Relative error of the output that no step is worth taking against."""
ENOUGH = 4
"""So many equations per unknown are needed: outputs times tokens that fit."""
RIDGE = 1e-6
WORK = 4e12
"""Floating point operations that a polish may take."""


@dataclass(frozen=True, eq=False)
class Maps:
    """The unknowns on whitened y and q: down (r, features), turn (p, features), read (h, r, d), query_turn (h, p, d)
    and up_v (h, dv, r)."""

    parts: tuple[Tensor, ...]

    def of(self, parts: Sequence[Tensor]) -> Maps:
        """Other maps, from the five."""
        return Maps(tuple(parts))

    def plus(self, step: Maps, size: float = 1.0) -> Maps:
        """This and `size` times a step."""
        return Maps(tuple(a + size * b for a, b in zip(self.parts, step.parts, strict=True)))

    def dot(self, other: Maps) -> float:
        """Inner product."""
        return sum(float((a.double() * b.double()).sum()) for a, b in zip(self.parts, other.parts, strict=True))


@dataclass(frozen=True, eq=False)
class Whitening:
    """Symmetric roots L of the second moments of y and, per head, of q: ỹ = L⁻¹ y and M̃ = M L."""

    y: Tensor
    q: Tensor

    def enter(self, latents: Latents) -> Maps:
        """The maps on whitened rows."""
        return Maps(
            tuple(
                m.to(REAL)
                for m in (
                    latents.down @ self.y,
                    latents.turn @ self.y,
                    latents.read @ self.q,
                    latents.query_turn @ self.q,
                    latents.up_v,
                )
            )
        )

    def leave(self, maps: Maps, like: Latents) -> Latents:
        """The maps on plain rows."""
        down, turn, read, query_turn, up_v = (m.double() for m in maps.parts)
        y, q = (torch.linalg.inv(root) for root in (self.y, self.q))
        return replace(like, down=down @ y, turn=turn @ y, read=read @ q, query_turn=query_turn @ q, up_v=up_v)


def whitened(stage: Sequence[Scene]) -> tuple[Whitening, list[Scene]]:
    """The roots, and the scenes with y and q whitened."""
    y = torch.stack([_gram(s.y.flatten(0, 1)) for s in stage]).sum(0)
    q = torch.stack([_gram(s.q.transpose(0, 1).flatten(1, 2)) for s in stage]).sum(0)
    tokens = sum(s.y.shape[0] * s.y.shape[1] for s in stage)
    queries = sum(s.q.shape[0] * s.q.shape[2] for s in stage)
    white = Whitening(_root(y / tokens), _root(q / queries))
    y_back, q_back = (torch.linalg.inv(root).to(REAL) for root in (white.y, white.q))
    return white, [replace(s, y=s.y @ y_back, q=s.q @ q_back) for s in stage]


def _gram(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows.mT @ rows


def _root(gram: Tensor) -> Tensor:
    """The symmetric root; directions that hold nothing are raised, so that there is a way back."""
    values, vectors = eigh((gram + gram.mT) / 2)
    size = values.mean(-1, keepdim=True).clamp(min=1e-30)
    return (vectors * (values.clamp(min=0) + RIDGE * size).sqrt()[..., None, :]) @ vectors.mT


@dataclass(frozen=True, eq=False)
class Linear:
    """One scene's attention at a point."""

    scene: Scene
    c: Tensor
    r: Tensor
    m: Tensor
    v: Tensor
    p: Tensor
    steep: Tensor
    z: Tensor


@dataclass(frozen=True, eq=False)
class Polished:
    """A latent with the weights that go with it; `error` is the output's on tokens that did not fit, relative."""

    latents: Latents
    weights: Weights
    error: float


def work(stage: Sequence[Scene], latents: Latents, steps: int, tokens: int, every: int) -> float:
    """Floating point operations of the steps on `tokens` tokens like those of the stage, with one query of `every`."""
    width = latents.rank + latents.rope_dim
    each = sum(
        2 * _scores(s, every) * (s.q.shape[-1] + latents.rope_dim + value)
        + 2 * s.y.shape[0] * s.y.shape[1] * (s.y.shape[2] * width + latents.read.numel() + latents.up_v.numel())
        for s in stage
        for value in latents.up_v.shape[1:2]
    )
    return 3 * each * steps * INNER * tokens / sum(s.y.shape[0] * s.y.shape[1] for s in stage)


def _scores(scene: Scene, every: int) -> float:
    """Scores of a scene's windows with one query of `every`, or as many as a scene holds of one window."""
    windows, heads, _, keys = scene.added.shape
    return windows * min(heads * keys * keys / every, SCORES)


def polish(
    stage: Sequence[Scene], latents: Latents, weights: Weights, steps: int, share: Share = ALONE.share
) -> Polished:
    """The latent and the output projection with less error on unseen tokens, or as they were."""
    white, stage = whitened(stage)
    problem = Problem(stage, Absorbed(latents.frequencies), weights.out_bias is not None, share)
    start, now = problem.descend(white.enter(latents), flat(weights), steps, negligible=NEGLIGIBLE, enough=ENOUGH)
    if now is start:
        return Polished(latents, weights, start.judges)
    return Polished(white.leave(now.maps, latents), shaped(weights, now.out), now.judges)


@dataclass(frozen=True, eq=False)
class Absorbed:
    """The attention as a function of its maps."""

    frequencies: Tensor

    def run(self, scene: Scene, maps: Maps) -> Linear:
        """The attention with some maps."""
        down, turn, read, query_turn, up_v = maps.parts
        c = scene.y @ down.T
        r = self._turned(scene.y @ turn.T, scene.keys_at)
        m = self._turned(torch.einsum("bhti,hpi->bhtp", scene.q, query_turn), scene.at)
        k, v = torch.einsum("bsr,hrd->bhsd", c, read), torch.einsum("bsr,hvr->bhsv", c, up_v)
        product = scene.q @ k.mT + m @ r[:, None].mT
        score, slope = capped(scene.site, product * scene.scale)
        logits = score + scene.added
        if scene.sink is not None:
            p = torch.cat([logits, scene.sink], -1).softmax(-1)[..., :-1]
        else:
            p = torch.nan_to_num(logits.softmax(-1))
        return Linear(scene, c, r, m, v, p, p * (slope * scene.scale), p @ v)

    def push(self, line: Linear, maps: Maps, step: Maps) -> Tensor:
        """Change of the heads' outputs, (b, h, t, dv)."""
        scene = line.scene
        down, turn, read, query_turn, up_v = step.parts
        dc, dr = scene.y @ down.T, self._turned(scene.y @ turn.T, scene.keys_at)
        dm = self._turned(torch.einsum("bhti,hpi->bhtp", scene.q, query_turn), scene.at)
        dk = torch.einsum("bsr,hrd->bhsd", dc, maps.parts[2]) + torch.einsum("bsr,hrd->bhsd", line.c, read)
        dv = torch.einsum("bsr,hvr->bhsv", dc, maps.parts[4]) + torch.einsum("bsr,hvr->bhsv", line.c, up_v)
        change = (scene.q @ dk.mT + line.m @ dr[:, None].mT + dm @ line.r[:, None].mT) * line.steep
        # Σ p·change is what the normaliser takes back; (p·change) v - z Σ p·change saves one pass over all scores
        return change @ line.v - line.z * change.sum(-1, keepdim=True) + line.p @ dv

    def pull(self, line: Linear, maps: Maps, slope: Tensor) -> Maps:
        """Transpose of `push`: slopes (b, h, t, dv) of the heads' outputs to slopes of the maps."""
        scene, gz = line.scene, slope
        gs = (gz @ line.v.mT - (gz * line.z).sum(-1, keepdim=True)) * line.steep
        gk, gv = gs.mT @ scene.q, line.p.mT @ gz
        gr = self._turned((gs.mT @ line.m).sum(1), scene.keys_at, back=True)
        gm = self._turned(gs @ line.r[:, None], scene.at, back=True)
        gc = torch.einsum("bhsd,hrd->bsr", gk, maps.parts[2]) + torch.einsum("bhsv,hvr->bsr", gv, maps.parts[4])
        return Maps(
            (
                torch.einsum("bsr,bsx->rx", gc, scene.y),
                torch.einsum("bsp,bsx->px", gr, scene.y),
                torch.einsum("bsr,bhsd->hrd", line.c, gk),
                torch.einsum("bhtp,bhti->hpi", gm, scene.q),
                torch.einsum("bhsv,bsr->hvr", gv, line.c),
            )
        )

    def _turned(self, x: Tensor, at: Tensor, back: bool = False) -> Tensor:
        """(..., tokens, p) turned; `back` the other way."""
        return rotated(rotation(-self.frequencies if back else self.frequencies), x, at)
