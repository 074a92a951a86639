"""Local tuning: Adam on one site's new projections, against the original attention's output on the calibration.

Nothing outside the site changes and no gradient leaves it, so the memory is that of one layer. A site is tuned on the
activations that the converted and tuned sites before it leave behind, and keeps what it learns only where windows that
did not fit agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from passes import Stats
from passes.eigen import eigh
from passes.mla_scene import Scene
from passes.soap import Soap
from passes.tune_factors import FactorsTuned
from passes.tune_heads import HeadsTuned
from passes.tune_latent import LatentTuned
from passes.tune_lots import Lot, joined, lots_of
from passes.tune_scene import RowScene, staged
from rewrite.heads import Rewritten, Weights
from rewrite.site import Site, Sparse

RATES = (8e-2, 2e-2, 5e-3, 1.25e-3)
"""Steps relative to the size of a tensor, the first that helps on windows that did not fit; they fall to nothing in a
line. A short run cannot choose: what is best over 25 steps is a quarter of what is best over 200."""
LOOKS = 16
"""Gradients of the start from which the axes are known that the first steps are taken along."""
FLOOR = 1e-2
"""Directions of a tensor's input that hold less of its mean square count as if they held so much."""


class Tuned(Protocol):
    """A site as something to learn: tensors, and what it gives with them."""

    @cached_property
    def start(self) -> Mapping[str, Tensor]:
        """The tensors as the closed form left them, float32."""
        ...

    def inputs(self, scene: Scene) -> Mapping[str, Tensor]:
        """(b, [heads,] tokens, n): the rows that a tensor (..., n) is multiplied with, where it is known."""
        ...

    def output(self, scene: Scene, tensors: Mapping[str, Tensor]) -> Tensor:
        """(b, t, outputs) of the attention."""
        ...

    def done(self, tensors: Mapping[str, Tensor]) -> Rewritten:
        """The result with these tensors."""
        ...


@dataclass(frozen=True)
class Tuning:
    """How many steps, and the seed of the order in which windows are looked at."""

    steps: int
    seed: int = 0


def tune(made: Rewritten, site: Site, source: Weights, stats: Stats, tuning: Tuning) -> Rewritten:
    """The rewritten site after `tuning.steps` steps; as it was where unseen windows say so."""
    tuned = _tuned(made, site, source)
    if isinstance(tuned, str):
        return replace(made, notes=(*made.notes, f"{site.name}: not tuned, {tuned}"))
    stage = [replace(scene, judges=_thinned(scene.judges)) for scene in staged(stats, site, source)]
    frames = _framed(tuned, stage)
    before = _judged(tuned, stage, {n: f.start for n, f in frames.items()})
    tries = (_learnt(tuned, stage, frames, tuning, rate) for rate in RATES)
    learnt = next((t for t in tries if _judged(tuned, stage, t) < before), None)
    if learnt is None:
        return replace(made, notes=(*made.notes, f"{site.name}: tuning left out, it helped on no unseen windows"))
    return tuned.done(learnt)


def _tuned(made: Rewritten, site: Site, source: Weights) -> Tuned | str:
    """What of the site can learn, or why nothing can."""
    if isinstance(made.site.form, Sparse):
        return "a mask holds no numbers to fit"
    if made.latents is not None:
        return LatentTuned(made)
    if any(o.shift is not None for o in (site.q, site.k, site.v)):
        return "a constant follows its projections"
    return HeadsTuned(made, site, source) if made.factors is None else FactorsTuned(made, site, source)


@dataclass(frozen=True)
class Frame:
    """A tensor as start + move @ right: the inputs of a move are white, and it is a part of the tensor's own size."""

    start: Tensor
    right: Tensor
    """([heads,] n, n)"""

    def at(self, move: Tensor) -> Tensor:
        """The tensor."""
        return self.start + move @ self.right

    def still(self) -> Tensor:
        """No move yet."""
        return torch.zeros_like(self.start, requires_grad=True)


Frames = Mapping[str, Frame]


