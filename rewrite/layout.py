"""Between a site's weights head by head and the tensors of the checkpoint, whatever their layout.

gather:   tensors -> Weights                 (q, k, v rows by head, columns of the output projection by head)
expanded: Weights -> tensors of the old shapes, a kv head repeated wherever the source had several
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rewrite.errors import Refused
from rewrite.heads import Heads, Weights
from rewrite.shared import Shared, shared
from rewrite.site import Affine, IntArray, Operand, Output, Root, Site, Tensors

Edits = dict[str, Tensor]


def gather(site: Site, tensors: Tensors) -> Weights:
    """The site's weights in float64."""
    out = output_of(site)
    matrix = _matrix(out.root, tensors)
    bias = _bias(out.root, tensors)
    columns = torch.from_numpy(out.columns)
    few = shared(site)
    k, v = (_heads(site.k, tensors), _heads(site.v, tensors)) if few is None else _of_shared(site, few, tensors)
    return Weights(
        q=_heads(site.q, tensors),
        k=k,
        v=v,
        out=matrix[:, columns.reshape(-1)].reshape(-1, *columns.shape),
        out_bias=bias,
    )


def output_of(site: Site) -> Output:
    """The site's output projection, or the refusal that stands in its place."""
    if not isinstance(site.out, Output):
        raise Refused("refused", f"{site.name}: {site.out}")
    return site.out


def _matrix(root: Root, tensors: Tensors) -> Tensor:
    flat = tensors(root.tensor).detach().cpu().reshape(-1)
    return flat[torch.from_numpy(root.index())].double()


def _bias(root: Root, tensors: Tensors) -> Tensor | None:
    if root.bias is None or root.bias_at is None:
        return None
    return tensors(root.bias).detach().cpu().reshape(-1)[torch.from_numpy(root.bias_at)].double()


def _heads(operand: Operand, tensors: Tensors) -> Heads:
    """Rows of several roots stand one after the other; their inputs differ, so only one root has head weights."""
    root = only_root(operand)
    rows = torch.from_numpy(operand.rows)
    bias = _bias(root, tensors)
    return Heads(
        weight=_matrix(root, tensors)[rows],
        bias=None if bias is None else bias[rows],
        gain=torch.from_numpy(np.broadcast_to(operand.gain.read(tensors), operand.rows.shape).copy()),
    )


def _of_shared(site: Site, few: Shared, tensors: Tensors) -> tuple[Heads, Heads]:
    """Keys and values as functions of y, the numbers that they share."""
    up = _matrix(few.up, tensors)
    made: list[Heads] = []
    for operand, rows in zip((site.k, site.v), few.up_rows, strict=True):
        weight = torch.zeros(*rows.shape, few.width, dtype=torch.float64)
        weight[..., : few.rank] = up[torch.from_numpy(rows.clip(0))] * torch.from_numpy(rows >= 0)[..., None]
        gain = torch.from_numpy(np.broadcast_to(operand.gain.read(tensors), operand.rows.shape).copy())
        made.append(Heads(weight, None, gain))
    made[0].weight[:, torch.from_numpy(few.dims), few.rank + torch.arange(len(few.dims))] = 1.0
    return made[0], made[1]


def only_root(operand: Operand) -> Root:
    """The operand's one projection."""
    if len(operand.roots) != 1:
        names = ", ".join(r.tensor for r in operand.roots)
        raise Refused("refused", f"an operand has {len(operand.roots)} projections ({names}), not one")
    return operand.roots[0]


def expanded(site: Site, new: Weights, kv_of: Sequence[int], tensors: Tensors) -> Edits:
    """Tensors of the source's own shapes that compute what `new` computes: a new kv head stands in every place
    of the old kv heads whose query heads read it. `kv_of[j]` is the new kv head of the query head in place j."""
    edits: Edits = {}
    of_old = kv_slots(site, kv_of)
    queries = list(range(site.heads))
    _write_heads(edits, site.q, new.q, queries, tensors)
    # heads that share numbers are read from a latent or stay: there is no projection of their own to be written
    if shared(site) is None or of_old != list(range(site.k.heads)):
        _write_heads(edits, site.k, new.k, of_old, tensors)
        _write_heads(edits, site.v, new.v, of_old, tensors)
    _write_out(edits, output_of(site), new, tensors)
    return edits


