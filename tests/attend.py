"""Attention of a hand-made site written out plainly, and the calibration statistics that go with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from passes.mla_basis import back, basis
from passes.moments import NEEDS, SiteBatch
from rewrite.heads import Heads, Weights
from rewrite.site import Operand, Site, Softcap


def raw(heads: Heads, x: Tensor) -> Tensor:
    """(b, t, h, d) outputs of the projection."""
    u = torch.einsum("btx,hdx->bthd", x, heads.weight)
    return u if heads.bias is None else u + heads.bias


def normed(operand: Operand, heads: Heads, x: Tensor) -> Tensor:
    """(b, h, t, d) before the rope."""
    u = raw(heads, x)
    if operand.norm is not None:
        flat = u if operand.norm.over == "head" else u.flatten(2)
        if operand.norm.kind == "layer":
            flat = flat - flat.mean(-1, keepdim=True)
        size = (
            flat.square().sum(-1, keepdim=True) if operand.norm.kind == "l2" else flat.square().mean(-1, keepdim=True)
        )
        u = (flat / (size + operand.norm.eps).sqrt()).reshape(u.shape)
    return (u * heads.gain).transpose(1, 2)


def turned(operand: Operand, x: Tensor) -> Tensor:
    rope = operand.rope
    if rope is None:
        return x
    out = x.clone()
    for (a, b), f, start in zip(rope.pairs.tolist(), rope.frequencies.tolist(), rope.start.tolist(), strict=True):
        z = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * (start + f * torch.arange(x.shape[2]).double()))
        out[..., a], out[..., b] = z.real, z.imag
    return out


def probabilities(site: Site, w: Weights, kv_of: tuple[int, ...], x: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k = turned(site.q, normed(site.q, w.q, x)), turned(site.k, normed(site.k, w.k, x))
    score = q @ k[:, list(kv_of)].transpose(-1, -2) * torch.tensor(site.scale).double().reshape(-1, 1, 1)
    for mod in site.mods:
        score = mod.cap * torch.tanh(score / mod.cap) if isinstance(mod, Softcap) else score
    score = score if bias is None else score + bias
    t = score.shape[-1]
    return score.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def heads_out(site: Site, w: Weights, kv_of: tuple[int, ...], x: Tensor, bias: Tensor | None = None) -> Tensor:
    v = normed(site.v, w.v, x)[:, list(kv_of)]
    return probabilities(site, w, kv_of, x, bias) @ v


def output(site: Site, w: Weights, kv_of: tuple[int, ...], x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.einsum("bhtd,ohd->bto", heads_out(site, w, kv_of, x, bias), w.out)
    return y if w.out_bias is None else y + w.out_bias


@dataclass(frozen=True, eq=False)
class HandStats:
    """`Stats` of one site on given inputs (b, t, width), one batch each."""

    site: Site
    weights: Weights
    inputs: tuple[Tensor, ...]
    bias: Tensor | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for batch in self.batches():
            for name, need in NEEDS.items():
                if batch.back is not None and name.endswith("_inverse"):
                    continue  # `u` holds heads here, and not what several projections give
                self.moments[name] = self.moments.get(name, torch.zeros(())) + need(batch)

    @property
    def tokens(self) -> int:
        return sum(x.shape[0] * x.shape[1] for x in self.inputs)

    def attend(self, weights: Weights, kv_of: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        for x in self.inputs:
            y = output(self.site, self.weights, self.site.kv_of, x, self.bias)
            z = heads_out(self.site, weights, kv_of, x, self.bias)
            yield z.transpose(1, 2).flatten(0, 1), y.flatten(0, 1)

    def batches(self) -> Iterator[SiteBatch]:
        site, w = self.site, self.weights
        for x in self.inputs:
            u = {n: raw(h, x).flatten(2) for n, h in (("q", w.q), ("k", w.k), ("v", w.v))}
            values = [normed(o, h, x) for o, h in ((site.q, w.q), (site.k, w.k), (site.v, w.v))]
            inverse = back(basis(site, w))
            p = lambda x=x: probabilities(site, w, site.kv_of, x, self.bias)  # noqa: E731
            yield SiteBatch(site, u, *values, p, None, back=inverse)

    def share(self, items: Sequence[Any], work: Callable[[Any], Sequence[Any]]) -> Iterator[Sequence[Any]]:
        return map(work, items)

    @property
    def alone(self) -> HandStats:
        return self


def stats_of(site: Site, weights: Weights, seed: int = 0, bias: Tensor | None = None, rows: int = 4) -> HandStats:
    """Two batches of `rows` windows of 24 tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = weights.q.weight.shape[-1]
    mean = torch.linspace(-1, 1, width, dtype=torch.float64)
    draw = [torch.randn(rows, 24, width, generator=generator, dtype=torch.float64) + mean for _ in range(2)]
    return HandStats(site, weights, tuple(draw), bias)
