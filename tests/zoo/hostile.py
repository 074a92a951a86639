"""Modules that look like attention with one thing that no description holds: each must be refused, and say why."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.spellings import HD, D, H, Separate, angles, causal, half_turn, heads, merged


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class L1Norm(Separate):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(attend(q / q.abs().sum(-1, keepdim=True), k, v))


class SelfGate(Separate):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(attend(q * q.sigmoid(), k, v))


class InputGate(Separate):
    """Queries multiplied by a gate that hangs on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(attend(q * heads(self.gate(x)).sigmoid(), k, v))


class TokenShift(Separate):
    """Keys are mixed with those of the token before."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(attend(q, 0.5 * k + 0.5 * F.pad(k, (0, 0, 1, 0))[:, :, :-1], v))


class RolledKeys(Separate):
    """Keys of one token, values of another."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(attend(q, k.roll(1, dims=2), v))


class RopePerHead(Separate):
    """Heads turn by different angles."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        a = torch.arange(1, H + 1).view(H, 1, 1) * angles(x.shape[1], HD)
        return self.o(attend(half_turn(q, a), half_turn(k, a), v))


class XPos(Separate):
    """The rotation also grows and decays with the position."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        a = angles(x.shape[1], HD)
        grow = (torch.linspace(0.9, 0.99, HD // 2) ** torch.arange(x.shape[1])[:, None]).repeat(1, 2)
        return self.o(attend(half_turn(q, a) * grow, half_turn(k, a) / grow, v))


class SquaredScores(Separate):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = q @ k.mT / HD**0.5
        return self.o(merged((s * s.abs()).masked_fill(~causal(x.shape[1]), -torch.inf).softmax(-1) @ v))


class TalkingHeads(Separate):
    """Scores are mixed over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(H, H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = torch.einsum("bhts,hg->bgts", q @ k.mT / HD**0.5, self.mix)
        return self.o(merged(s.softmax(-1) @ v))


class ActivationScale(Separate):
    """The scale is computed from the input."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(merged((q @ k.mT * x.std()).softmax(-1) @ v))


class ActivationBias(Separate):
    """The bias is computed from the query."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(64, HD))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(merged((q @ k.mT * HD**-0.5 + q @ self.place[: x.shape[1]].T).softmax(-1) @ v))


class TopK(Separate):
    """Only the four largest scores of a row count."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = q @ k.mT * HD**-0.5
        return self.o(merged(s.masked_fill(s < s.topk(4, dim=-1).values[..., -1:], -torch.inf).softmax(-1) @ v))


class MixedHeads(Separate):
    """Every query head is a mixture of heads after the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(H, H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(attend(torch.einsum("bhtd,hg->bgtd", q * torch.rsqrt(q.pow(2).mean(-1, True)), self.mix), k, v))


class AddedInput(Separate):
    """The input itself is added to the values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(attend(q, k, v + heads(x)))


class CallersPositions(Separate):
    """The rotation's positions come from the caller."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        turn = positions[:, None, :, None] * (1e4 ** (-torch.arange(0, HD, 2).float() / HD))
        return self.o(attend(half_turn(q, turn), half_turn(k, turn), v))


class Decoy(nn.Module):
    """A softmax router over two linear layers: no attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        return self.down((p.unsqueeze(2) @ self.up(x).view(*x.shape[:2], H, D)).squeeze(2))


HOSTILE: tuple[type[nn.Module], ...] = (
    L1Norm, SelfGate, InputGate, TokenShift, RolledKeys, RopePerHead, XPos, SquaredScores, TalkingHeads,
    ActivationScale, ActivationBias, TopK, MixedHeads, AddedInput, CallersPositions,
)  # fmt: skip
