"""What the kernels that choose are tried on: shapes, and their largest errors against torch in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.kernel_cases import DTYPES
from codegen import coarse, coarse_launch
from codegen.spec import DType

BOUND = 2e-5
"""Of sums of up to a few dozen probabilities, whose logits are sums in float32."""


@dataclass(frozen=True)
class Scored:
    """Heads of queries and keys, tokens of both, a head's dim, and blocks of groups."""

    dtype: DType
    heads: tuple[int, int]
    tokens: tuple[int, int]
    dim: int
    block: int
    stride: int

    def __str__(self) -> str:
        """The case on a line."""
        text = f"select {self.dtype} d={self.dim} heads={self.heads[0]}/{self.heads[1]}"
        return f"{text} tokens={self.tokens[0]}/{self.tokens[1]} blocks={self.block}/{self.stride}"


SCORED = (
    Scored("fp32", (4, 2), (200, 200), 64, 32, 8),
    Scored("fp16", (3, 1), (130, 194), 40, 64, 4),
    Scored("bf16", (2, 2), (70, 70), 72, 16, 16),
    Scored("fp16", (4, 4), (40, 168), 96, 128, 16),
    Scored("fp32", (2, 1), (41, 33), 16, 8, 1),
    Scored("bf16", (2, 1), (650, 650), 16, 48, 3),
)


def drawn(heads: int, tokens: int, dim: int, dtype: DType, seed: int) -> Tensor:
    """(2, heads, tokens, dim) as a slice of what holds NaN."""
    room = torch.full((2, tokens + 2, heads, dim), torch.nan, dtype=DTYPES[dtype])
    room[:, 1:-1] = torch.randn(2, tokens, heads, dim, generator=torch.Generator().manual_seed(seed)).to(room)
    return room[:, 1:-1].transpose(1, 2)


def errors(case: Scored, device: str = "cpu") -> dict[str, float]:
    """The largest error of each score over `BOUND`, by kernels on a device; 1 is the limit."""
    (heads, kv_heads), (queries, keys) = case.heads, case.tokens
    q = drawn(heads, queries, case.dim, case.dtype, 1)
    k = 2 * drawn(kv_heads, keys, case.dim, case.dtype, 2)
    exact, given = (q.double(), k.double()), (q.to(device), k.to(device))
    rows, scale = -(-queries // case.block), case.dim**-0.5
    told = scale / case.stride, case.block, case.stride
    # rows that may read nothing hold NaN in torch, and nothing of them is chosen
    wanted = coarse.antidiagonal(*exact, *told)(0, rows).nan_to_num(0.0)
    mine = coarse_launch.antidiagonal(*given, *told)
    found = {"antidiagonal": off(mine(0, rows), wanted), "last row": off(mine(rows - 1, rows), wanted[:, :, -1:])}
    wanted = coarse.pooled(*exact, scale, case.block)(0, rows).nan_to_num(0.0)
    found["pooled"] = off(coarse_launch.pooled(*given, scale, case.block)(0, rows), wanted)
    last = min(queries, 60)
    seen = min(last, keys)
    by_key, by_distance = coarse_launch.columns(given[0][:, :, -last:], given[1], scale)
    columns, diagonals = coarse.columns(exact[0][:, :, -seen:], exact[1], scale)
    return found | {"columns": off(by_key, columns), "diagonals": off(by_distance, diagonals)}


def off(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference over `BOUND`, NaN where there is one."""
    return round(float((mine.cpu() - theirs).abs().amax()) / BOUND, 4)
