"""Coarse scores by generated kernels, on a GPU or in Triton's interpreter: the functions of codegen/coarse.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codegen import chip, launch
from codegen.coarse import Scores
from codegen.given import in_rows, strides
from codegen.options import Options
from codegen.spec import KernelSpec, Phase
from rewrite.mask import causal

ROWS = 256
"""Rows of blocks whose scores are held at once: enough programs to fill a chip."""
MOST_QUERIES = 128
"""Queries of one tile, which is how many columns and diagonals are found from."""


def refuse(q: Tensor, factor: float, block: int = 1, stride: int = 1) -> str | None:
    """Why the kernels cannot score these queries, or None."""
    if not q.is_cuda and not launch.interpreting():
        return f"kernels run on a GPU, and the queries are on {q.device}"
    if q.dtype not in launch.DTYPES:
        return f"kernels are generated for fp16, bf16 and fp32, and the queries are {q.dtype}"
    cells = block // stride
    if cells & (cells - 1) or cells > chip.COARSE_KEYS:
        return (
            f"a block of {block} in groups of {stride} is {cells} groups: 1, 2, 4, ... {chip.COARSE_KEYS} can be summed"
        )
    if not factor > 0:
        return f"scores are scaled by {factor}, and the softmax's running maximum needs more than zero"
    return None


def antidiagonal(q: Tensor, k: Tensor, factor: float, block: int, stride: int) -> Scores:
    """The softmax over groups of `stride` tokens, summed over blocks; a group's product is along antidiagonals."""
    q, k = in_rows(q), in_rows(k)
    before = (k.shape[2] - q.shape[2]) // block
    values = {**_values(q, k, factor), "width": -(-k.shape[2] // block), "before": before}
    heads, batch = q.shape[1], q.shape[0]
    cells = block // stride

    def scores(first: int, last: int) -> Tensor:
        rows = last - first
        mass = torch.empty(batch, heads, rows, values["width"], dtype=torch.float32, device=q.device)
        parts = torch.empty(batch, heads, rows * cells, values["width"], dtype=torch.float32, device=q.device)
        told = {**values, "MASS": mass, "PARTS": parts, "LSE": parts.new_empty(parts.shape[:-1])}
        told |= {"first": first, "rows": rows}
        phases: tuple[tuple[Phase, int], ...] = (("antidiagonal", rows * cells), ("mass", rows))
        for phase, count in phases:
            spec = _spec(phase, q, k, count, block=block, stride=stride)
            launch.run(spec, (-(-count // spec.tiles[0]), heads, batch), told)
        return mass

    return scores


def pooled(q: Tensor, k: Tensor, factor: float, block: int) -> Scores:
    """The softmax over the products of blocks' means."""
    return antidiagonal(_means(q, block), _means(k, block), factor, 1, 1)


def _means(x: Tensor, block: int) -> Tensor:
    x = in_rows(x)
    blocks = -(-x.shape[2] // block)
    means = torch.empty(*x.shape[:2], blocks, x.shape[-1], dtype=torch.float32, device=x.device)
    spec = _spec("means", x, x, block, block=block)
    launch.run(spec, (blocks, x.shape[1], x.shape[0]), {**_values(x, x, 1.0), "MEANS": means})
    return means


def columns(q: Tensor, k: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The softmax of queries at the end of the keys, summed over its columns and over its diagonals: (b, h, keys) by
    key, and by how far the key is behind the query."""
    q, k = in_rows(q), in_rows(k)
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    # the softmax's sums are what attention says of them, with keys for values, which are read once
    _, lse = launch.forward(q, k, k, causal, Options(factor))
    spec = _spec("columns", q, k, queries)
    tile = spec.tiles[1]
    tiles = -(-keys // tile)
    by_key = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    parts = torch.empty(batch, heads, tiles, 2 * tile, dtype=torch.float32, device=q.device)
    values = {**_values(q, k, factor), "LSE": lse, "COLUMNS": by_key, "PARTS": parts}
    launch.run(spec, (tiles, k.shape[1], batch), values)
    return by_key, _joined(parts)[..., tiles * tile - keys + queries - 1 :][..., :keys]


def _joined(parts: Tensor) -> Tensor:
    """Diagonals of tiles (b, h, tiles, 2 * tile) by their distance: each tile's second half is the first of the one
    before it, and tiles farther on are nearer."""
    near, far = (x.flip(2).flatten(2) for x in parts.chunk(2, -1))
    tile = parts.shape[-1] // 2
    pad = torch.nn.functional.pad
    return pad(near, (0, tile)) + pad(far, (tile, 0))


def _values(q: Tensor, k: Tensor, factor: float) -> Mapping[str, Any]:
    values: dict[str, Any] = {"Q": q, "K": k, "scale": factor, "T_all": q.shape[2], "N_all": k.shape[2]}
    return values | strides("q", "bht", q) | strides("k", "bhn", k)


def _spec(phase: Phase, q: Tensor, k: Tensor, rows: int, block: int = 1, stride: int = 1) -> KernelSpec:
    dtype, group = launch.DTYPES[q.dtype], q.shape[1] // k.shape[1]
    spec = KernelSpec(
        phase,
        dtype,
        q.shape[-1],
        q.shape[-1],
        group=group,
        tiles=(128, 128),
        upcast=dtype == "bf16" and launch.interpreting(),
        block=block,
        stride=stride,
    )
    return launch.placed(spec, rows, None)
