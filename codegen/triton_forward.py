"""The forward kernel, and the decoding one, which is the same over a share of the keys.

The softmax runs online in base two: m the largest logit so far, l the sum of exponentials, both over log 2. What a row
may not read is -inf, and a row that has read nothing yet keeps m = -inf without a NaN.
"""

from __future__ import annotations

from codegen.loops import loops
from codegen.spec import Argument, KernelSpec, chunks, number
from codegen.triton_text import (
    HEAVY_FIRST,
    LENGTHS,
    LN2,
    LOG2E,
    at_head,
    bounds,
    columns,
    dot,
    eighths,
    factor,
    factors,
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


def forward_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of `forward_source`'s function, in order."""
    split = spec.phase == "decode"
    tensor, out = f"*{spec.dtype}", "*fp32" if split else f"*{spec.dtype}"
    found = [Argument("Q", tensor, True), Argument("K", tensor, True)]
    found += [] if spec.latent else [Argument("V", tensor, True)]
    found += [Argument("O", out, True), Argument("LSE", "*fp32", True)]
    found += [Argument("sinks", "*fp32", True)] if spec.sinks else []
    found += [*mask_arguments(spec), *modifier_arguments(spec)]
    found += [*strides("q", "bht", spec.dqk), *strides("k", "bhn", spec.dqk)]
    found += [] if spec.latent else strides("v", "bhn", spec.dv)
    return [*found, *LENGTHS, *([number("shares")] if split else [])]


def forward_source(spec: KernelSpec) -> str:
    """O = softmax(scores) V and the logarithm of the softmax's sum (LSE), a query tile a program."""
    split = spec.phase == "decode"
    found = loops(spec.mask, "k")
    body = [f"tile: tl.constexpr = {spec.tiles[1]}"]
    body += ["at = tl.program_id(0) // shares", "share = tl.program_id(0) % shares"] if split else [HEAVY_FIRST]
    body += [*places(spec), *real_lengths(spec), *query_rows(spec)]
    body += [*eighths("q", "bht", spec.dqk), *eighths("k", "bhn", spec.dqk)]
    body += [] if spec.latent else eighths("v", "bhn", spec.dv)
    body += [*factors(spec), *columns(spec.dqk, spec.dv), "", *_start(spec), ""]
    body += bounds(spec, found, "q0 < q1")
    for loop, masked in ((found.full, False), (found.masked, True)):
        first, last = (f"{loop.name}_end * share // shares", f"{loop.name}_end * (share + 1) // shares")
        body += loop_text(loop, _step(spec, masked), *((first, last) if split else ()))
    body += ["", *_finish(spec)]
    says = "A share of the keys of each query" if split else "Attention of a tile of queries"
    return kernel(spec, forward_arguments(spec), body, f"{says}: outputs and log-sum-exp.")


def _start(spec: KernelSpec) -> list[str]:
    rows = spec.tiles[0]
    lines = [at_head("queries", "Q", "h", "q"), at_head("keys", "K", "h_k", "k")]
    lines += [] if spec.latent else [at_head("values", "V", "h_k", "v")]
    lines += [row_offsets("from_query", "q", spec), *offsets("query", "from_query", spec.dqk)]
    lines += [*load("query", "queries", spec.dqk, "live"), *key_offsets(spec)]
    if spec.sinks:
        lines.append(f"m = tl.zeros([{rows}], tl.float32) + tl.load(sinks + head).to(tl.float32) * {LOG2E}")
        lines.append(f"l = tl.full([{rows}], 1.0, tl.float32)")
    else:
        lines.append(f'm = tl.full([{rows}], float("-inf"), tl.float32)')
        lines.append(f"l = tl.zeros([{rows}], tl.float32)")
    if spec.sinks and spec.phase == "decode":
        lines += [
            'm = tl.where(share == 0, m, float("-inf"))  # the sink counts once',
            "l = tl.where(share == 0, l, 0.0)",
        ]
    return lines + [f"out_{i} = tl.zeros([{rows}, {c.size}], tl.float32)" for i, c in enumerate(chunks(spec.dv))]


def key_offsets(spec: KernelSpec) -> list[str]:
    """Where the elements of a key tile stand from its first one."""
    lines = ["n = tl.arange(0, tile)", *offsets("key", "(n * k_n)", spec.dqk)]
    return lines + ([] if spec.latent else offsets("value", "(n * v_n)", spec.dv))


def key_tile(spec: KernelSpec, masked: bool) -> list[str]:
    """Loads the keys of tile `number`; `k` are their positions, `there` those that exist."""
    lines = ["begin = number * tile"]
    if masked or spec.modified:
        lines += ["key_index = begin + n", "k = key_index[None, :]"]
    lines += ["there = key_index < N"] if masked else []
    lines.append("k_from = keys + tl.cast(begin, tl.int64) * k_n")
    return lines + load("key", "k_from", spec.dqk, "there" if masked else None)


def value_tile(spec: KernelSpec, masked: bool) -> list[str]:
    """Loads the values of the tile that `key_tile` began."""
    if spec.latent:
        return [f"value_{i} = key_{i}" for i in range(len(chunks(spec.dv)))]
    lines = ["v_from = values + tl.cast(begin, tl.int64) * v_n"]
    return lines + load("value", "v_from", spec.dv, "there" if masked else None)


def _step(spec: KernelSpec, masked: bool) -> list[str]:
    """One key tile: scores, the softmax so far, what it adds to the output."""
    lines = [*key_tile(spec, masked), *product(spec, "s", "query", "key", spec.dqk)]
    lines += scores(spec, "[:, None]", "[None, :]", "live[:, None] & there[None, :]" if masked else "live[:, None]")
    times = factor(spec)
    if masked:
        keep = loops(spec.mask, "k").keep
        lines.append("keep = there[None, :]" + (f" & ({keep})" if keep else ""))
        lines.append('s = tl.where(keep, s, float("-inf"))')
    lines.append(f"peak = tl.maximum(m, tl.max(s, 1){times})")
    if masked or spec.bias:
        lines.append('level = tl.where(peak == float("-inf"), 0.0, peak)')
    level = "level" if masked or spec.bias else "peak"
    lines += [f"p = tl.exp2(s{times} - {level}[:, None])", f"fade = tl.exp2(m - {level})"]
    lines += ["l = l * fade + tl.sum(p, 1)", "m = peak", *value_tile(spec, masked), f"weights = {narrow(spec, 'p')}"]
    for i in range(len(chunks(spec.dv))):
        lines.append(f"out_{i} = {dot(spec, 'weights', f'value_{i}', f'out_{i} * fade[:, None]')}")
    return lines


def _finish(spec: KernelSpec) -> list[str]:
    split = spec.phase == "decode"
    outs = [f"out_{i}" for i in range(len(chunks(spec.dv)))]
    lines = ["total = tl.where(l == 0.0, 1.0, l)[:, None]  # a row that reads nothing is zero"]
    lines += [f"{o} = {o} / total" for o in outs]
    lines.append(f"lse = (m + tl.log2(l)) * {LN2}")
    if spec.lengths:
        lines += [f"{o} = tl.where(live[:, None], {o}, 0.0)" for o in outs]
        lines.append('lse = tl.where(live, lse, float("-inf"))')
    if split:
        lines.append("row_index += share.to(tl.int64) * tl.num_programs(2) * heads * T_all")
    return [
        *lines,
        *store("out", "O", f"(row_index * {spec.dv})", spec.dv, "owned"),
        "tl.store(LSE + row_index, lse, mask=owned)",
    ]
