"""What is timed on a GPU: shapes, the masks of the sparse tables, and the peers beside our kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from codegen.select import Antidiagonal, Pooled, VerticalSlash
from rewrite import mask as masks
from rewrite.mask import Mask, causal

TOKENS = 32_768
"""Of a batch: short sequences come in several rows."""


@dataclass(frozen=True)
class Shape:
    """Heads of queries and of keys, head dim, tokens, rows of the batch."""

    heads: int
    kv_heads: int
    dim: int
    tokens: int

    @property
    def batch(self) -> int:
        """Rows that fill `TOKENS`."""
        return max(1, TOKENS // self.tokens)

    @property
    def scale(self) -> float:
        """Of scores."""
        return self.dim**-0.5

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens} heads {self.heads}/{self.kv_heads} dim {self.dim}"

    def flops(self, density: float, backward: bool = False) -> float:
        """Two products forward and five backward over the pairs that are read."""
        products = 5 if backward else 2
        return products * 2.0 * self.batch * self.heads * self.tokens**2 * self.dim * density


def dense_shapes(longest: int) -> list[Shape]:
    """4k to `longest` tokens; MHA and GQA; heads of 64 and 128, their columns 2048 in all."""
    lengths = [n for n in (4096, 8192, 16_384, 32_768, 65_536) if n <= longest]
    return [Shape(2048 // dim, 2048 // dim // group, dim, n) for dim in (64, 128) for group in (1, 4) for n in lengths]


def sparse_masks(tokens: int) -> dict[str, Mask]:
    """Causal masks from about half of causal's pairs down to few, by name."""
    found: dict[str, Mask] = {}
    for share in (0.5, 0.25, 0.1, 0.05, 0.03):
        width = _width(tokens, share)
        found[f"sink(64)|window({width})"] = causal & (masks.sink(64) | masks.window(width))
    found["chunk(4096)"] = causal & masks.chunk(4096)
    found["documents"] = causal & masks.documents(_documents(tokens))
    found["around"] = masks.around(1024)
    found["prefix(2048)"] = causal & masks.window(2048) | masks.prefix(2048)
    return found


def _width(tokens: int, share: float) -> int:
    """A window that keeps `share` of causal's pairs: w n - w^2 / 2 of n^2 / 2, to 64 keys."""
    width = tokens * (1 - (1 - share) ** 0.5)
    return max(64, round(width / 64) * 64)


def _documents(tokens: int) -> list[int]:
    """Lengths that vary as packed documents do, the same each time."""
    make = torch.Generator().manual_seed(0)
    left, found = tokens, list[int]()
    while left:
        found.append(min(left, int(torch.randint(256, 6144, (1,), generator=make))))
        left -= found[-1]
    return found


def streaming_heads(shape: Shape) -> Mask:
    """Half of the heads read all, half a sink and a window, alternating by kv head."""
    group = shape.heads // shape.kv_heads
    windows = [None if h // group % 2 else 1024 for h in range(shape.heads)]
    return masks.streaming([64] * shape.heads, windows)


def tensors(shape: Shape, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v in bf16, laid out (batch, tokens, heads, dim) as projections leave them."""

    def one(heads: int) -> Tensor:
        made = torch.randn(shape.batch, shape.tokens, heads, shape.dim, device=device, dtype=torch.bfloat16)
        return made.transpose(1, 2).requires_grad_()

    return one(shape.heads), one(shape.kv_heads), one(shape.kv_heads)


Rule = Antidiagonal | Pooled | VerticalSlash
CLUSTERS, CLUSTERED = 10, 1024
"""Kinds of text in a prompt, and how many tokens of one kind stand together."""


def rules() -> tuple[Rule, ...]:
    """What chooses blocks at run time, as published, the pooled rule by a share of blocks."""
    return Antidiagonal(), Pooled(share=0.1, block=128), VerticalSlash()


def clustered(shape: Shape, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as `tensors`, whose queries care for keys of their own kind: about one block in `CLUSTERS`."""
    q, k, v = (x.detach() for x in tensors(shape, device))
    make = torch.Generator().manual_seed(0)
    kinds = torch.randn(CLUSTERS, shape.dim, generator=make)
    stretches = torch.randint(CLUSTERS, (-(-shape.tokens // CLUSTERED),), generator=make)
    kind = kinds[stretches].repeat_interleave(CLUSTERED, 0)[: shape.tokens].to(q)
    return q + kind, k + kind, v


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: str, shape: Shape) -> Attention:
    """PyTorch's own dense causal attention by one back end: flash or cudnn."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=shape.scale, enable_gqa=shape.heads != shape.kv_heads
            )

    return run


@lru_cache(maxsize=1)
def _flex() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask)


def flex(shape: Shape, mask: Mask) -> tuple[Attention, Callable[[], Any]]:
    """FlexAttention on the same mask, and what builds its block mask."""
    attend, build = _flex()
    rule = mask_mod(mask)
    per_head = shape.heads if mask.per_head else None

    def make() -> Any:
        return build(rule, None, per_head, shape.tokens, shape.tokens, device="cuda")

    block_mask = make()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = shape.heads != shape.kv_heads
        return attend(q, k, v, block_mask=block_mask, scale=shape.scale, enable_gqa=grouped)

    return run, make


def mask_mod(mask: Mask, device: str = "cuda") -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A mask as the function of row, head, query and key that FlexAttention takes."""
    from codegen.predicate import predicate

    tables = {name: torch.as_tensor(table, device=device) for name, table in mask.tables.items()}
    space: dict[str, Any] = {**tables, "load": _load, "torch": torch}
    text = f"def rule(b, h, q, k, offset=0):\n    return {predicate(mask, 'python')}"
    exec(text, space)  # from our own printer
    return lambda b, h, q, k: space["rule"](b, h, q, k)


def _load(table: Tensor, *index: Tensor) -> Tensor:
    return table[tuple(i.clamp(0, n - 1) for i, n in zip(index, table.shape, strict=True))]