def kv_slots(site: Site, kv_of: Sequence[int]) -> list[int]:
    """New kv head for each kv head of the source: all query heads in the places that read it must agree."""
    slots: list[int] = []
    for old in range(site.k.heads):
        readers = {kv_of[j] for j, g in enumerate(site.kv_of) if g == old}
        if len(readers) > 1:
            raise Refused("refused", f"{site.name}: kv head {old} would have to be {len(readers)} different heads")
        slots.append(next(iter(readers), 0))
    return slots


def _flat(edits: Edits, name: str, tensors: Tensors) -> Tensor:
    """The tensor to be edited, in its own dtype and as a flat view; several operands may share it."""
    if name not in edits:
        edits[name] = tensors(name).detach().clone().contiguous()
    return edits[name].view(-1)


def _write_heads(edits: Edits, operand: Operand, new: Heads, pick: Sequence[int], tensors: Tensors) -> None:
    root = only_root(operand)
    at = torch.from_numpy(root.index()[operand.rows])
    flat = _flat(edits, root.tensor, tensors)
    flat[at.reshape(-1)] = new.weight[list(pick)].reshape(-1).to(flat.dtype).to(flat.device)
    if root.bias is not None and root.bias_at is not None and new.bias is not None:
        flat = _flat(edits, root.bias, tensors)
        flat[root.bias_at[operand.rows].reshape(-1)] = new.bias[list(pick)].reshape(-1).to(flat.dtype)
    _write_gain(edits, operand.gain, new.gain[list(pick)].numpy(), tensors)


def _write_gain(edits: Edits, gain: Affine, values: IntArray, tensors: Tensors) -> None:
    """Only where the gain really changed: a weight that all heads share is left as it is."""
    if gain.tensor is None or gain.factor is None or gain.index is None:
        return
    if np.allclose(gain.read(tensors), values, rtol=1e-9, atol=0):
        return
    flat = _flat(edits, gain.tensor, tensors)
    weight = (values - gain.constant) / gain.factor
    flat[gain.index.reshape(-1)] = torch.from_numpy(weight.reshape(-1)).to(flat.dtype)


def _write_out(edits: Edits, out: Output, new: Weights, tensors: Tensors) -> None:
    at = torch.from_numpy(out.root.index())[:, torch.from_numpy(out.columns.reshape(-1))]
    flat = _flat(edits, out.root.tensor, tensors)
    flat[at.reshape(-1)] = new.out.reshape(-1).to(flat.dtype).to(flat.device)
    if out.root.bias is not None and out.root.bias_at is not None and new.out_bias is not None:
        flat = _flat(edits, out.root.bias, tensors)
        flat[torch.from_numpy(out.root.bias_at)] = new.out_bias.to(flat.dtype)


def repeats(site: Site, kv_of: Sequence[int], tensors: Tensors) -> dict[str, IntArray]:
    """For each tensor with repeated kv heads in its `expanded` form: where each flat entry stands first."""
    slots = kv_slots(site, kv_of)
    first = np.array([slots.index(s) for s in slots])
    maps: dict[str, IntArray] = {}
    for operand in (site.k, site.v):
        root = only_root(operand)
        _repeat(maps, root.tensor, root.index()[operand.rows], first, tensors)
        if root.bias is not None and root.bias_at is not None:
            _repeat(maps, root.bias, root.bias_at[operand.rows], first, tensors)
    return maps


def _repeat(maps: dict[str, IntArray], name: str, at: IntArray, first: IntArray, tensors: Tensors) -> None:
    """`at` (kv heads, ...) flat positions: those of a repeated head point to its first occurrence."""
    flat = maps.setdefault(name, np.arange(tensors(name).numel(), dtype=np.int64))
    flat[at.reshape(-1)] = at[first].reshape(-1)


def axis_map(flat: IntArray, shape: Sequence[int]) -> tuple[int, IntArray] | None:
    """(axis, source index along it) where whole rows or whole columns repeat; None where neither does."""
    if len(shape) == 1:
        return 0, flat
    if len(shape) != 2:
        return None
    table = flat.reshape(*shape)
    rows, columns = table[:, 0] // shape[1], table[0] % shape[1]
    if np.array_equal(table, rows[:, None] * shape[1] + np.arange(shape[1])[None]):
        return 0, rows
    if np.array_equal(table, np.arange(shape[0])[:, None] * shape[1] + columns[None]):
        return 1, columns
    return None
