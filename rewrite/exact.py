"""Latents that lose nothing: all values (and what keys have that does not turn) as they are, all pairs that turn."""

from __future__ import annotations

import torch

from rewrite.heads import Latents, Weights
from rewrite.shared import Shared
from rewrite.site import Rope, Site


def exact_latents(site: Site) -> Latents:
    """As many numbers a token as the source caches; query heads read their own kv head's and no others. Where the
    source's rope starts at an angle, queries and keys must start at the same one: then it has no effect."""
    g, d, e, h = site.k.heads, site.k.dim, site.v.dim, site.heads
    pairs = [] if site.k.rope is None else site.k.rope.pairs.tolist()
    turning = {x for pair in pairs for x in pair}
    still = [(i, x) for i in range(g) for x in range(d) if x not in turning]
    moving = [(i, j, a, b) for i in range(g) for j, (a, b) in enumerate(pairs)]
    rank, rope_dim = g * e + len(still), 2 * len(moving)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    down, turn = zeros(rank, g * (d + e)), zeros(rope_dim, g * (d + e))
    read, query_turn, up_v = zeros(h, rank, d), zeros(h, rope_dim, d), zeros(h, e, rank)
    down[torch.arange(g * e), g * d + torch.arange(g * e)] = 1
    for n, (i, x) in enumerate(still):
        down[g * e + n, i * d + x] = 1
    for n, (i, _, a, b) in enumerate(moving):
        turn[2 * n, i * d + a] = turn[2 * n + 1, i * d + b] = 1
    for head, kv in enumerate(site.kv_of):
        up_v[head, :, kv * e : (kv + 1) * e] = torch.eye(e, dtype=torch.float64)
        for n, (i, x) in enumerate(still):
            read[head, g * e + n, x] = float(i == kv)
        for n, (i, _, a, b) in enumerate(moving):
            query_turn[head, 2 * n, a] = query_turn[head, 2 * n + 1, b] = float(i == kv)
    frequencies = torch.tensor([] if site.k.rope is None else [site.k.rope.frequencies[j] for _, j, _, _ in moving])
    return Latents(down, turn, read, query_turn, up_v, frequencies.double())


def exact_rebuilt(site: Site) -> Latents:
    """The form that expands keys: everything is held as it is."""
    g, d, e, h = site.k.heads, site.k.dim, site.v.dim, site.heads
    eye = torch.eye(g * (d + e), dtype=torch.float64)
    none = torch.zeros(0, dtype=torch.float64)
    return Latents(
        down=eye,
        turn=eye[:0],
        read=torch.zeros(h, len(eye), d, dtype=torch.float64),
        query_turn=torch.zeros(h, 0, d, dtype=torch.float64),
        up_v=eye[g * d :].reshape(g, e, len(eye))[list(site.kv_of)],
        frequencies=none,
        up_k=eye[: g * d].reshape(g, d, len(eye)),
    )


def exact_shared(site: Site, few: Shared, weights: Weights) -> Latents:
    """Of a site whose keys and values share numbers: those that turn side by side, the others as they are."""
    kv, turning = list(site.kv_of), site.k.rope
    turn, query_turn, frequencies = placed(None, site.k.dim), placed(None, site.k.dim), torch.zeros(0)
    if turning is not None and site.q.rope is not None:
        turn, query_turn = placed(turning, site.k.dim), placed(site.q.rope, site.k.dim)
        frequencies = torch.from_numpy(turning.frequencies)
    k, v = (x.weight * x.gain[..., None] for x in (weights.k, weights.v))
    turned = turn @ k[0]
    still = torch.ones(few.width, dtype=torch.bool)
    still[turned.abs().sum(0) > 0] = False
    return Latents(
        down=torch.eye(few.width, dtype=torch.float64)[still],
        turn=turned,
        read=k[kv][..., still].mT,
        query_turn=query_turn.expand(site.heads, -1, -1),
        up_v=v[kv][..., still],
        frequencies=frequencies.double(),
    )


def placed(rope: Rope | None, dim: int) -> torch.Tensor:
    """(width, d): the pairs of a head side by side, turned by the rope's start."""
    if rope is None:
        return torch.zeros(0, dim, dtype=torch.float64)
    start, n = torch.from_numpy(rope.start).double(), torch.arange(len(rope.pairs))
    a, b = (torch.from_numpy(rope.pairs[:, i]).long() for i in (0, 1))
    out = torch.zeros(len(n), 2, dim, dtype=torch.float64)
    out[n, 0, a], out[n, 0, b] = start.cos(), -start.sin()
    out[n, 1, a], out[n, 1, b] = start.sin(), start.cos()
    return out.flatten(0, 1)
