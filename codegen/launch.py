"""Runs generated kernels on tensors: which kernels, their tiles, their arguments. On a GPU, or in Triton's interpreter.

Tensors are (batch, heads, tokens, dim); fewer kv heads and another value dim are allowed. Results are contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from codegen import chip
from codegen.chip import Config
from codegen.given import (
    in_rows,
    list_values,
    made,
    own_lists,
    own_tables,
    strides,
    table_values,
    tensor_values,
    tiling,
)
from codegen.lists import narrowed
from codegen.loops import pattern
from codegen.options import Options
from codegen.run import interpreting, run
from codegen.schedule import schedule
from codegen.spec import DType, KernelSpec, Phase, leads
from codegen.tune import bucket, fastest, store, tuned
from rewrite.mask import Mask

DTYPES: dict[torch.dtype, DType] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


MOST_SHARES = 128
"""Of one query tile's keys: merging them reads them all again."""


@dataclass(frozen=True)
class Call:
    """One attention on tensors: what all its kernels share."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    options: Options
    configs: Mapping[str, Config]
    given: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def dtype(self) -> DType:
        """Of queries, keys and values."""
        return DTYPES[self.q.dtype]

    @property
    def latent(self) -> bool:
        """Values are the keys' first columns, in memory."""
        k, v = self.k, self.v
        same = k.data_ptr() == v.data_ptr() != 0 and k.stride() == v.stride()
        return same and k.shape[:-1] == v.shape[:-1] and leads(v.shape[-1], k.shape[-1])

    @property
    def listed(self) -> bool:
        """Tiles come from lists."""
        return schedule(self.mask, "k").listed

    def values(self) -> dict[str, Any]:
        """Arguments of all its kernels by name."""
        return tensor_values(self.q, self.k, self.v, self.options) | table_values(self.tables)

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """The mask's tables on the device, its own and those that are given in their place."""
        return own_tables(self.mask, self.q.device) | {name: narrowed(table) for name, table in self.given.items()}

    def lists(self, spec: KernelSpec) -> dict[str, Any]:
        """The lists that a kernel of this spec reads, none where its tiles are closed forms."""
        if not self.listed:
            return {}
        at, over_queries = tiling(self.mask, spec, self.q, self.k), spec.phase == "dkdv"
        if not self.given and self.options.lengths is None:
            return list_values(own_lists(self.mask, over_queries, at, self.q.device))
        if self.options.lengths is not None:
            at = replace(at, rows=len(self.q), lengths=self.options.lengths)
        return list_values(made(self.mask, over_queries, at, self.tables))

    def spec(self, phase: Phase, **more: Any) -> KernelSpec:
        """The spec of one of the kernels, with its tiles."""
        o, dtype = self.options, self.dtype
        packed = phase != "dkdv" and self.group > 1 and not _per_head(self.mask) and o.bias is None
        packed = packed and (not self.listed or self.group in (2, 4, 8, 16))
        plain = KernelSpec(
            phase,
            dtype,
            self.k.shape[-1],
            self.v.shape[-1],
            pattern(self.mask),
            group=self.group,
            packed=packed,
            softcap=o.softcap is not None,
            alibi=o.slopes is not None,
            bias=o.bias is not None,
            sinks=o.sinks is not None and phase in ("forward", "decode"),
            lengths=o.lengths is not None,
            upcast=dtype == "bf16" and interpreting(),
        )
        return placed(replace(plain, **more), bucket(self.rows(packed)), self.configs.get(phase))

    def rows(self, packed: bool) -> int:
        """Rows of queries that one program's tiles are cut from."""
        return self.q.shape[2] * (self.group if packed else 1)

    def grid(self, spec: KernelSpec) -> tuple[int, int, int]:
        """Query tiles, heads, batch."""
        heads = self.k.shape[1] if spec.packed else self.q.shape[1]
        return -(-self.rows(spec.packed) // spec.tiles[0]), heads, self.q.shape[0]


@cache
def _per_head(mask: Mask) -> bool:
    return mask.per_head


@cache
def placed(spec: KernelSpec, queries: int, config: Config | None) -> KernelSpec:
    """The spec in the tiles asked for, in those measured here, or in the default ones for so many rows of queries."""
    return spec.with_config(config or tuned(spec, queries) or chip.default(spec, queries, _chip()))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    options: Options,
    configs: Mapping[str, Config] | None = None,
    tables: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, Dv) and log-sum-exp (B, H, T) in fp32; rows with nothing to read give 0 and -inf.

    `configs`: tiles by phase, in place of the default ones. `tables`: integers on the device of q, in place of the
    mask's own of these names.
    """
    call = _call(q, k, v, mask, options, configs, tables)
    batch, heads, queries, _ = call.q.shape
    out = call.q.new_empty(batch, heads, queries, v.shape[-1])
    lse = call.q.new_empty(batch, heads, queries, dtype=torch.float32)
    values = {**call.values(), "O": out, "LSE": lse}
    shares = _shares(call)
    if shares > 1:
        _decode(call, values, shares)
    else:
        spec = call.spec("forward", latent=call.latent)
        run(spec, call.grid(spec), values | call.lists(spec))
    return out, lse


def _decode(call: Call, values: dict[str, Any], shares: int) -> None:
    """Few queries: programs share the keys out, then what they found is merged."""
    batch, heads, queries, _ = call.q.shape
    spec = call.spec("decode", latent=call.latent)
    parts = torch.empty(shares, batch, heads, queries, spec.dv, dtype=torch.float32, device=call.q.device)
    part_lse = torch.empty(shares, batch, heads, queries, dtype=torch.float32, device=call.q.device)
    tiles, *others = call.grid(spec)
    run(
        spec,
        (tiles * shares, others[0], others[1]),
        {**values, **call.lists(spec), "O": parts, "LSE": part_lse, "shares": shares},
    )
    rows = batch * heads * queries
    spec = placed(KernelSpec("combine", spec.dtype, spec.dv, spec.dv), rows, call.configs.get("combine"))
    more = {"PARTS": parts, "PART_LSE": part_lse, "shares": shares, "rows": rows}
    run(spec, (-(-rows // spec.tiles[0]), 1, 1), {**values, **more})


def _shares(call: Call) -> int:
    """Programs that share one query tile's keys: 1 where tiles of queries fill the chip, else what fills it twice."""
    spec = call.spec("decode", latent=call.latent)
    tiles, heads, batch = call.grid(spec)
    programs, processors = tiles * heads * batch, _processors(call.q.device)
    if not 0 < programs <= processors // 2:
        return 1
    return max(1, min(-(-call.k.shape[2] // spec.tiles[1]), 2 * processors // programs, MOST_SHARES))


def _chip() -> chip.Chip:
    return chip.INSTINCT if torch.version.hip else chip.HOPPER


@cache
def _processors(device: torch.device) -> int:
    """How many programs run at once; few in the interpreter, which runs one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    options: Options,
    bias_grad: bool = False,
    configs: Mapping[str, Config] | None = None,
    tables: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients "q", "k", "v", "sinks" where there are some, and "bias" where it is asked for."""
    call = _call(q, k, v, mask, options, configs, tables)
    batch, heads, queries, dim = call.q.shape
    keys, dv, kv_heads = k.shape[2], v.shape[-1], k.shape[1]
    level, delta = torch.empty_like(lse), torch.empty_like(lse)
    found = {"q": q.new_empty(batch, heads, queries, dim), "k": k.new_empty(batch, kv_heads, keys, dim)}
    found["v"] = v.new_empty(batch, kv_heads, keys, dv)
    grad = in_rows(grad)
    values = {**call.values(), **strides("g", "bht", grad), "O": out, "DO": grad, "LSE": lse, "LEVEL": level}
    values |= {"DELTA": delta, "DQ": found["q"], "DK": found["k"], "DV": found["v"]}
    spec = placed(KernelSpec("delta", call.dtype, dv, dv, lengths=options.lengths is not None), 1, None)
    run(spec, (-(-queries // spec.tiles[0]), heads, batch), values)
    spec = call.spec("dkdv")
    run(spec, (-(-keys // spec.tiles[1]), kv_heads, batch), values | call.lists(spec))
    if bias_grad and options.bias is not None:
        values["DBIAS"] = q.new_zeros(batch, heads, queries, keys, dtype=torch.float32)
    spec = call.spec("dq", dbias="DBIAS" in values)
    run(spec, call.grid(spec), values | call.lists(spec))
    return found | _beside(options, values, lse, delta)


def _beside(options: Options, values: Mapping[str, Any], lse: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Gradients of the bias, summed over what it was broadcast to, and of the sinks."""
    found: dict[str, Tensor] = {}
    if options.bias is not None and "DBIAS" in values:
        whole: Tensor = values["DBIAS"]
        found["bias"] = whole.sum_to_size(options.bias.shape).to(options.bias.dtype)
    if options.sinks is not None:
        share = torch.exp(options.sinks.float()[:, None] - torch.where(lse == -torch.inf, torch.inf, lse))
        found["sinks"] = -(share * delta).sum((0, 2)).to(options.sinks.dtype)
    return found


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    options: Options,
    configs: Mapping[str, Config] | None,
    tables: Mapping[str, Tensor] | None = None,
) -> Call:
    """The tensors as kernels take them, or a refusal."""
    reason = refuse(q, k, v, options)
    if reason is not None:
        raise ValueError(reason)
    return Call(in_rows(q), in_rows(k), in_rows(v), mask, options, configs or {}, tables or {})


def refuse(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str | None:
    """Why the kernels cannot run on these tensors, or None."""
    if q.dtype not in DTYPES:
        return f"kernels are generated for fp16, bf16 and fp32, and the queries are {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"queries, keys and values are of one type, and these are {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.is_cuda and not interpreting():
        return f"kernels run on a GPU, and the queries are on {q.device}: the CPU has its own back end"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} query heads cannot share {k.shape[1]} kv heads evenly"
    if not options.scale > 0:
        return (
            f"the scale is {options.scale}, and the softmax's running maximum needs one above zero: negate the queries"
        )
    return None


def tune(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: Options, gradients: bool = False) -> dict[str, Config]:
    """The fastest tiles for tensors like these on this GPU by phase, measured where they are not on disk yet."""
    from triton.testing import do_bench

    call = _call(q, k, v, mask, options, {})
    phase: Phase = "decode" if _shares(call) > 1 else "forward"
    found: dict[str, Config] = {}

    def clock(run: Any) -> float:
        took: Any = do_bench(run, warmup=10, rep=40)
        return float(took)

    def settle(phase: Phase, run: Any, **more: Any) -> None:
        spec = call.spec(phase, **more)
        rows = call.rows(spec.packed)
        found[phase] = tuned(spec, rows) or fastest(spec, rows, run, clock, found)
        store(spec, rows, found[phase])

    settle(phase, lambda configs: forward(q, k, v, mask, options, configs), latent=call.latent)
    if gradients:
        o, lse = forward(q, k, v, mask, options, found)
        grad = torch.randn_like(o)
        for each in ("dkdv", "dq"):
            settle(each, lambda configs: backward(grad, q, k, v, o, lse, mask, options, False, configs))
    placed.cache_clear()
    return found
