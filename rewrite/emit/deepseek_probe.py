"""An attention that a source and the stock class can both hold exactly: what shows whether the rest is the same.

All kv heads but the first are zero. Its readers see one rotating pair of channels, by random queries and keys, and as
many of its own value channels as the rank allows. So the order of the layer's parts, what scales and norms them, the
mask, the scale and the rotation are all in the logits, whatever the conversion itself loses.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rewrite.emit.deepseek_rows import NEAR, Sizes
from rewrite.heads import Heads, Latents, Rewritten, Weights
from rewrite.site import Rope, Site


def probe(site: Site, new: Rewritten, sizes: Sizes) -> Rewritten:
    """The probing attention of a site: weights for the source, latents for the class."""
    own, seen, pair = new.weights, min(sizes.rank, site.v.dim), _pair(site, sizes)
    channels = [] if pair is None or site.k.rope is None else site.k.rope.pairs[pair].tolist()
    readers = [h for h, g in enumerate(site.kv_of) if g == 0]
    generator = torch.Generator().manual_seed(0)
    # scores of about one: were they small, nobody would see whether they are scaled and rotated alike
    queries = _drawn(own.q, readers, channels, generator) / site.scale[0]
    values = torch.zeros_like(own.v.weight)
    values[0, :seen] = own.v.weight[0, :seen]
    weights = Weights(
        replace(own.q, weight=queries),
        replace(own.k, weight=_drawn(own.k, [0], channels, generator)),
        replace(own.v, weight=values),
        own.out,
        own.out_bias,
    )
    return replace(new, weights=weights, latents=_latents(site, readers, seen, pair))


def _pair(site: Site, sizes: Sizes) -> int | None:
    """The fastest pair of the source's rope that the class has: a slow one shows little in few tokens."""
    if site.q.rope is None or site.k.rope is None:
        return None
    mine = site.k.rope.frequencies
    held = [j for j, f in enumerate(mine) if any(abs(g / f - 1) <= 4 * NEAR for g in sizes.spectrum.frequencies)]
    return max(held, key=lambda j: mine[j], default=None)


def _drawn(heads: Heads, which: list[int], channels: list[int], generator: torch.Generator) -> Tensor:
    """(heads, dim, inputs): zero but for some channels of some heads, which give numbers of about one."""
    out = torch.zeros_like(heads.weight)
    for head in which:
        for channel in channels:
            row = torch.randn(out.shape[-1], generator=generator, dtype=out.dtype)
            out[head, channel] = row / out.shape[-1] ** 0.5
    return out


def _latents(site: Site, readers: list[int], seen: int, pair: int | None) -> Latents:
    """The same attention as latents: value channels cached as they are, one pair of key channels turned."""
    d, keys = site.k.dim, site.k.heads * site.k.dim
    features = keys + site.v.heads * site.v.dim
    down, turn = (torch.zeros(n, features, dtype=torch.float64) for n in (seen, 2))
    down[:, keys : keys + seen] = torch.eye(seen)
    query_turn = torch.zeros(site.heads, 2, d, dtype=torch.float64)
    up_v = torch.zeros(site.heads, site.v.dim, seen, dtype=torch.float64)
    up_v[readers] = torch.eye(site.v.dim, seen, dtype=torch.float64)
    frequency = 1.0
    if pair is not None and site.q.rope is not None and site.k.rope is not None:
        turn[:, :d], query_turn[readers] = _turned(site.k.rope, pair, d), _turned(site.q.rope, pair, d)
        frequency = float(site.k.rope.frequencies[pair])
    read = torch.zeros(site.heads, seen, d, dtype=torch.float64)
    return Latents(down, turn, read, query_turn, up_v, torch.tensor([frequency], dtype=torch.float64))


def _turned(rope: Rope, pair: int, dim: int) -> Tensor:
    """(2, dim): the pair's channels, turned by the rope's constant start."""
    start = torch.tensor(float(rope.start[pair]), dtype=torch.float64)
    cos, sin = start.cos(), start.sin()
    out = torch.zeros(2, dim, dtype=torch.float64)
    out[:, rope.pairs[pair].tolist()] = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    return out
