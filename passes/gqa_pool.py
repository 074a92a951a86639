"""The published baselines: the mean of the heads of a group, as they are or turned towards each other first.

Mean pooling: Ainslie et al. 2023 (arXiv 2305.13245). Aligned: Procrustes rotations between the heads of a group,
for rotated keys only such as commute with the rope (arXiv 2412.20677).
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.gqa_keys import KeyMerge
from passes.gqa_source import Facts, Gram
from passes.gqa_values import ValueMerge

TURNS = 20
"""Rounds of turning every head towards the mean of the others."""


def pooled_keys(facts: Facts, members: tuple[int, ...], aligned: bool) -> KeyMerge:
    """The mean of the keys, each turned by an orthogonal map; its query takes the inverse turn."""
    turns = _turns(facts.k.of(members), facts.site.k.rope.pairs if facts.site.k.rope else None, aligned)
    up = {head: turns[place] for place, i in enumerate(members) for head in facts.readers[i]}
    return KeyMerge(members, turns / len(members), up, 0.0)


def pooled_values(facts: Facts, members: tuple[int, ...], aligned: bool) -> ValueMerge:
    """The mean of the values, each turned by an orthogonal map; the output projection takes the inverse turn."""
    turns = _turns(facts.v.of(members), None, aligned)
    up = {head: turns[place].T for place, i in enumerate(members) for head in facts.readers[i]}
    return ValueMerge(members, turns / len(members), up, 0.0)


def _turns(gram: Gram, pairs: object, aligned: bool) -> Tensor:
    """(t, d, d) orthogonal maps that bring the heads together (generalised Procrustes on second moments)."""
    t, d = gram.mean.shape
    turns = torch.eye(d, dtype=torch.float64).repeat(t, 1, 1)
    for _ in range(TURNS if aligned else 0):
        for i in range(1, t):
            others = [j for j in range(t) if j != i]
            # the best turn Q of head i towards the mean m of the others maximises tr Q E[k_i mᵀ]
            cross = sum((gram.second[i, :, j] @ turns[j].T for j in others), torch.zeros(d, d, dtype=torch.float64))
            turns[i] = _nearest(cross.T, pairs)
    return turns


def _nearest(cross: Tensor, pairs: object) -> Tensor:
    """The orthogonal Q with the largest tr Qᵀ cross: turns of single pairs where `pairs` rotate, free in the rest."""
    q = torch.zeros_like(cross)
    rest = torch.ones(len(cross), dtype=torch.bool)
    if pairs is not None:
        at = torch.as_tensor(pairs).long()
        a, b = at[:, 0], at[:, 1]
        c, s = cross[a, a] + cross[b, b], cross[b, a] - cross[a, b]
        size = torch.hypot(c, s)
        c, s = torch.where(size > 0, c / size, torch.ones_like(c)), torch.where(size > 0, s / size, torch.zeros_like(s))
        q[a, a], q[b, b], q[a, b], q[b, a] = c, c, -s, s
        rest[at.reshape(-1)] = False
    free = rest.nonzero()[:, 0]
    if len(free):
        u, _, v = torch.linalg.svd(cross[free[:, None], free[None]])
        q[free[:, None], free[None]] = u @ v
    return q
