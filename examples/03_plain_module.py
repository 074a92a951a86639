"""Any module that torch.export accepts: no transformers class, no config. It comes back as an fx.GraphModule."""

import torch
from torch import nn

from rewrite import GQA, convert


class Block(nn.Module):
    """Attention as somebody wrote it by hand."""

    def __init__(self, width: int = 64, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) to the same."""
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.out((p @ v).transpose(1, 2).reshape(b, t, -1))


torch.manual_seed(0)
block, inputs = Block(), torch.randn(4, 32, 64)
new = convert(block, GQA(kv_heads=2), inputs=(inputs,), calibration=[torch.randn(4, 32, 64) for _ in range(8)])
print(new.rewrite_report)
print("parameters", sum(p.numel() for p in block.parameters()), "->", sum(p.numel() for p in new.parameters()))
print("another length:", tuple(new(torch.randn(2, 50, 64)).shape))
