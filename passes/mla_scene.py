"""Attention from a latent on calibration tokens, and its measured error against the original's.

Scenes are some windows of the calibration in single precision, held for the dozens of trials of one site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.latent import attention
from passes import Stats
from passes.moments import SCORES, SiteBatch, windowed
from passes.refit import Measured, measured, relative, squares
from passes.trial import trial
from rewrite.heads import Latents, Weights
from rewrite.ranks import ALONE, Share
from rewrite.site import Site

REAL = torch.float32
ROWS = 2
"""Queries for each unknown of an output, at the least, of the refit."""
MOMENTS = 1 << 37
"""Multiplications that the moments of a refit may take where that is more."""
SPARSE = 2
"""Tokens that are read for each query of a refit, at the most."""
TRIAL_TOKENS = 4096
"""Calibration tokens on which settings are measured."""
TRIAL_SCORES = 1 << 24
"""Scores of one window that they are measured on, at the most."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Some windows of calibration."""

    site: Site
    q: Tensor
    """(b, h, t, d) before the rope; t counts the queries that are looked at"""
    y: Tensor
    """(b, s, features)"""
    raw: Tensor
    """The same with keys as the projection gives them, where these have a norm; else the very same."""
    added: Tensor
    """(b, h, t, s) mask and biases of the scores; -inf where nothing is seen"""
    sink: Tensor | None
    """(b, h, t, 1) the logit of what attention leaves out"""
    p: Tensor
    """(b, h, t, s) of the original"""
    out: Tensor
    """(b, t, outputs) of the original"""
    at: Tensor
    """(t,) positions of the queries"""
    keep: Tensor
    """(b, t) bool: queries that count"""
    judges: Tensor
    """(b, t) bool: those of them that judge and do not fit: every fourth window, of a single one its last quarter"""

    @property
    def fits(self) -> Tensor:
        """(b, t) bool: the others."""
        return self.keep & ~self.judges

    @property
    def keys_at(self) -> Tensor:
        """(s,) positions of the keys."""
        return torch.arange(self.y.shape[1])

    @property
    def scale(self) -> Tensor:
        """(h, 1, 1)"""
        return torch.tensor(self.site.scale, dtype=REAL).expand(self.site.heads)[:, None, None]

    def heads(self, latents: Latents) -> Tensor:
        """(b, h, t, dv) the heads' outputs with a latent."""
        y = self.y if latents.key_norm is None else self.raw
        return attention(latents, self.site, self.q, y, added=self.added, sink=self.sink, q_at=self.at)


def scenes(
    stats: Stats, source: Weights, limit: int | None = None, every: int = 1, most: int = SCORES
) -> Iterator[Scene]:
    """The calibration, one scene a batch: all of it, or some windows of every batch, about `limit` tokens in all; one
    query of `every`, and of a window no more than `most` scores."""
    share = 1.0 if limit is None else min(1.0, limit / max(stats.tokens, 1))
    tokens = seen = 0
    for whole in stats.batches():
        batch = windowed(whole)
        take = max(1, round(batch.q.shape[0] * share))
        tokens += take * batch.q.shape[2]
        held = max(1, SCORES // (batch.q.shape[1] * batch.q.shape[2] * batch.k.shape[2]))
        for first in range(0, take, held):
            windows = slice(first, min(first + held, take))
            for at in _queries(batch, windows.stop - windows.start, every, most):
                yield _scene(batch, windows, at, source, seen)
        seen += take
        if limit is not None and tokens >= limit:
            return


def _queries(batch: SiteBatch, windows: int, every: int, most: int) -> Iterator[Tensor]:
    """Queries that are looked at, those of one scene at a time: one holds about `SCORES` scores."""
    (_, heads, t, _), s = batch.q.shape, batch.k.shape[2]
    at = torch.arange(0, t, max(every, -(-heads * t * s // most)))
    # one after the other, so that the first ones need only the first keys
    yield from at.tensor_split(max(1, round(windows * heads * len(at) * s / SCORES)))


def _scene(batch: SiteBatch, windows: slice, at: Tensor, source: Weights, before: int) -> Scene:
    """Some windows and some of their queries."""
    seen = trial(batch, windows, at, REAL)
    out = torch.einsum("bhtd,ohd->bto", seen.original(), source.out.to(REAL))
    y = seen.y
    keep, judges = split(batch, windows, before)
    return Scene(
        batch.site,
        q=seen.q,
        y=y,
        raw=y if batch.site.k.norm is None else seen.raw,
        added=seen.added,
        sink=seen.sink,
        p=seen.p,
        out=out if source.out_bias is None else out + source.out_bias,
        at=seen.at,
        keep=keep[:, at],
        judges=judges[:, at],
    )


def split(batch: SiteBatch, windows: slice, before: int) -> tuple[Tensor, Tensor]:
    """(windows, t) queries that count, and those of them that judge; `before`: windows of earlier batches."""
    count, t = windows.stop - windows.start, batch.q.shape[2]
    keep = torch.ones(count, t, dtype=torch.bool)
    if batch.keep is not None and batch.keep.shape[1] == t:
        keep = batch.keep[windows]
    judges = torch.zeros(count, t, dtype=torch.bool)
    if batch.q.shape[0] == 1:
        judges[:, t - t // 4 :] = True
    else:
        judges[[i for i in range(count) if (before + windows.start + i) % 4 == 3]] = True
    return keep, keep & judges


def stage_of(stats: Stats, source: Weights) -> list[Scene]:
    """The scenes on which settings are measured."""
    return [*scenes(stats, source, TRIAL_TOKENS, most=TRIAL_SCORES)]


def refit_scenes(stats: Stats, source: Weights, site: Site) -> Iterator[Scene]:
    """The scenes on which the output projection is refitted."""
    every = min(SPARSE, refit_every(site, stats.tokens))
    return scenes(stats, source, SPARSE * _rows(site), every, most=1 << 62)


def refit_every(site: Site, tokens: int) -> int:
    """One query of so many is enough to refit the output projection."""
    return max(1, tokens // _rows(site))


def _rows(site: Site) -> int:
    """Queries of a refit: `ROWS` for each of its inputs, and more where their moments cost little."""
    inputs = site.heads * site.v.dim
    return max(ROWS * inputs, MOMENTS // inputs**2)


def measure(stage: Iterable[Scene], latents: Latents, weights: Weights) -> Measured:
    """Moments of the heads' outputs with a latent and of the original's output: tokens that fit, tokens that judge."""
    return measured((_trial(scene, latents) for scene in stage), weights.out_bias is not None)


def error(stage: Sequence[Scene], latents: Latents, weights: Weights, share: Share = ALONE.share) -> float:
    """Squared error of the attention's output relative to its energy, the output projection as in `weights`."""
    return relative(share(stage, lambda scene: squares(*_trial(scene, latents), weights)))


def _trial(scene: Scene, latents: Latents) -> tuple[Tensor, Tensor]:
    return scene.heads(latents).transpose(1, 2)[scene.keep].double(), scene.out[scene.keep]
