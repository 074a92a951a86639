"""Merging the values of a group of heads: low rank of all their values in the metric of the output projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passes.eigen import eigh
from passes.gqa_source import FLOOR, Facts
from rewrite.heads import Weights
from rewrite.site import Sink, Site


@dataclass(frozen=True, eq=False)
class ValueMerge:
    """`down` (t, d, d): v' = Σ_i down[i] v_i. `up`: columns of reader l become W_o,l @ up[l], (d, d)."""

    members: tuple[int, ...]
    down: Tensor
    up: dict[int, Tensor]
    loss: float


def carries_mean(site: Site, weights: Weights) -> bool:
    """Attention probabilities add up to 1, so that the mean value can move into the output's bias, where there is
    one; a sink takes probability away."""
    return weights.out_bias is not None and not any(isinstance(m, Sink) for m in site.mods)


def merge_values(facts: Facts, members: tuple[int, ...], centred: bool) -> ValueMerge:
    """The top d directions of F_i v_i, F_i the root of what an error of v_i costs at the output; the loss is what
    the other directions hold."""
    t, d = len(members), facts.site.v.dim
    if t == 1:
        one = torch.eye(d, dtype=torch.float64)
        return ValueMerge(members, one[None], dict.fromkeys(facts.readers[members[0]], one), 0.0)
    metric = torch.stack([facts.value_weight[list(facts.readers[i])].sum(0) for i in members])
    values, vectors = eigh((metric + metric.transpose(-1, -2)) / 2)
    values = values.clamp(min=max(FLOOR * float(facts.value_weight.diagonal(dim1=1, dim2=2).max()), 1e-300))
    roots = vectors @ (values.sqrt()[..., None] * vectors.transpose(-1, -2))
    inverse = vectors @ (values.rsqrt()[..., None] * vectors.transpose(-1, -2))
    v = facts.v.of(members)
    gram = torch.einsum("tij,tjuk,ulk->tiul", roots, v.centred if centred else v.second, roots).reshape(t * d, t * d)
    energy, top = eigh((gram + gram.T) / 2)
    u = top[:, -d:].reshape(t, d, d)
    down, up = u.transpose(1, 2) @ roots, inverse @ u
    scale = _size(facts, members, down, centred)
    heads = {head: up[place] / scale for place, i in enumerate(members) for head in facts.readers[i]}
    return ValueMerge(members, down * scale, heads, float(energy[:-d].clamp(min=0).sum()))


def _size(facts: Facts, members: tuple[int, ...], down: Tensor, centred: bool) -> float:
    """The factor that makes v' as large as the values that it stands for, for the sake of short number formats."""
    v = facts.v.of(members)
    second = v.centred if centred else v.second
    now = float(torch.einsum("tij,tjuk,uik->", down, second, down))
    there = float(torch.einsum("titi->", second)) / len(members)
    return (there / now) ** 0.5 if now > 1e-200 and there > 1e-200 else 1.0


def value_energy(facts: Facts, centred: bool) -> float:
    """What the losses would add up to if all values were lost."""
    second = facts.v.centred if centred else facts.v.second
    kv = torch.tensor(facts.site.kv_of)
    return float(torch.einsum("hij,hji->", facts.value_weight, second[kv, :, kv]))
