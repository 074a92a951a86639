"""Small attentions and their lifting, shared by the tests of the finder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from passes.canonicalise import canonicalise
from passes.find import Found, find
from passes.find.anchor import Anchor, Scan, anchors
from passes.find.draw import Draw
from passes.find.lift import Description, describe

B, T, H, D = 2, 10, 4, 8
C = H * D
Middle = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]


def turn(x: Tensor, base: float = 100.0) -> Tensor:
    """Half-split rope of (b, h, t, d)."""
    angles = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(0, D, 2) / D)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def causal(t: int = T) -> Tensor:
    return torch.ones(t, t).tril().bool()


class Attention(nn.Module):
    """Projections, a middle given from outside, an output projection."""

    def __init__(self, middle: Middle, kv: int = H, mixed: bool = False) -> None:
        super().__init__()
        self.middle = middle
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, kv * D), nn.Linear(C, kv * D)
        self.o = nn.Linear(C, C)
        self.gain = nn.Parameter(torch.rand(D) + 0.5)
        self.sinks = nn.Parameter(torch.randn(H))
        self.table = nn.Parameter(torch.randn(H, 2 * T))
        self.mixed = mixed

    def forward(self, x: Tensor) -> Tensor:
        split = [f(x).view(x.shape[0], x.shape[1], -1, D).transpose(1, 2) for f in (self.q, self.k, self.v)]
        return self.o(self.middle(self, *split).transpose(1, 2).flatten(2))


def export(model: nn.Module, *args: Any) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model.eval(), args, strict=False).run_decompositions({})


@cache
def program(middle: Middle, kv: int = H) -> ExportedProgram:
    torch.manual_seed(0)
    return export(Attention(middle, kv), torch.randn(B, T, C))


def lifted(middle: Middle, kv: int = H) -> Found:
    return find(program(middle, kv))


def described(middle: Middle, kv: int = H) -> Description:
    """The site before its proof, with all that the proof runs."""
    scan = Scan(canonicalise(program(middle, kv)))
    (anchor,) = anchors(scan)
    assert isinstance(anchor, Anchor)
    with torch.no_grad():
        return describe(scan, anchor, Draw(scan.graph), "")


def plain(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * D**-0.5).masked_fill(~causal(), -torch.inf).softmax(-1) @ v


def fused(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def rotated(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(m, turn(q), turn(k), v)


def normed(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(m, turn(rms(q, 1e-3) * m.gain), turn(rms(k, 1e-3) * (1 + m.gain)), v)


def grouped(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(m, turn(q), turn(k.repeat_interleave(2, 1)), v.repeat_interleave(2, 1))


def capped(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = 5 * torch.tanh(q @ k.mT * D**-0.5 / 5)
    return s.masked_fill(~causal(), -torch.inf).softmax(-1) @ v


def alibi(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    s = q @ k.mT * D**-0.5 + slopes * torch.arange(T)
    return s.masked_fill(~causal(), -torch.inf).softmax(-1) @ v


def relative(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    away = torch.arange(T)[None] - torch.arange(T)[:, None] + T
    return (q @ k.mT * D**-0.5 + m.table[:, away]).softmax(-1) @ v


def sunk(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT * D**-0.5).masked_fill(~causal(), -torch.inf)
    s = torch.cat([s, m.sinks[None, :, None, None].expand(B, H, T, 1)], -1)
    s = s - s.amax(-1, keepdim=True)
    return s.softmax(-1)[..., :-1] @ v


def windowed(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(T)
    keep = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 4)
    return (q @ k.mT * D**-0.5).masked_fill(~keep, -torch.inf).softmax(-1) @ v


def wide(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.arange(T)
    keep = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 500)
    return (q @ k.mT * D**-0.5).masked_fill(~keep, -torch.inf).softmax(-1) @ v
