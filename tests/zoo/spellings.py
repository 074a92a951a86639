"""Attention as people write it by hand, layouts and rotations: one small module each, width 64, 4 heads of 16."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, HD = 64, 4, 16


def causal(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).tril()


def heads(x: Tensor, n: int = H) -> Tensor:
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


class Separate(nn.Module):
    """Three projections and an output: the base of most spellings."""

    def __init__(self, kv: int = H, bias: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(D, D, bias=bias)
        self.k, self.v = nn.Linear(D, kv * HD, bias=bias), nn.Linear(D, kv * HD, bias=bias)
        self.o = nn.Linear(D, D, bias=bias)
        self.kv = kv

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return heads(self.q(x)), heads(self.k(x), self.kv), heads(self.v(x), self.kv)


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(D, dim=2)
        q, k, v = (y.view(b, t, H, c // H).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = self.drop(F.softmax(att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")), dim=-1))
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(b, t, c))


class NanoGPTFlash(NanoGPT):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(y) for y in self.c_attn(x).split(D, dim=2))
        return self.c_proj(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Annotated(nn.Module):
    """The projections are a list, the mask is a large negative number."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (m(y).view(b, -1, H, HD).transpose(1, 2) for m, y in zip(self.linears, (x, x, x), strict=False))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(HD)
        scores = scores.masked_fill(torch.triu(torch.ones(1, t, t), diagonal=1) != 0, -1e9)
        y = torch.matmul(scores.softmax(dim=-1), v)
        return self.linears[-1](y.transpose(1, 2).contiguous().view(b, -1, D))


class Einsum(nn.Module):
    """Weights of three dimensions; the last einsum takes probabilities, values and the output weight at once."""

    def __init__(self) -> None:
        super().__init__()
        self.w_q, self.w_k, self.w_v = (nn.Parameter(0.1 * torch.randn(D, H, HD)) for _ in range(3))
        self.w_o = nn.Parameter(0.1 * torch.randn(H, HD, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhe->bhte", x, w) for w in (self.w_q, self.w_k, self.w_v))
        s = torch.einsum("bhqe,bhke->bhqk", q, k) / HD**0.5
        p = s.masked_fill(~causal(x.shape[1]), -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bhke,hed->bqd", p, v, self.w_o)


class GroupedEinsum(Separate):
    """Query heads of one group as an axis of their own: five dimensions, nothing repeated."""

    def __init__(self) -> None:
        super().__init__(kv=2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2, 2, HD)
        k, v = self.k(x).view(b, t, 2, HD), self.v(x).view(b, t, 2, HD)
        s = torch.einsum("btgrd,bsgd->bgrts", q, k) * HD**-0.5
        p = (s + torch.full((t, t), -torch.inf).triu(1)).softmax(-1)
        return self.o(torch.einsum("bgrts,bsgd->btgrd", p, v).reshape(b, t, D))


class Folded(Separate):
    """Heads folded into the batch, three-dimensional products."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.reshape(b * H, t, HD) for y in self.qkv(x))
        s = torch.bmm(q * HD**-0.5, k.transpose(1, 2)) + torch.full((t, t), -1e9).triu(1)
        y = torch.bmm(F.softmax(s, dim=-1), v)
        return self.o(y.view(b, H, t, HD).transpose(1, 2).reshape(b, t, D))


class Baddbmm(Separate):
    """The mask is the addend of the product, the scale its factor."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.reshape(b * H, t, HD) for y in self.qkv(x))
        mask = torch.full((t, t), torch.finfo(x.dtype).min).triu(1).expand(b * H, t, t)
        p = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=HD**-0.5).softmax(-1)
        return self.o(merged(torch.bmm(p, v).view(b, H, t, HD)))


def angles(t: int, width: int, base: float = 10000.0) -> Tensor:
    return torch.outer(torch.arange(t).float(), base ** (-torch.arange(0, width, 2).float() / width))


class ComplexRope(Separate):
    """Neighbouring dims are one complex number (Llama as first published)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        a = angles(x.shape[1], HD)
        turn = torch.polar(torch.ones_like(a), a)
        q, k = (
            torch.view_as_real(torch.view_as_complex(y.float().reshape(*y.shape[:-1], -1, 2)) * turn).flatten(3)
            for y in (q, k)
        )
        return self.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def half_turn(x: Tensor, a: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = torch.cat([a, a], -1).cos(), torch.cat([a, a], -1).sin()
    return x * cos + torch.cat([-second, first], -1) * sin


class HalfRope(Separate):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        a = angles(x.shape[1], HD, 500.0)
        s = half_turn(q, a) @ half_turn(k, a).mT / HD**0.5
        return self.o(merged(s.masked_fill(~causal(x.shape[1]), -torch.inf).softmax(-1) @ v))


class InterleavedRope(Separate):
    """Even and odd dims are the pairs, written with stack."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        a = angles(x.shape[1], HD)
        cos, sin = a.cos(), a.sin()
        q, k = (
            torch.stack(
                [y[..., ::2] * cos - y[..., 1::2] * sin, y[..., ::2] * sin + y[..., 1::2] * cos], dim=-1
            ).flatten(-2)
            for y in (q, k)
        )
        return self.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class PartialRope(Separate):
    """The first half of a head rotates."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        a = angles(x.shape[1], HD // 2)
        q, k = (torch.cat([half_turn(y[..., : HD // 2], a), y[..., HD // 2 :]], dim=-1) for y in (q, k))
        return self.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class RepeatKV(Separate):
    def __init__(self) -> None:
        super().__init__(kv=2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        p = (q @ k.mT / HD**0.5 + torch.full((x.shape[1],) * 2, -torch.inf).triu(1)).softmax(-1)
        return self.o(merged(p @ v))


class ExpandKV(Separate):
    def __init__(self) -> None:
        super().__init__(kv=2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x)
        k, v = (y[:, :, None].expand(b, 2, 2, t, HD).reshape(b, H, t, HD) for y in (k, v))
        return self.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class EnableGQA(Separate):
    def __init__(self) -> None:
        super().__init__(kv=2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)))


class MQA(Separate):
    """One kv head, broadcast by the product itself."""

    def __init__(self) -> None:
        super().__init__(kv=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = (q @ k.mT * HD**-0.5).masked_fill(~causal(x.shape[1]), -torch.inf)
        return self.o(merged(s.softmax(-1) @ v))


class PerHead(nn.Module):
    """One projection, q k v of head 0, then of head 1 (GPT-NeoX)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, H, 3 * HD).transpose(1, 2).chunk(3, dim=-1)
        return self.dense(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class PerGroup(nn.Module):
    """One projection; per kv head its query heads, then k, then v (Falcon)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(D, (H + 4) * HD, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.qkv(x).view(b, t, 2, 4, HD)
        q = y[:, :, :, :-2].reshape(b, t, H, HD).transpose(1, 2)
        k, v = (y[:, :, :, i : i + 1].expand(b, t, 2, 2, HD).reshape(b, t, H, HD).transpose(1, 2) for i in (2, 3))
        return self.dense(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Unbind(nn.Module):
    """One projection, (3, heads, dim), unbound."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, H, HD).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(((q * HD**-0.5) @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, D))