def _framed(tuned: Tuned, stage: Sequence[RowScene]) -> Frames:
    """Every tensor in the frame of its inputs."""
    roots = {n: _root(gram) for n, gram in _moments(tuned, stage).items()}
    frames: dict[str, Frame] = {}
    for name, x in tuned.start.items():
        root = roots.get(name, torch.eye(x.shape[-1]))
        size = (x @ root).square().mean().sqrt().clamp(min=1e-8)
        frames[name] = Frame(x, size * torch.linalg.inv(root))
    return frames


def _learnt(tuned: Tuned, stage: Sequence[RowScene], frames: Frames, tuning: Tuning, rate: float) -> dict[str, Tensor]:
    """Every tensor moved in its frame, so that one rate serves all."""
    moves = {n: f.still() for n, f in frames.items()}
    energy, lots = _energy(stage), lots_of(stage, tuning.steps, tuning.seed)

    def gradients(lot: Lot) -> dict[str, Tensor]:
        tokens = sum(int(scene.fits[i].sum()) for scene, i in lot)
        sums = [torch.zeros_like(x) for x in moves.values()]
        for scene in joined(lot):
            wrong = _wrong(tuned, scene, frames, moves) / (energy * tokens)
            found = torch.autograd.grad(wrong, [*moves.values()], allow_unused=True, materialize_grads=True)
            sums = [x + g for x, g in zip(sums, found, strict=True)]
        return dict(zip(moves, sums, strict=True))

    soap = Soap(moves)
    for lot in lots[:LOOKS]:
        soap.look(gradients(lot))
    soap.turn()
    for step, lot in enumerate(lots):
        soap.step(gradients(lot), rate * (1 - step / len(lots)))
    return {n: f.at(moves[n]).detach() for n, f in frames.items()}


def _wrong(tuned: Tuned, scene: RowScene, frames: Frames, moves: Mapping[str, Tensor]) -> Tensor:
    """Squared error of the tokens that fit."""
    now = {n: f.at(moves[n]) for n, f in frames.items()}
    return (tuned.output(scene, now) - scene.out.float())[scene.fits].square().sum()


def _energy(stage: Sequence[Scene]) -> float:
    """Mean square of the original's output over the tokens that fit."""
    total = sum(float(s.out[s.fits].square().sum()) for s in stage)
    return total / max(1, sum(int(s.fits.sum()) for s in stage))


def _moments(tuned: Tuned, stage: Sequence[Scene]) -> dict[str, Tensor]:
    """Second moments ([heads,] n, n) of what the tensors are multiplied with."""
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for scene in stage:
            for name, rows in tuned.inputs(scene).items():
                gram = (rows.mT.double() @ rows.double()).sum(0)
                sums[name] = sums[name] + gram if name in sums else gram
    return sums


def _root(gram: Tensor) -> Tensor:
    """The symmetric root of mean square 1, float32."""
    values, vectors = eigh((gram + gram.mT) / 2)
    values = values.clamp(min=0) / values.mean(-1, keepdim=True).clamp(min=1e-30) + FLOOR
    return ((vectors * values.sqrt()[..., None, :]) @ vectors.mT).float()


def _thinned(judges: Tensor) -> Tensor:
    """Every other window of those (b, t) that judge: an eighth of the text tells which rate helps, and what does not
    judge is learnt from."""
    places = judges.any(1).nonzero().flatten()[::2]
    return judges if len(judges) == 1 else torch.zeros_like(judges).index_copy(0, places, judges[places])


def _judged(tuned: Tuned, stage: Sequence[Scene], tensors: Mapping[str, Tensor]) -> float:
    """Relative squared error on the tokens that did not fit."""
    wrong = total = 0.0
    with torch.no_grad():
        for scene in stage:
            y = scene.out[scene.judges].float()
            wrong += float((tuned.output(scene, tensors)[scene.judges] - y).double().square().sum())
            total += float(y.double().square().sum())
    return wrong / total if total else 0.0
