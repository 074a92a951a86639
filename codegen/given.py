"""What a call gives to kernels by argument: its tensors, the mask's tables, the lists of tiles that come from them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codegen import lists_launch
from codegen.lists import Lists, Tiling, lists
from codegen.loops import TABLE
from codegen.options import Options
from codegen.spec import KernelSpec
from rewrite.mask import Mask
from rewrite.mask.terms import FAR

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
def own_tables(mask: Mask, device: torch.device) -> dict[str, Tensor]:
    """The mask's tables on the device as kernels take them, without those that it only declares."""
    clipped = {name: np.clip(np.ascontiguousarray(table), -FAR, FAR) for name, table in mask.tables.items()}
    return {name: torch.from_numpy(table.astype(np.int32)).to(device) for name, table in clipped.items() if table.size}


def table_values(tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tables by argument, and their sizes."""
    values: dict[str, Any] = {}
    for name, table in tables.items():
        values[TABLE + name] = table
        values |= {f"{TABLE}{name}_n{axis}": size for axis, size in enumerate(table.shape)}
    return values


def list_values(found: Lists) -> dict[str, Any]:
    """A kernel's lists of tiles by argument: counts and numbers, where rows of them begin, how wide they are."""
    rows, heads, tiles = found.full_counts.shape
    values: dict[str, Any] = {"full_counts": found.full_counts, "full_list": found.full}
    values |= {"masked_counts": found.masked_counts, "masked_list": found.masked}
    values |= {"list_b": heads * tiles if rows > 1 else 0, "list_h": tiles if heads > 1 else 0}
    return values | {"full_width": found.full.shape[-1], "masked_width": found.masked.shape[-1]}


def tiling(mask: Mask, spec: KernelSpec, q: Tensor, k: Tensor) -> Tiling:
    """The tiles that a kernel's lists are of."""
    rows, keys = spec.tiles
    queries = rows // spec.group if spec.packed else rows
    batch = q.shape[0] if mask.per_row else 1
    return Tiling(q.shape[2], k.shape[2], queries, keys, batch, q.shape[1] if mask.per_head else 1)


@lru_cache(maxsize=KEPT)
def own_lists(mask: Mask, over_queries: bool, at: Tiling, device: torch.device) -> Lists:
    """The lists of a mask that has all its tables, kept for the layers of a model."""
    return made(mask, over_queries, at, own_tables(mask, device))


def made(mask: Mask, over_queries: bool, at: Tiling, tables: Mapping[str, Tensor]) -> Lists:
    """The lists of a mask by its tables, by a kernel where it can."""
    refused = lists_launch.refuse(mask, at, next(iter(tables.values())).device)
    return (lists if refused else lists_launch.lists)(mask, "q" if over_queries else "k", at, tables)
