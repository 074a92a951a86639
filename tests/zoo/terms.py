"""Attention as people write it by hand: what acts on scores and operands, masks, and other shapes of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.spellings import HD, D, H, Separate, angles, causal, half_turn, heads, merged


class Softcap(Separate):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = 20.0 * torch.tanh(q @ k.mT * HD**-0.5 / 20.0)
        return self.o(merged(s.masked_fill(~causal(x.shape[1]), -torch.inf).softmax(-1) @ v))


class ALiBi(Separate):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        t = torch.arange(x.shape[1])
        slopes = 2.0 ** (-8.0 * torch.arange(1, H + 1) / H)
        bias = slopes[:, None, None] * (t[None, :] - t[:, None]).float()
        s = (q @ k.mT) * HD**-0.5 + bias
        return self.o(merged(s.masked_fill(~causal(x.shape[1]), -torch.inf).softmax(-1) @ v))


class SinkLogits(Separate):
    """One learned logit per head takes probability and gives nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = (q @ k.mT * HD**-0.5).masked_fill(~causal(x.shape[1]), -torch.inf)
        s = torch.cat([s, self.sinks.view(1, H, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)], dim=-1)
        return self.o(merged(s.softmax(-1)[..., :-1] @ v))


class ManualSoftmax(Separate):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = (q @ k.mT / HD**0.5).masked_fill(~causal(x.shape[1]), -torch.inf)
        e = torch.exp(s - s.amax(-1, keepdim=True))
        return self.o(merged(e / e.sum(-1, keepdim=True) @ v))


class LateDivide(Separate):
    """The sum of the exponentials divides after the second product."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = (q @ k.mT / HD**0.5).masked_fill(~causal(x.shape[1]), -torch.inf)
        e = (s - s.amax(-1, keepdim=True)).exp()
        return self.o(merged((e @ v) / e.sum(-1, keepdim=True)))


class HeadLoop(Separate):
    """A Python loop over heads: as many attentions run as there are heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        done: list[Tensor] = []
        for i in range(H):
            a, b, c = (y[..., i * HD : (i + 1) * HD] for y in (q, k, v))
            s = (a @ b.mT / HD**0.5).masked_fill(~causal(x.shape[1]), -torch.inf)
            done.append(s.softmax(-1) @ c)
        return self.o(torch.cat(done, dim=-1))


class SeqFirst(Separate):
    """Tokens before batch, scores as keys by queries, softmax over the first of them."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        x = x.transpose(0, 1)
        q, k, v = (m(x).view(t, b * H, HD).transpose(0, 1) for m in (self.q, self.k, self.v))
        s = (k @ q.transpose(1, 2) * HD**-0.5).masked_fill(~causal(t).T, -torch.inf)
        y = s.softmax(dim=1).transpose(1, 2) @ v
        return self.o(y.transpose(0, 1).reshape(t, b, D)).transpose(0, 1)


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class HeadNorm(Separate):
    """q and k normed per head, then rotated (Qwen3)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_gain, self.k_gain = nn.Parameter(torch.ones(HD)), nn.Parameter(torch.ones(HD))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        a = angles(x.shape[1], HD)
        q, k = half_turn(rms(q) * self.q_gain, a), half_turn(rms(k) * self.k_gain, a)
        return self.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class RowNorm(Separate):
    """q and k normed over all heads at once (OLMo 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.q_norm(self.q(x))), heads(self.k_norm(self.k(x))), heads(self.v(x))
        a = angles(x.shape[1], HD)
        return self.o(merged(F.scaled_dot_product_attention(half_turn(q, a), half_turn(k, a), v, is_causal=True)))


class LayerNorms(Separate):
    """A layer norm per head, with weights and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(HD), nn.LayerNorm(HD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.o(merged(F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)))


class Cosine(Separate):
    """Both sides of unit length, a fixed temperature."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10.0
        return self.o(merged(s.softmax(-1) @ v))


class Cross(Separate):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory))
        return self.o(merged((q @ k.mT * HD**-0.5).softmax(-1) @ v))


class Window(Separate):
    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        gap = torch.arange(t)[:, None] - torch.arange(t)[None, :]
        y = F.scaled_dot_product_attention(*self.qkv(x), attn_mask=(gap >= 0) & (gap < 4))
        return self.o(merged(y))


class Documents(Separate):
    """Tokens see their own document, which the caller names."""

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        same = documents[:, None, :, None] == documents[:, None, None, :]
        y = F.scaled_dot_product_attention(*self.qkv(x), attn_mask=same & causal(x.shape[1]))
        return self.o(merged(y))


class Padding(Separate):
    """The caller says which keys there are."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        s = q @ k.mT * HD**-0.5 + (1.0 - keep[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        return self.o(merged(s.softmax(-1) @ v))


class RelativeBias(Separate):
    """A learned bias by clipped distance, no scale (T5)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        t = torch.arange(x.shape[1])
        bias = self.table((t[None, :] - t[:, None]).clamp(-4, 4) + 4).permute(2, 0, 1)[None]
        return self.o(merged((q @ k.mT + bias).softmax(-1) @ v))


class Weights(Separate):
    """The probabilities are returned too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x)
        p = (q @ k.mT / HD**0.5).masked_fill(~causal(x.shape[1]), -torch.inf).softmax(-1)
        return self.o(merged(p @ v)), p


class Conv1D(nn.Module):
    """Weights stand as inputs by outputs (GPT-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(0.1 * torch.randn(D, 3 * D)), nn.Parameter(torch.zeros(3 * D))
        self.wo, self.bo = nn.Parameter(0.1 * torch.randn(D, D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.b, x.reshape(-1, D), self.w).view(*x.shape[:2], 3 * D)
        q, k, v = (heads(y) for y in flat.split(D, dim=2))
        y = merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return torch.addmm(self.bo, y.view(-1, D), self.wo).view(y.shape)


class Latent(nn.Module):
    """Keys and values out of one narrow projection; a shared rotating part beside them (DeepSeek)."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, H * (HD + 8), bias=False)
        self.kv_a = nn.Linear(D, 32 + 8, bias=False)
        self.kv_b = nn.Linear(32, H * 2 * HD, bias=False)
        self.o = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = angles(x.shape[1], 8)
        plain, turned = heads(self.q(x)).split([HD, 8], dim=-1)
        latent, shared = self.kv_a(x).split([32, 8], dim=-1)
        k, v = heads(self.kv_b(rms(latent))).split([HD, HD], dim=-1)
        shared = half_turn(shared.unsqueeze(1), a).expand(-1, H, -1, -1)
        q, k = torch.cat([plain, half_turn(turned, a)], -1), torch.cat([k, shared], -1)
        return self.o(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Library(nn.Module):
    """torch's own module: one packed weight, sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=True)[0]
