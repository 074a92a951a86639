"""The backward pass: two kernels, each writing what it sums, so that gradients are the same in every run.

P = exp2(s - LEVEL), dV = P^T dO, dP = dO V^T, dS = P (dP - DELTA), dQ = dS K, dK = dS^T Q. What may not be read is
made zero in P behind the exponential: a score of zero in a row of padding would not be.
"""

from __future__ import annotations

from codegen.loops import loops
from codegen.spec import Argument, KernelSpec, chunks
from codegen.triton_forward import key_offsets, key_tile, value_tile
from codegen.triton_text import (
    HEAVY_FIRST,
    LENGTHS,
    LOG2E,
    at_head,
    bounds,
    columns,
    dot,
    eighths,
    factor,
    factors,
    indent,
    kernel,
    load,
    loop_text,
    mask_arguments,
    modifier_arguments,
    narrow,
    offsets,
    places,
    product,
    query_rows,
    real_lengths,
    row_offsets,
    scores,
    store,
    strides,
)


def backward_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of either function, in order."""
    tensor = f"*{spec.dtype}"
    found = [Argument(name, tensor, True) for name in ("Q", "K", "V", "DO")]
    found += [Argument("LEVEL", "*fp32", True), Argument("DELTA", "*fp32", True)]
    outs = ("DK", "DV") if spec.phase == "dkdv" else ("DQ",)
    found += [Argument(name, tensor, True) for name in outs]
    found += [Argument("DBIAS", "*fp32", True)] if spec.dbias else []
    found += [*mask_arguments(spec), *modifier_arguments(spec)]
    found += [*strides("q", "bht", spec.dqk), *strides("k", "bhn", spec.dqk), *strides("v", "bhn", spec.dv)]
    return [*found, *strides("g", "bht", spec.dv), *LENGTHS]


def _aligned(spec: KernelSpec) -> list[str]:
    keys = [*eighths("q", "bht", spec.dqk), *eighths("k", "bhn", spec.dqk)]
    return [*keys, *eighths("v", "bhn", spec.dv), *eighths("g", "bht", spec.dv)]


def dq_source(spec: KernelSpec) -> str:
    """DQ of a tile of queries, over the key tiles it reads; DBIAS too where it is asked for."""
    found = loops(spec.mask, "k")
    body = [f"tile: tl.constexpr = {spec.tiles[1]}", HEAVY_FIRST, *places(spec)]
    body += [*real_lengths(spec), *query_rows(spec)]
    body += [*_aligned(spec), *factors(spec), *columns(spec.dqk, spec.dv), ""]
    body += [at_head("queries", "Q", "h", "q"), at_head("keys", "K", "h_k", "k"), at_head("values", "V", "h_k", "v")]
    body += [
        at_head("grads", "DO", "h", "g"),
        row_offsets("from_query", "q", spec),
        row_offsets("from_grad", "g", spec),
    ]
    body += [*offsets("query", "from_query", spec.dqk), *load("query", "queries", spec.dqk, "live")]
    body += [*offsets("grad", "from_grad", spec.dv), *load("grad", "grads", spec.dv, "live")]
    body += ['level = tl.load(LEVEL + row_index, mask=live, other=float("inf"))']
    body += ["delta = tl.load(DELTA + row_index, mask=live, other=0.0)", *key_offsets(spec)]
    body += [f"out_{i} = tl.zeros([{spec.tiles[0]}, {c.size}], tl.float32)" for i, c in enumerate(chunks(spec.dqk))]
    body += ["", *bounds(spec, found, "q0 < q1")]
    for loop, masked in ((found.full, False), (found.masked, True)):
        body += loop_text(loop, _dq_step(spec, masked))
    body += ["", *(f"out_{i} = out_{i} * scale" for i in range(len(chunks(spec.dqk))))]
    body += store("out", "DQ", f"(row_index * {spec.dqk})", spec.dqk, "owned")
    return kernel(spec, backward_arguments(spec), body, "Gradients of queries.")


def _dq_step(spec: KernelSpec, masked: bool) -> list[str]:
    lines = [*key_tile(spec, masked), *product(spec, "s", "query", "key", spec.dqk)]
    pairs = "live[:, None] & there[None, :]" if masked else "live[:, None]"
    lines += [*scores(spec, "[:, None]", "[None, :]", pairs), f"p = tl.exp2(s{factor(spec)} - level[:, None])"]
    if masked:
        keep = loops(spec.mask, "k").keep
        lines += ["p = tl.where(there[None, :]" + (f" & ({keep})" if keep else "") + ", p, 0.0)"]
    lines += [*value_tile(spec, masked), *product(spec, "dp", "grad", "value", spec.dv)]
    lines.append("ds = p * (dp - delta[:, None])")
    if spec.dbias:
        lines.append("dbias_at = DBIAS + (row_index * N_all)[:, None] + key_index[None, :]")
        lines.append(f"tl.store(dbias_at, ds, mask={pairs})")
    lines += ["ds = ds * (1.0 - bent * bent)"] if spec.softcap else []
    lines.append(f"weights = {narrow(spec, 'ds')}")
    return lines + [f"out_{i} = {dot(spec, 'weights', f'key_{i}', f'out_{i}')}" for i in range(len(chunks(spec.dqk)))]


def dkdv_source(spec: KernelSpec) -> str:
    """DK and DV of a tile of keys, over all heads of the group and the query tiles that read it."""
    found = loops(spec.mask, "q")
    body = [f"tile: tl.constexpr = {spec.tiles[0]}", "at = tl.program_id(0)", "h_k = tl.program_id(1)"]
    body += ["b = tl.program_id(2)", f"heads = tl.num_programs(1) * {spec.group}", *real_lengths(spec)]
    body += [f"k0 = at * {spec.tiles[1]}", f"k1 = tl.minimum(k0 + {spec.tiles[1]}, N)"]
    body += [
        f"n = tl.arange(0, {spec.tiles[1]})",
        "key_index = k0 + n",
        "there = key_index < N",
        "k = key_index[:, None]",
    ]
    body += [*_aligned(spec), *factors(spec), *columns(spec.dqk, spec.dv), "row = tl.arange(0, tile)", ""]
    body += [at_head("keys", "K", "h_k", "k"), at_head("values", "V", "h_k", "v")]
    body += [*offsets("key", "(key_index.to(tl.int64) * k_n)", spec.dqk), *load("key", "keys", spec.dqk, "there")]
    body += [*offsets("value", "(key_index.to(tl.int64) * v_n)", spec.dv), *load("value", "values", spec.dv, "there")]
    body += [*offsets("query", "(row * q_t)", spec.dqk), *offsets("grad", "(row * g_t)", spec.dv)]
    for name, dim in (("dk", spec.dqk), ("dv", spec.dv)):
        body += [f"{name}_{i} = tl.zeros([{spec.tiles[1]}, {c.size}], tl.float32)" for i, c in enumerate(chunks(dim))]
    each = [f"h = h_k * {spec.group} + member", *bounds(spec, found, "k0 < k1")]
    each += [at_head("queries", "Q", "h", "q"), at_head("grads", "DO", "h", "g")]
    each += ["rows_before = (b.to(tl.int64) * heads + h) * T_all"]
    each += [f"slope = tl.load(slopes + h).to(tl.float32) * {LOG2E}"] if spec.alibi else []
    each += ["bias_head = bias + b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h"] if spec.bias else []
    for loop, masked in ((found.full, False), (found.masked, True)):
        each += loop_text(loop, _dkdv_step(spec, masked))
    body += [f"for member in range(0, {spec.group}):", *indent(each)] if spec.group > 1 else ["member = 0", *each]
    body += ["", *(f"dk_{i} = dk_{i} * scale" for i in range(len(chunks(spec.dqk))))]
    if spec.lengths:
        outs = [f"{name}_{i}" for name, dim in (("dk", spec.dqk), ("dv", spec.dv)) for i in range(len(chunks(dim)))]
        body += [f"{out} = tl.where(there[:, None], {out}, 0.0)" for out in outs]
    body += ["owned = key_index < N_all", "row_index = (b.to(tl.int64) * tl.num_programs(1) + h_k) * N_all + key_index"]
    body += store("dk", "DK", f"(row_index * {spec.dqk})", spec.dqk, "owned")
    body += store("dv", "DV", f"(row_index * {spec.dv})", spec.dv, "owned")
    return kernel(spec, backward_arguments(spec), body, "Gradients of keys and values.")


def _dkdv_step(spec: KernelSpec, masked: bool) -> list[str]:
    """One query tile, keys as rows: the scores' transpose."""
    within = "live" if masked else None
    lines = ["begin = number * tile", "index = begin + row", "live = index < T"]
    lines += ["q = (index + offset)[None, :]"] if masked or spec.modified else []
    lines += ["q_from = queries + tl.cast(begin, tl.int64) * q_t", "g_from = grads + tl.cast(begin, tl.int64) * g_t"]
    lines += [*load("query", "q_from", spec.dqk, within), *product(spec, "s", "key", "query", spec.dqk)]
    lines += ["bias_rows = bias_head + index.to(tl.int64) * bias_q"] if spec.bias else []
    pairs = "there[:, None] & live[None, :]"
    lines += scores(spec, "[None, :]", "[:, None]", pairs)
    rows = ', mask=live, other=float("inf")' if masked else ""
    lines += [f"level = tl.load(LEVEL + rows_before + index{rows})", f"p = tl.exp2(s{factor(spec)} - level[None, :])"]
    if masked:
        keep = loops(spec.mask, "q").keep
        lines += ["p = tl.where(live[None, :]" + (f" & ({keep})" if keep else "") + ", p, 0.0)"]
    lines += [*load("grad", "g_from", spec.dv, within), f"weights = {narrow(spec, 'p')}"]
    lines += [f"dv_{i} = {dot(spec, 'weights', f'grad_{i}', f'dv_{i}')}" for i in range(len(chunks(spec.dv)))]
    lines += product(spec, "dp", "value", "grad", spec.dv)
    rows = ", mask=live, other=0.0" if masked else ""
    lines += [f"delta = tl.load(DELTA + rows_before + index{rows})", "ds = p * (dp - delta[None, :])"]
    lines += ["ds = ds * (1.0 - bent * bent)"] if spec.softcap else []
    lines.append(f"weights = {narrow(spec, 'ds')}")
    return lines + [f"dk_{i} = {dot(spec, 'weights', f'query_{i}', f'dk_{i}')}" for i in range(len(chunks(spec.dqk)))]
