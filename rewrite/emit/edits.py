"""A rewritten site as tensors of the source: what to write at full width, and which entries say a thing twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rewrite.heads import Rewritten
from rewrite.layout import Edits, axis_map, expanded, kv_slots, only_root, repeats
from rewrite.site import Affine, IntArray, Sink, Site, Tensors


def edited(site: Site, new: Rewritten, tensors: Tensors) -> Edits:
    """Tensors of the source's own shapes that compute the rewritten site: every kv head of the source holds the new
    head that its readers read, and what else belongs to one query head has followed that head to its new place."""
    edits = expanded(site, new.weights, new.site.kv_of, tensors)
    order = list(new.order)
    if order != list(range(site.heads)):
        for affine in per_query_head(site):
            _permute(edits, affine, order, tensors)
    return edits


def per_query_head(site: Site) -> list[Affine]:
    """Parameters by query head that are no projection's weight: sink logits, shifts, factors after the rope."""
    mods = [m.logits for m in site.mods if isinstance(m, Sink)]
    return mods + [a for a in (site.q.shift, site.q.after) if a is not None]


def _permute(edits: Edits, affine: Affine, order: Sequence[int], tensors: Tensors) -> None:
    if affine.tensor is None or affine.index is None or affine.factor is None:
        return
    values = affine.read(tensors)
    if len(values) != len(order):
        return
    moved = (values[list(order)] - affine.constant) / affine.factor
    flat = edits.setdefault(affine.tensor, tensors(affine.tensor).detach().clone().contiguous()).view(-1)
    flat[torch.from_numpy(affine.index.reshape(-1))] = torch.from_numpy(moved.reshape(-1)).to(flat.dtype)


def head_gains(site: Site) -> list[tuple[str, IntArray]]:
    """(tensor, flat positions (kv heads, dim)) of k and v parameters that differ from head to head."""
    found: list[tuple[str, IntArray]] = []
    for operand in (site.k, site.v):
        for affine in (operand.gain, operand.shift, operand.after):
            index = None if affine is None else affine.index
            if affine is None or affine.tensor is None or index is None or index.ndim != 2:
                continue
            if len(index) == operand.heads > 1 and len(np.unique(index)) == index.size:
                found.append((affine.tensor, index))
    return found


def shrinking(site: Site) -> set[str]:
    """Tensors that a module with fewer kv heads holds less of."""
    roots = [only_root(o) for o in (site.k, site.v)]
    names = {r.tensor for r in roots} | {r.bias for r in roots if r.bias is not None}
    return names | {name for name, _ in head_gains(site)}


def dropped(site: Site, kv_of: Sequence[int], *, last: bool) -> dict[str, IntArray]:
    """Tensor -> flat positions that a module with fewer kv heads does not have; of equal heads the first (or the
    last) place stays. Which of the two leaves the class's own order is decided by running both."""
    slots = kv_slots(site, kv_of)
    stay = {s: g for g, s in (enumerate(slots) if last else reversed(list(enumerate(slots))))}
    gone = [g for g in range(len(slots)) if g not in stay.values()]
    out: dict[str, list[IntArray]] = {}
    for operand in (site.k, site.v):
        root = only_root(operand)
        out.setdefault(root.tensor, []).append(root.index()[operand.rows[gone]].reshape(-1))
        if root.bias is not None and root.bias_at is not None:
            out.setdefault(root.bias, []).append(root.bias_at[operand.rows[gone]].reshape(-1))
    for name, index in head_gains(site):
        out.setdefault(name, []).append(index[gone].reshape(-1))
    return {name: np.unique(np.concatenate(parts)) for name, parts in out.items()}


def without(full: Tensor, gone: IntArray, shape: Sequence[int]) -> Tensor | None:
    """`full` without the flat positions `gone`, as `shape`; None where the numbers do not fit."""
    keep = np.setdiff1d(np.arange(full.numel()), gone, assume_unique=True)
    if len(keep) != int(np.prod(shape)):
        return None
    return full.reshape(-1)[torch.from_numpy(keep).to(full.device)].reshape(tuple(shape)).clone()


def repeated_rows(site: Site, kv_of: Sequence[int], tensors: Tensors) -> Mapping[str, tuple[int, IntArray]] | str:
    """Tensor -> (axis, for each place along it the place that holds the same), or why there is no such axis."""
    found: dict[str, tuple[int, IntArray]] = {}
    for name, flat in repeats(site, kv_of, tensors).items():
        along = axis_map(flat, tuple(tensors(name).shape))
        if along is None:
            return f"{name} of shape {tuple(tensors(name).shape)} holds its kv heads neither in rows nor in columns"
        found[name] = along
    return found
