"""A latent attention as tensors of the stock DeepSeek-V3 class: which row of which matrix holds what.

    q_proj               per head [nope | rope], the softmax scale folded in
    kv_a_proj_with_mqa   [latent | rope], one for all heads
    kv_a_layernorm       driven into its linear range, see `SMALL`
    kv_b_proj            per head [nope of the key | value]
    o_proj               per head the value's channels

The class rotates channels (2i, 2i + 1) by theta^(-2i / rope), or by frequencies that "longrope" factors make of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewrite.heads import Heads, Latents, Weights
from rewrite.site import Affine, FloatArray, Site

EPS = 1e-6
"""Eps of the class's latent norm; engines take `rms_norm_eps` in its place, so the config must say the same."""
SMALL = 36
"""The latent rows are scaled until their largest entry is about 2^-36. mean(c^2) is then so far below EPS that the norm
is the linear map c / sqrt(EPS): its relative error mean(c^2) / (2 EPS) is 1e-8 where rows with entries of one would
give a latent of rms 1e4. A power of two in the norm's weight undoes it, and kv_b_proj takes the leftover 1.024."""
ENGINE_ROPE = 64
"""Rotated channels that vLLM and SGLang take."""
NEAR = 5e-7
"""Relative distance at which two frequencies are one: a few roundings of float32."""
BASE = 10_000.0
LARGEST = 80.0
"""Largest log of a theta: it is raised to its powers in float32."""


