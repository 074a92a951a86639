"""Kernels over rows alone: shares of keys merged into one output, and what the backward pass needs of each row."""

from __future__ import annotations

from codegen.spec import Argument, KernelSpec, chunks, number
from codegen.triton_text import LN2, LOG2E, columns, indent, kernel, load, offsets, store, strides


def combine_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of `combine_source`'s function, in order."""
    parts = [Argument("PARTS", "*fp32", True), Argument("PART_LSE", "*fp32", True)]
    outs = [Argument("O", f"*{spec.dtype}", True), Argument("LSE", "*fp32", True)]
    return [*parts, *outs, number("shares"), number("rows", "i64")]


def combine_source(spec: KernelSpec) -> str:
    """Merges the shares of each row's keys by their log-sum-exp; shares that read nothing count for nothing."""
    rows, parts = spec.tiles[0], range(len(chunks(spec.dv)))
    body = [f"row = tl.program_id(0).to(tl.int64) * {rows} + tl.arange(0, {rows})", "owned = row < rows"]
    body += [
        *columns(spec.dv),
        f'm = tl.full([{rows}], float("-inf"), tl.float32)',
        f"l = tl.zeros([{rows}], tl.float32)",
    ]
    body += [f"out_{i} = tl.zeros([{rows}, {c.size}], tl.float32)" for i, c in enumerate(chunks(spec.dv))]
    step = ["part_row = row + tl.cast(i, tl.int64) * rows"]
    step += [f'lse = tl.load(PART_LSE + part_row, mask=owned, other=float("-inf")) * {LOG2E}']
    step += ["peak = tl.maximum(m, lse)", 'level = tl.where(peak == float("-inf"), 0.0, peak)']
    step += ["fade = tl.exp2(m - level)", "weight = tl.exp2(lse - level)", "l = l * fade + weight", "m = peak"]
    step += [*offsets("part", f"(part_row * {spec.dv})", spec.dv), *load("part", "PARTS", spec.dv, "owned")]
    step += [f"out_{i} = out_{i} * fade[:, None] + part_{i} * weight[:, None]" for i in parts]
    body += ["for i in range(0, shares):", *indent(step), "total = tl.where(l == 0.0, 1.0, l)[:, None]"]
    body += [f"out_{i} = out_{i} / total" for i in parts]
    body += store("out", "O", f"(row * {spec.dv})", spec.dv, "owned")
    body += [f"tl.store(LSE + row, (m + tl.log2(l)) * {LN2}, mask=owned)"]
    return kernel(spec, combine_arguments(spec), body, "Shares of keys merged into one output.")


def delta_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of `delta_source`'s function, in order."""
    tensors = [Argument("O", f"*{spec.dtype}", True), Argument("DO", f"*{spec.dtype}", True)]
    rows = [Argument(name, "*fp32", True) for name in ("LSE", "LEVEL", "DELTA")]
    lengths = [Argument("query_lengths", "*i32", True)] if spec.lengths else []
    return [*tensors, *rows, *lengths, *strides("g", "bht", spec.dv), number("T_all")]


def delta_source(spec: KernelSpec) -> str:
    """DELTA = sum of dO * O over a row; LEVEL = its log-sum-exp over log 2, +inf where the row reads nothing.

    exp2(s - LEVEL) is then zero in such a row, never inf - inf.
    """
    rows = spec.tiles[0]
    body = [f"index = tl.program_id(0) * {rows} + tl.arange(0, {rows})", "h = tl.program_id(1)", "b = tl.program_id(2)"]
    body += ["heads = tl.num_programs(1)", "owned = index < T_all"]
    body += ["live = index < tl.load(query_lengths + b)" if spec.lengths else "live = owned", *columns(spec.dv)]
    body += ["row = (b.to(tl.int64) * heads + h) * T_all + index"]
    body += ["grads = DO + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h"]
    body += [*offsets("out", f"(row * {spec.dv})", spec.dv), *load("out", "O", spec.dv, "live")]
    body += [*offsets("grad", "(index.to(tl.int64) * g_t)", spec.dv), *load("grad", "grads", spec.dv, "live")]
    body += [f"delta = tl.zeros([{rows}], tl.float32)"]
    for i in range(len(chunks(spec.dv))):
        body.append(f"delta += tl.sum(out_{i}.to(tl.float32) * grad_{i}.to(tl.float32), 1)")
    body += ['lse = tl.load(LSE + row, mask=live, other=float("-inf"))']
    body += [f'level = tl.where(lse == float("-inf"), float("inf"), lse * {LOG2E})']
    body += ["tl.store(LEVEL + row, level, mask=owned)", "tl.store(DELTA + row, delta, mask=owned)"]
    return kernel(spec, delta_arguments(spec), body, "What the backward pass needs of each row.")
