"""What a call gives to kernels by argument: its tensors, the mask's tables, the lists of tiles that come from them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codegen.lists import Lists, Tiling, lists
from codegen.loops import TABLE
from codegen.options import Options
from codegen.spec import KernelSpec
from rewrite.mask import Mask

FAR = 2**30
"""Farther than any position, with room for sums in 32 bits."""
KEPT = 32
"""Lists that are kept for another call: one for each kernel of some layers."""


def tensor_values(q: Tensor, k: Tensor, v: Tensor, options: Options) -> dict[str, Any]:
    """Tensors, strides and numbers of one call by argument; a kernel takes those that it names."""
    values: dict[str, Any] = {"Q": q, "K": k, "V": v, "scale": options.scale, "softcap": options.softcap}
    values |= {**strides("q", "bht", q), **strides("k", "bhn", k), **strides("v", "bhn", v)}
    values |= {"T_all": q.shape[2], "N_all": k.shape[2], "sinks": options.sinks, "slopes": options.slopes}
    if options.bias is not None:
        bias = _by_key(options.bias, k.shape[2]).expand(*q.shape[:3], k.shape[2])
        values |= {"bias": bias, **strides("bias", "bhq", bias)}
    if options.lengths is not None:
        names = ("query_lengths", "key_lengths")
        values |= {name: x.to(q.device, torch.int32) for name, x in zip(names, options.lengths, strict=True)}
    return values


def strides(letter: str, axes: str, tensor: Tensor) -> dict[str, int]:
    """A tensor's strides by argument; 0 along an axis of one, whose stride may be any."""
    return {f"{letter}_{axis}": tensor.stride(i) if tensor.shape[i] > 1 else 0 for i, axis in enumerate(axes)}


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor with the columns of a head beside each other, and strides of 8 where 8 divides the head."""
    steps = [step for count, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if count > 1]
    odd = tensor.shape[-1] % 16 == 8 and any(step % 8 for step in steps)
    return tensor.contiguous() if odd or tensor.stride(-1) != 1 else tensor


def _by_key(bias: Tensor, keys: int) -> Tensor:
    """A bias with a number for each key, beside each other; other axes stay broadcast."""
    if bias.shape[-1] == keys and bias.stride(-1) == 1:
        return bias
    return bias.expand(*bias.shape[:-1], keys).contiguous()


@lru_cache(maxsize=256)
def table_values(mask: Mask, device: torch.device) -> dict[str, Any]:
    """The mask's tables on the device by argument, and their sizes."""
    values: dict[str, Any] = {}
    for name, table in mask.tables.items():
        entries = np.clip(np.ascontiguousarray(table), -FAR, FAR).astype(np.int32)
        values[TABLE + name] = torch.from_numpy(entries).to(device)
        values |= {f"{TABLE}{name}_n{axis}": size for axis, size in enumerate(entries.shape)}
    return values


def list_values(
    mask: Mask, spec: KernelSpec, q: Tensor, k: Tensor, lengths: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    """A kernel's lists of tiles by argument: counts and numbers, where rows of them begin, how wide they are."""
    at = _tiling(mask, spec, q, k)
    if lengths is None:
        found = _lists(mask, spec.phase == "dkdv", at, q.device)
    else:
        found = _by_row(mask, spec.phase == "dkdv", at, lengths, q.device)
    rows, heads, tiles = found.full_counts.shape
    values: dict[str, Any] = {"full_counts": found.full_counts, "full_list": found.full}
    values |= {"masked_counts": found.masked_counts, "masked_list": found.masked}
    values |= {"list_b": heads * tiles if rows > 1 else 0, "list_h": tiles if heads > 1 else 0}
    return values | {"full_width": found.full.shape[-1], "masked_width": found.masked.shape[-1]}


def _tiling(mask: Mask, spec: KernelSpec, q: Tensor, k: Tensor) -> Tiling:
    rows, keys = spec.tiles
    queries = rows // spec.group if spec.packed else rows
    batch = q.shape[0] if mask.per_row else 1
    return Tiling(q.shape[2], k.shape[2], queries, keys, batch, q.shape[1] if mask.per_head else 1)


@lru_cache(maxsize=KEPT)
def _lists(mask: Mask, over_queries: bool, at: Tiling, device: torch.device) -> Lists:
    tables = {name: torch.from_numpy(np.ascontiguousarray(table)).to(device) for name, table in mask.tables.items()}
    return lists(mask, "q" if over_queries else "k", at, tables)


def _by_row(mask: Mask, over_queries: bool, at: Tiling, lengths: tuple[Tensor, Tensor], device: torch.device) -> Lists:
    """Rows of other lengths have their tiles at other positions: each row's own lists, side by side."""
    fixed = -(-at.keys // at.tile_k) if over_queries else -(-at.queries // at.tile_q)
    found: list[tuple[Tensor, ...]] = []
    for row, (queries, keys) in enumerate(zip(*(x.tolist() for x in lengths), strict=True)):
        if queries and keys:
            made = _lists(mask, over_queries, replace(at, queries=queries, keys=keys), device)
            own = slice(row, row + 1) if at.rows > 1 else slice(0, 1)
            found.append(tuple(x[own] for x in (made.full_counts, made.full, made.masked_counts, made.masked)))
        else:
            counts = torch.zeros(1, at.heads, fixed, dtype=torch.int32, device=device)
            found.append((counts, counts[..., None], counts, counts[..., None]))
    sizes = [(fixed,), (fixed, 1), (fixed,), (fixed, 1)]
    for i in (1, 3):
        sizes[i] = (fixed, max(x[i].shape[-1] for x in found))
    return Lists(*(torch.cat([_wider(x[i], sizes[i]) for x in found]) for i in range(4)))


def _wider(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Filled up with zeros at the ends of its last axes."""
    made = x.new_zeros(*x.shape[: -len(sizes)], *sizes)
    made[tuple(slice(n) for n in x.shape)] = x
    return made
