"""The kernel alone: `from rewrite import attention`, block-sparse attention on tensors, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codegen import ops
from codegen.options import Options
from rewrite.errors import BadUsage
from rewrite.mask import Mask, causal

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Alibi:
    """A bias that falls with the distance: -slope * (q - k), one slope for each query head (arXiv:2108.12409)."""

    slopes: Tensor | Sequence[float]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = causal,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | Alibi | None = None,
    sinks: Tensor | None = None,
    lengths: Tensor | tuple[Tensor, Tensor] | None = None,
    tables: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap) + bias, where mask) v; only what the mask allows is computed.

    q (batch, heads, queries, dim), k (batch, kv heads, keys, dim), v (batch, kv heads, keys, value dim) of one type;
    query head i reads kv head i // (heads / kv heads). Gives (batch, heads, queries, value dim), differentiable in q,
    k, v, the bias and the sinks; works in torch.compile, torch.export and vmap, where the mask was made before.

    The last query stands at the last key, so that `mask` serves decoding as it is. `scale` is 1 / sqrt(dim) unless
    given. `bias` broadcasts to (batch, heads, queries, keys), or is `Alibi(slopes)`. `sinks` (heads,) are logits that
    take part in the softmax and carry no value. `lengths` (batch,) counts the keys of each row of the batch, whose
    others are padding at the end: with as many queries as keys these end where the keys do, else all queries stand at
    the end of the row's keys; or it is a pair, the queries' lengths and the keys'. What may read nothing gives zeros.

    `tables` are integers that the mask reads by name, on the device of q, in place of its own: what a rule of
    codegen/select.py chose at run time goes to the kernels without leaving the GPU. A compiled graph copies tables of
    the mask's own that are too large to be spelled to its device each time, unless they are given here.

    Raises BadUsage, a sentence, for what does not fit.
    """
    reason = refuse(q, k, v, softcap, bias, sinks, lengths) or _refuse_tables(q, mask, tables or {})
    if reason is not None:
        raise BadUsage("attention", reason)
    slopes = None
    if isinstance(bias, Alibi):
        slopes, bias = torch.as_tensor(bias.slopes, dtype=torch.float32, device=q.device), None
    options = Options(
        q.shape[-1] ** -0.5 if scale is None else float(scale), softcap, bias, slopes, sinks, _both(q, k, lengths)
    )
    return ops.call(q, k, v, mask, options, tables)


def _both(q: Tensor, k: Tensor, lengths: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """The lengths of queries and of keys."""
    if lengths is None or isinstance(lengths, tuple):
        return lengths
    if q.shape[2] == k.shape[2]:
        return lengths, lengths
    return torch.full_like(lengths, q.shape[2]), lengths


def refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float | None,
    bias: Tensor | Alibi | None,
    sinks: Tensor | None,
    lengths: Tensor | tuple[Tensor, Tensor] | None,
) -> str | None:
    """Why there is no such attention, or None."""
    reason = _refuse_shapes(q, k, v)
    if reason is not None:
        return reason
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in DTYPES:
        return f"queries, keys and values are of one floating type, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    if len({q.device, k.device, v.device}) > 1 or q.device.type not in ("cpu", "cuda", "meta"):
        return f"queries, keys and values are on one CPU or GPU, and these are on {q.device}, {k.device} and {v.device}"
    if softcap is not None and not softcap > 0:
        return f"a softcap is above 0, and this one is {softcap}: None is no cap"
    return _refuse_options(q, k, bias, sinks, lengths)


def _refuse_shapes(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not q.ndim == k.ndim == v.ndim == 4:
        return f"tensors are (batch, heads, tokens, dim), and these have {q.ndim}, {k.ndim} and {v.ndim} axes"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        return f"queries, keys and values have batches of {q.shape[0]}, {k.shape[0]} and {v.shape[0]}, which must agree"
    if q.shape[3] != k.shape[3]:
        return f"queries have {q.shape[3]} channels and keys {k.shape[3]}, which must agree"
    if k.shape[1:3] != v.shape[1:3]:
        return f"keys have {k.shape[1]} heads of {k.shape[2]} tokens and values {v.shape[1]} of {v.shape[2]}: not alike"
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads cannot share {k.shape[1]} kv heads evenly"
    return None


def _refuse_options(
    q: Tensor,
    k: Tensor,
    bias: Tensor | Alibi | None,
    sinks: Tensor | None,
    lengths: Tensor | tuple[Tensor, Tensor] | None,
) -> str | None:
    batch, heads, queries, _ = q.shape
    slopes = bias.slopes if isinstance(bias, Alibi) else None
    if slopes is not None and len(slopes) != heads:
        return f"{len(slopes)} slopes were given for {heads} query heads: one each"
    if isinstance(slopes, Tensor) and slopes.requires_grad:
        return "slopes have no gradient: give what they make of distances as a bias"
    if isinstance(bias, Tensor):
        full = (batch, heads, queries, k.shape[2])
        if bias.ndim > 4 or any(n not in (1, m) for n, m in zip(reversed(bias.shape), reversed(full), strict=False)):
            return f"a bias of shape {tuple(bias.shape)} does not broadcast to (batch, heads, queries, keys) = {full}"
    if sinks is not None and sinks.shape != (heads,):
        return f"sinks have the shape {tuple(sinks.shape)}, and there are {heads} query heads: one logit each"
    for given in lengths if isinstance(lengths, tuple) else (lengths,):
        if given is not None and (given.shape != (batch,) or given.is_floating_point()):
            return f"lengths are whole numbers, one for each of {batch} rows, not {tuple(given.shape)} of {given.dtype}"
    return None


def _refuse_tables(q: Tensor, mask: Mask, tables: Mapping[str, Tensor]) -> str | None:
    for name in mask.declared:
        if name not in tables:
            return f"the mask {mask} only declares its table {name}: give its numbers in `tables`"
    for name, table in tables.items():
        if name not in mask.axes:
            return f"the mask {mask} reads no table {name}, it reads {', '.join(sorted(mask.axes)) or 'none'}"
        if table.is_floating_point() or table.device != q.device:
            return f"tables are whole numbers on {q.device}, and {name} is {table.dtype} on {table.device}"
        if table.ndim != mask.axes[name]:
            have, want = table.ndim, mask.axes[name]
            return f"the mask {mask} reads its table {name} by {want} indices, and what is given has {have} axes"
    return None
