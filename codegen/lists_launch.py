"""Lists of tiles by a generated kernel, where there is one for the mask: the host waits for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from codegen.lists import Lists, Tiling, doubled, entries, most_entries
from codegen.loops import TABLE, pattern
from codegen.run import interpreting, run
from codegen.schedule import Over
from codegen.spec import KernelSpec, Phase
from codegen.triton_lists import varying
from rewrite.mask import Mask

MOST = 2**27
"""Places for numbers of tiles in one list: larger ones are first counted, in torch."""


def refuse(mask: Mask, at: Tiling, device: torch.device) -> str | None:
    """Why lists are made in torch, or None."""
    if device.type != "cuda" and not interpreting():
        return f"kernels run on a GPU, and the tables are on {device}"
    if at.lengths is not None:
        return "rows of other lengths have other tiles"
    places = at.rows * at.heads * -(-at.queries // at.tile_q) * -(-at.keys // at.tile_k)
    if not 0 < places <= MOST:
        return f"there are {places:,} pairs of tiles, and at most {MOST:,} are listed without counting them first"
    if any(most_entries(entry, at) is None for entry in entries(mask)):
        return "how many entries a pair of tiles reads hangs on another table"
    return None


def lists(mask: Mask, over: Over, at: Tiling, tables: Mapping[str, Tensor]) -> Lists:
    """As codegen/lists.py has them, as wide as there are tiles. `tables`: all of the mask's, as kernels take them."""
    queries, keys = -(-at.queries // at.tile_q), -(-at.keys // at.tile_k)
    fixed, looped = (queries, keys) if over == "k" else (keys, queries)
    phase: Phase = "listk" if over == "k" else "listq"
    values: dict[str, Any] = {"T_all": at.queries, "N_all": at.keys, "width": looped}
    sizes = (at.tile_q, at.tile_k) if over == "k" else (at.tile_k, at.tile_q)
    values |= dict(zip(("fixed", "looped"), sizes, strict=True))
    for name, table in tables.items():
        values[TABLE + name] = table
        values |= {f"{TABLE}{name}_n{axis}": size for axis, size in enumerate(table.shape)}
    same = pattern(mask)
    for j, entry in enumerate(entries(same)):
        values |= _entry(j, values[str(entry.args[0])], most_entries(entry, at) or (), varying(entry))
    device = next(iter(tables.values())).device
    outs: list[Tensor] = []
    for name in ("FULL", "MASKED"):
        outs.append(torch.empty(at.rows, at.heads, fixed, dtype=torch.int32, device=device))
        outs.append(torch.empty(at.rows, at.heads, fixed, looped, dtype=torch.int32, device=device))
        values |= {f"{name}_COUNTS": outs[-2], name: outs[-1]}
    spec = KernelSpec(phase, "fp32", 16, 16, same, tiles=(16, 128), stages=1)
    run(spec, (fixed, at.heads, at.rows), values)
    return Lists(*outs)


def _entry(j: int, table: Tensor, most: tuple[int, ...], axes: tuple[int, ...]) -> dict[str, Any]:
    """A table's doubled forms by argument, and how many entries are looked at along other axes."""
    *others, last = axes or (table.ndim - 1,)
    least, largest = doubled(table, last, most[last])
    return {
        f"least_{j}": least,
        f"largest_{j}": largest,
        f"levels_{j}": len(least),
        **{f"steps_{j}_{axis}": most[axis] for axis in others},
    }
