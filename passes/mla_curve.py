"""What a latent loses at several sizes: one search of settings, and closed forms at the others near what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from passes import Curve
from passes.mla_absorb import Absorber, Setting
from passes.mla_rebuilt import Rebuilder, Way, search_way
from passes.mla_scene import Scene, error, measure
from passes.mla_search import resized, search
from passes.mla_shape import sizes
from passes.mla_source import Known, shifted
from passes.refit import Measured, flat, refit, refitted_error
from rewrite.heads import Latents, Rewritten, Weights
from rewrite.ranks import ALONE, Share
from rewrite.site import Latent

TELLING = 1e-4
"""Relative error above which what the model's predictions lose is no rounding."""
S = TypeVar("S")
Error = Callable[[S], float]


@dataclass(frozen=True, eq=False)
class Closed(Generic[S]):
    """A closed form at any size: the setting that measuring chooses at the share, those that are tried at another size,
    and the latents of a setting."""

    seen: Known
    found: Callable[[Error[S]], S]
    near: Callable[[S, int], Iterable[S]]
    latents: Callable[[S, int], Latents]


def absorbed_sizes(absorber: Absorber, share: int) -> Closed[Setting]:
    """Of the absorbed form, whose number of turned channels follows the size."""
    return Closed(
        absorber.known,
        lambda lost: search(absorber, share, None, lost),
        lambda setting, size: resized(absorber, setting, share, size),
        absorber.latents,
    )


def rebuilt_sizes(closed: Rebuilder) -> Closed[Way]:
    """Of the rebuilt form, whose way serves all sizes."""
    return Closed(closed.seen, lambda lost: search_way(lost, closed.seen.site), lambda way, _: (way,), closed.latents)


@dataclass(frozen=True, eq=False)
class _Tried:
    """One size of one site, its error and the moments that refit its output."""

    error: float
    latents: Latents
    weights: Weights
    seen: Measured


def curve(
    closed: Closed[S],
    weights: Weights,
    stage: Sequence[Scene],
    share: int,
    full: int,
    refits: bool,
    work: Share = ALONE.share,
) -> Curve:
    """Errors at sizes around `share`; at `full` numbers nothing is lost. `work` shares scenes out (`Ranks.share`)."""

    def lost(setting: S) -> float:
        latents = closed.latents(setting, share)
        return error(stage, latents, shifted(closed.seen, weights, latents), work)

    def tried(setting: S, size: int) -> _Tried:
        latents = closed.latents(setting, size)
        made = shifted(closed.seen, weights, latents)
        seen = measure(stage, latents, made)
        return _Tried(refitted_error(made, seen) if refits else seen.held.error(flat(made)), latents, made, seen)

    start = closed.found(lost)
    best = {
        size: min((tried(s, size) for s in closed.near(start, size)), key=lambda t: t.error)
        for size in sizes(share, full - 1)
    }
    size = max((n for n, t in best.items() if n <= share and t.error > TELLING), default=min(best))
    one, site = best[size], closed.seen.site
    made = refit(one.weights, one.seen)[0] if refits else one.weights
    form = Latent(one.latents.rank, one.latents.rope_dim, one.latents.up_k is not None)
    example = Rewritten(replace(site, form=form), made, tuple(range(site.heads)), (), one.latents)
    return Curve({n: t.error for n, t in best.items()} | {full: 0.0}, size, example)
