"""`torch.ops.reattn.attention` and its backward pass: one operator on every device, opaque to compilers.

A mask travels as algebra, its large tables beside it, so that an operator's arguments are tensors, numbers and text,
and a graph that holds it can be saved and loaded. Fakes give shapes for any lengths; CUDA runs generated kernels, the
CPU its own back end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from codegen import cpu, cpu_backward
from codegen.options import Options
from rewrite.mask import At, Mask, Table, b, h, parse


def call(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: Options, given: Mapping[str, Tensor] | None = None
) -> Tensor:
    """o (b, h, t, dv): the operator on a mask and options. Compilers trace it; the mask must exist before they do.

    `given`: tables of the mask by name, on the device of q, in place of its own.
    """
    by_name = {**(given or {})}
    for name in mask.apart:
        if name not in by_name:
            table = torch.from_numpy(mask.tables[name])
            # a graph's tables are where it runs; elsewhere equal tables are known by what they hold
            by_name[name] = table.to(q.device) if torch.compiler.is_compiling() else table
    return attention(q, k, v, mask.spelled, ",".join(by_name), list(by_name.values()), *_spread(options))[0]


def _spread(options: Options) -> tuple[Any, ...]:
    """Options as arguments of an operator."""
    queries, keys = options.lengths or (None, None)
    return options.scale, options.softcap, options.bias, options.slopes, options.sinks, queries, keys


class _Content:
    """A table that equals others with the same numbers."""

    def __init__(self, table: Tensor) -> None:
        self.array = table.cpu().numpy()
        self.digest = hashlib.sha256(f"{self.array.dtype}{self.array.shape}".encode() + self.array.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the table."""
        return self.array.shape


@dataclass(frozen=True)
class _Declared:
    """A table that stays on its device: equal to others of its shape."""

    shape: tuple[int, ...]

    @property
    def array(self) -> Table:
        """No entries, of as many axes."""
        return np.empty((0,) * len(self.shape), np.int8)


@lru_cache(maxsize=256)
def _parsed(text: str, names: str, tables: tuple[_Content | _Declared, ...], rows: int, heads: int) -> Mask:
    algebra, _, small = text.partition(" where ")
    known = {name: np.asarray(table, dtype=np.int64) for name, table in json.loads(small or "{}").items()}
    sent = dict(zip(names.split(","), tables, strict=False))
    mask = parse(algebra, known | {name: table.array for name, table in sent.items()})
    for entry in mask.keep.atoms(At):
        name = str(entry.args[0])
        for index, size in zip(entry.args[1:], (sent.get(name) or known[name]).shape, strict=True):
            for letter, count, what in ((h, heads, "query heads"), (b, rows, "rows of the batch")):
                if index == letter and size != count:
                    raise ValueError(f"mask {text} reads {name} of {size} {what}, and there are {count}")
    return mask


def _mask(q: Tensor, text: str, names: str, tables: Sequence[Tensor]) -> Mask:
    """The mask that was sent, the same object for equal text and tables; what is on another device than the CPU it
    declares only."""
    kept = (_Content(t) if t.device.type == "cpu" else _Declared(tuple(t.shape)) for t in tables)
    return _parsed(text, names, tuple(kept), *q.shape[:2])


def _beside(names: str, tables: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tables that `_mask` declares."""
    return {n: t for n, t in zip(names.split(","), tables, strict=False) if t.device.type != "cpu"}


def _options(
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    queries: Tensor | None,
    keys: Tensor | None,
) -> Options:
    lengths = None if queries is None or keys is None else (queries, keys)
    return Options(scale, softcap, bias, slopes, sinks, lengths)


def _log_type(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@custom_op("reattn::attention", mutates_args=(), device_types="cuda")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    names: str,
    tables: Sequence[Tensor],
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o, lse) as codegen/options.py has them. `mask` is `Mask.spelled`, and `tables` those called `names`."""
    from codegen import launch

    options = _options(scale, softcap, bias, slopes, sinks, query_lengths, key_lengths)
    return launch.forward(q, k, v, _mask(q, mask, names, tables), options, tables=_beside(names, tables))


def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: str, names: str, tables: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor]:
    return cpu.forward(q, k, v, _mask(q, mask, names, tables), _options(*options))


@attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_log_type(q))


@custom_op("reattn::attention_backward", mutates_args=(), device_types="cuda")
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias_grad: bool,
    mask: str,
    names: str,
    tables: Sequence[Tensor],
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the bias and the sinks, empty for what is not there or not asked for."""
    from codegen import launch

    options = _options(scale, softcap, bias, slopes, sinks, query_lengths, key_lengths)
    told = grad, q, k, v, o, lse, _mask(q, mask, names, tables), options, bias_grad
    found = launch.backward(*told, tables=_beside(names, tables))
    return _five(q, found)


def _backward_cpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bias_grad: bool,
    mask: str,
    names: str,
    tables: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = cpu_backward.backward(grad, q, k, v, o, lse, _mask(q, mask, names, tables), _options(*options), bias_grad)
    return _five(q, found)


def _five(q: Tensor, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An operator gives as many tensors each time, and none twice."""
    dq, dk, dv, dbias, dsinks = (found[x] if x in found else q.new_empty(0) for x in ("q", "k", "v", "bias", "sinks"))
    return dq, dk, dv, dbias, dsinks


@attention_backward.register_fake
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, bias_grad: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, sinks = rest[5], rest[7]
    dbias = bias.new_empty(bias.shape) if bias_grad else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, names, tables, scale, softcap, *optional = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *tables, *optional)
    ctx.told = mask, names, len(tables), scale, softcap


def _differentiated(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    mask, names, count, scale, softcap = ctx.told
    q, k, v, o, lse, *rest = ctx.saved_tensors
    tables, optional = rest[:count], rest[count:]
    bias_grad, sinks = ctx.needs_input_grad[8], optional[2]
    dq, dk, dv, dbias, dsinks = attention_backward(
        grad, q, k, v, o, lse, bias_grad, mask, names, tables, scale, softcap, *optional
    )
    dbias, dsinks = dbias if bias_grad else None, None if sinks is None else dsinks
    return dq, dk, dv, None, None, [None] * count, None, None, dbias, None, dsinks, None, None


def _one_by_one(op: Any) -> Any:
    """An operator under vmap: every member by itself, whichever arguments have members."""

    def mapped(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        members = [
            op(*(x if not isinstance(d, int) else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        found = tuple(torch.stack(x) for x in zip(*members, strict=True))
        return found, (0,) * len(found)

    return mapped


attention.register_kernel("cpu")(_attention_cpu)
attention_backward.register_kernel("cpu")(_backward_cpu)
attention.register_vmap(_one_by_one(attention))
attention_backward.register_vmap(_one_by_one(attention_backward))
attention.register_autograd(_differentiated, setup_context=_save)