@dataclass(frozen=True)
class Spectrum:
    """What the class's pairs of rotated channels turn by. `exact` frequencies need "longrope" factors."""

    theta: float
    frequencies: tuple[float, ...]
    exact: bool = False

    @property
    def width(self) -> int:
        """Rotated channels, two for each frequency."""
        return 2 * len(self.frequencies)

    def parameters(self, context: int) -> dict[str, object]:
        """The config's `rope_parameters`; `context` is its max_position_embeddings."""
        if not self.exact:
            return {"rope_type": "default", "rope_theta": self.theta}
        factors = [float(g / f) for g, f in zip(series(self.theta, self.width), self.frequencies, strict=True)]
        more = {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": context}
        return {
            "rope_type": "longrope", "rope_theta": self.theta, "short_factor": factors, "long_factor": factors, **more
        }  # fmt: skip

    def places(self, wanted: Sequence[float]) -> list[int]:
        """For each frequency the pair that turns by it; one that occurs twice takes two pairs."""
        free, places = list(range(len(self.frequencies))), list[int]()
        for f in wanted:
            places.append(min(free, key=lambda i: abs(self.frequencies[i] / f - 1)))
            free.remove(places[-1])
        return places


@dataclass(frozen=True)
class Sizes:
    """The class's widths, alike in all layers, and the factor of the residual stream."""

    rank: int
    nope: int
    value: int
    spectrum: Spectrum
    residual: float

    @property
    def rope(self) -> int:
        """Rotated channels."""
        return self.spectrum.width


def series(theta: float, width: int) -> FloatArray:
    """The class's own frequencies."""
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def turning(latents: Latents) -> list[int]:
    """The pairs of rotated channels that do something: both a key and a query reach them."""
    alive = (latents.turn != 0).any(1).view(-1, 2).any(1) & (latents.query_turn != 0).any(2).any(0).view(-1, 2).any(1)
    return [int(j) for j in alive.nonzero()]


def spectrum(layers: Sequence[Sequence[float]], *, engines: bool) -> Spectrum | str:
    """The frequencies of the class from those of every layer's pairs, or why engines cannot turn by them."""
    distinct = _merged([f for layer in layers for f in layer])
    counts = [max(sum(_near(f, g) for g in layer) for layer in layers) for f in distinct]
    slots = ENGINE_ROPE // 2 if engines else max(len(distinct), 1)
    theta, fits = _geometric(distinct, slots)
    if all(fits) and max(counts, default=1) == 1:
        return Spectrum(theta, tuple(series(theta, 2 * slots).tolist()))
    if not engines:
        return Spectrum(BASE, tuple(f for f, n in zip(distinct, counts, strict=True) for _ in range(n)), exact=True)
    for f, n in zip(distinct, counts, strict=True):
        if n > 1:
            return (
                f"{n} pairs of rotated channels turn by {f:.6g} per token; engines turn one pair by each frequency: "
                f"keep one channel of each, or leave engines=False"
            )
    off = [f"{f:.4g}" for f, fit in zip(distinct, fits, strict=True) if not fit]
    return (
        f"engines turn {slots} pairs by the powers of one number; of {len(distinct)} frequencies at most "
        f"{sum(fits)} are, and {', '.join(off[:6])}{', ...' if len(off) > 6 else ''} are not: rotate every n-th pair "
        f"from the first one on, or leave engines=False"
    )


def _near(a: float, b: float) -> bool:
    return abs(a / b - 1) <= NEAR


def _merged(values: Sequence[float]) -> list[float]:
    """Distinct frequencies, the fastest first."""
    kept: list[float] = []
    for f in sorted(values, reverse=True):
        if not kept or not _near(f, kept[-1]):
            kept.append(f)
    return kept


def _geometric(frequencies: Sequence[float], slots: int) -> tuple[float, list[bool]]:
    """(theta, which frequencies are theta^(-i / slots) for i < slots): of those that serve most the smallest theta."""
    logs = -np.log(np.array(frequencies))
    slow = logs[logs > NEAR]
    best: tuple[int, bool, float, list[bool]] = (-1, False, 0.0, [])
    for step in [math.log(BASE) / slots, *np.divide.outer(slow, np.arange(1, slots)).ravel()]:
        # few digits where they do: a base of 10000 must not come out as 9999.9993
        for digits in ("4g", "9g") if step * slots < LARGEST else ():
            theta = float(f"{math.exp(step * slots):.{digits}}")
            place = np.round(logs / math.log(theta) * slots)
            fits = (np.abs(logs - place * math.log(theta) / slots) <= NEAR) & (place < slots) & (place >= 0)
            best = max(best, (int(fits.sum()), digits == "4g", -theta, fits.tolist()))
    return -best[2], best[3]


def uniform(after: Affine | None) -> float | None:
    """The one factor behind an operand, None where it differs from channel to channel or is a parameter."""
    if after is None:
        return 1.0
    first = float(after.constant.reshape(-1)[0])
    return first if after.tensor is None and bool(np.all(after.constant == first)) else None


def rows(site: Site, weights: Weights, latents: Latents, sizes: Sizes) -> dict[str, Tensor]:
    """The layer's attention tensors by their name in the class, in float64."""
    q, y = _matrix(weights.q), torch.cat([_matrix(weights.k).flatten(0, 1), _matrix(weights.v).flatten(0, 1)])
    scale = torch.tensor(site.scale, dtype=torch.float64).expand(site.heads)
    scale = scale * (uniform(site.q.after) or 1.0) * (uniform(site.k.after) or 1.0)
    turned = _placed(latents, latents.query_turn @ q, sizes)
    queries = torch.cat([_padded(q, sizes.nope, 1), turned], 1) * math.sqrt(sizes.nope + sizes.rope)
    down = _padded(latents.down @ y, sizes.rank, 0)
    shift = SMALL + math.frexp(float(down.abs().max()))[1]
    shared = torch.cat([down * math.ldexp(1.0, -shift), _placed(latents, latents.turn @ y, sizes)])
    parts = [_padded(latents.read.transpose(1, 2), sizes.nope, 1), _padded(latents.up_v, sizes.value, 1)]
    up = _padded(torch.cat(parts, 1), sizes.rank, 2) * (1024 * math.sqrt(EPS))
    return {
        "q_proj.weight": (queries * scale[:, None, None]).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": shared,
        "kv_a_layernorm.weight": torch.full((sizes.rank,), math.ldexp(1.0, shift - 10), dtype=torch.float64),
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": sizes.residual * _padded(weights.out, sizes.value, 2).flatten(1),
    }


def _matrix(heads: Heads) -> Tensor:
    """(heads, dim, inputs)."""
    return heads.weight * heads.gain[..., None]


def _padded(x: Tensor, width: int, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = width - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis)


def _placed(latents: Latents, x: Tensor, sizes: Sizes) -> Tensor:
    """(..., rope, inputs) from rotated rows (..., rope_dim, inputs), each pair where the class has its frequency."""
    alive = turning(latents)
    signed = latents.frequencies[alive].tolist()
    out = x.new_zeros((*x.shape[:-2], sizes.rope, x.shape[-1]))
    for j, f, place in zip(alive, signed, sizes.spectrum.places([abs(f) for f in signed]), strict=True):
        # a pair that turns backwards is its mirror image turning forwards
        pair = [2 * j, 2 * j + 1] if f > 0 else [2 * j + 1, 2 * j]
        out[..., 2 * place : 2 * place + 2, :] = x[..., pair, :]
    return out
