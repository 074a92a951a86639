"""A small language model around a hand-written attention, and the table of the spellings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.spellings import (
    MQA,
    Annotated,
    Baddbmm,
    ComplexRope,
    D,
    Einsum,
    EnableGQA,
    ExpandKV,
    Folded,
    GroupedEinsum,
    HalfRope,
    InterleavedRope,
    NanoGPT,
    NanoGPTFlash,
    PartialRope,
    PerGroup,
    PerHead,
    RepeatKV,
    Unbind,
)
from tests.zoo.terms import (
    ALiBi,
    Conv1D,
    Cosine,
    Cross,
    Documents,
    HeadLoop,
    HeadNorm,
    LateDivide,
    Latent,
    LayerNorms,
    Library,
    ManualSoftmax,
    Padding,
    RelativeBias,
    RowNorm,
    SeqFirst,
    SinkLogits,
    Softcap,
    Weights,
    Window,
)


class Model(nn.Module):
    """Tokens in, logits out: two blocks around a spelling; `extra` is handed to every attention."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(97, D), nn.Embedding(64, D)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.attns = nn.ModuleList(attention() for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(D, 96), nn.GELU(), nn.Linear(96, D)) for _ in range(2))
        self.head = nn.Linear(D, 97, bias=False)

    def forward(self, ids: Tensor, *extra: Tensor) -> Any:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        weights: list[Tensor] = []
        for i in range(2):
            y = self.attns[i](self.norms[2 * i](x), *extra)
            if isinstance(y, tuple):
                y, seen = y
                weights.append(seen)
            x = x + y
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return (self.head(x), *weights) if weights else self.head(x)


SPELLINGS: tuple[type[nn.Module], ...] = (
    NanoGPT, NanoGPTFlash, Annotated, Einsum, GroupedEinsum, Folded, Baddbmm, ComplexRope, HalfRope, InterleavedRope,
    PartialRope, RepeatKV, ExpandKV, EnableGQA, MQA, PerHead, PerGroup, Unbind, Softcap, ALiBi, SinkLogits,
    ManualSoftmax, LateDivide, HeadLoop, SeqFirst, HeadNorm, RowNorm, LayerNorms, Cosine, Cross, Window, Documents,
    Padding, RelativeBias, Weights, Conv1D, Latent, Library,
)  # fmt: skip
