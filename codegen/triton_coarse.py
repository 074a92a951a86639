"""Kernels of coarse scores, from which blocks, columns and diagonals are chosen at run time (codegen/select.py).

Two kernels score blocks. `antidiagonal` multiplies groups of queries with groups of keys, `stride` tokens each, as
one product over `stride` heads, and keeps for each row of groups the logarithm of what every block adds to the row's
softmax, and of the whole sum; `mass` adds the rows of a block up. So each product is made once, and what is held is one
number a row of groups and block. `means` makes a block's mean, whose products are `antidiagonal` with groups of one.

`columns` sums the last queries' softmax over its columns and over its diagonals. A tile of keys has two tiles' width of
diagonals, which are written beside those of other tiles and added where the kernel is launched, always in one order.
"""

from __future__ import annotations

from codegen.spec import Argument, KernelSpec, chunks, number
from codegen.triton_text import (
    HEAVY_FIRST,
    LENGTHS,
    LOG2E,
    at_head,
    cols,
    columns,
    eighths,
    indent,
    kernel,
    load,
    offsets,
    places,
    product,
    strides,
)

PLACE = (number("first"), number("rows"), number("width"), number("before"))
"""In blocks: the first row of this launch, how many there are, how many columns, and the column before row 0's own."""


def antidiagonal_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of `antidiagonal_source`'s function, in order."""
    tensors = [Argument(name, f"*{spec.dtype}", True) for name in "QK"]
    outs = [Argument("PARTS", "*fp32", True), Argument("LSE", "*fp32", True), Argument("scale", "fp32")]
    lengths = [*strides("q", "bht", spec.dqk), *strides("k", "bhn", spec.dqk), *LENGTHS]
    return [*tensors, *outs, *lengths, *PLACE]


def antidiagonal_source(spec: KernelSpec) -> str:
    """PARTS[row of groups, block]: log2 of the block's part in the row's softmax; LSE[row]: log2 of the whole."""
    rows, keys = spec.tiles
    cells, stride = spec.cells, spec.stride
    body = [f"tile: tl.constexpr = {keys}", HEAVY_FIRST, *places(spec)]
    body += [f"row = at * {rows} + tl.arange(0, {rows})  # a group of {stride} queries, from the first of this launch"]
    body += [f"owned = row < rows * {cells}", f"group = first * {cells} + row", f"own = group + before * {cells}"]
    body += [*eighths("q", "bht", spec.dqk), *eighths("k", "bhn", spec.dqk), f"factor = scale * {LOG2E}"]
    body += [*columns(spec.dqk), at_head("queries", "Q", "h", "q"), at_head("keys", "K", "h_k", "k")]
    body += offsets("query", f"(group.to(tl.int64) * {stride} * q_t)", spec.dqk)
    body += ["n = tl.arange(0, tile)", *offsets("key", f"(n.to(tl.int64) * {stride} * k_n)", spec.dqk)]
    body += [f'm = tl.full([{rows}], float("-inf"), tl.float32)', f"l = tl.zeros([{rows}], tl.float32)"]
    body += ["row_index = (b.to(tl.int64) * heads + h) * " + f"rows * {cells} + row"]
    body += [f"keys_end = {_up('N_all', stride)}  # groups of keys, all and up to the tile's last row's own"]
    body += [f"seen_end = (first + before) * {cells} + tl.minimum((at + 1) * {rows}, rows * {cells})"]
    body += [f"tiles = {_up('tl.maximum(tl.minimum(keys_end, seen_end), 0)', keys)}", "for number in range(0, tiles):"]
    body += indent(_groups(spec))
    body += ["tl.store(LSE + row_index, m + tl.log2(l), mask=owned)"]
    return kernel(
        spec, antidiagonal_arguments(spec), body, "What blocks of keys add to the softmax of groups' products."
    )


def _up(x: str, by: int) -> str:
    """A quotient, rounded up, of what is not negative."""
    return f"({x} + {by - 1}) // {by}" if by > 1 else x


def _groups(spec: KernelSpec) -> list[str]:
    """One tile of groups of keys."""
    rows, keys = spec.tiles
    stride, cells = spec.stride, spec.cells
    lines = ["k_group = number * tile + n", f"s = tl.zeros([{rows}, {keys}], tl.float32)"]
    step = [f"back = {stride - 1} - i  # the group's last query meets its first key: sums run along antidiagonals"]
    step += ["q_from = queries + tl.cast(back, tl.int64) * q_t"]
    step += [f"k_from = keys + (tl.cast(number, tl.int64) * {keys * stride} + i) * k_n"]
    step += [f"live = group * {stride} + back < T_all", f"there = k_group * {stride} + i < N_all"]
    step += [*load("query", "q_from", spec.dqk, "live"), *load("key", "k_from", spec.dqk, "there")]
    step += product(spec, "s", "query", "key", spec.dqk, "s")
    lines += [f"for i in range(0, {stride}):", *indent(step)]
    lines += ["seen = (k_group[None, :] <= own[:, None]) & (k_group < keys_end)[None, :]"]
    lines += ['s = tl.where(seen, s * factor, float("-inf"))', "peak = tl.maximum(m, tl.max(s, 1))"]
    lines += ['level = tl.where(peak == float("-inf"), 0.0, peak)', "p = tl.exp2(s - level[:, None])"]
    if cells > 1:
        lines.append(f"p = tl.sum(tl.reshape(p, [{rows}, {keys // cells}, {cells}]), 2)")
    lines += ["l = l * tl.exp2(m - level) + tl.sum(p, 1)", "m = peak"]
    lines += [f"column = number * {keys // cells} + tl.arange(0, {keys // cells})"]
    lines += ["part = level[:, None] + tl.log2(p)  # -inf where the block holds nothing"]
    place = "row_index[:, None] * width + column[None, :]"
    lines += [f"tl.store(PARTS + {place}, part, mask=owned[:, None] & (column < width)[None, :])"]
    return lines


def mass_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of `mass_source`'s function, in order."""
    tensors = [Argument(name, "*fp32", True) for name in ("PARTS", "LSE", "MASS")]
    return [*tensors, number("T_all"), *PLACE]


def mass_source(spec: KernelSpec) -> str:
    """MASS[row of blocks, block]: the softmax of the rows of groups, summed over the block; 0 behind the row's own."""
    rows, wide = spec.tiles
    cells = spec.cells
    body = [*places(spec), f"row = tl.program_id(0) * {rows} + tl.arange(0, {rows})"]
    body += ["of_head = (b.to(tl.int64) * heads + h) * rows", "own = first + row + before"]
    step = [f"column = number * {wide} + tl.arange(0, {wide})"]
    step += ["owned = (row < rows)[:, None] & (column < width)[None, :]"]
    step += ["seen = owned & (column[None, :] <= own[:, None])", f"mass = tl.zeros([{rows}, {wide}], tl.float32)"]
    add = [f"group = (of_head + row) * {cells} + i"]
    add += [f"live = (row < rows) & (((first + row) * {cells} + i) * {spec.stride} < T_all)"]
    add += ['lse = tl.load(LSE + group, mask=live, other=float("-inf"))', 'live = live & (lse > float("-inf"))']
    place = "group[:, None] * width + column[None, :]"
    add += [f'part = tl.load(PARTS + {place}, mask=seen & live[:, None], other=float("-inf"))']
    add += ["mass += tl.exp2(part - tl.where(live, lse, 0.0)[:, None])"]
    step += [f"for i in range(0, {cells}):", *indent(add)]
    step += ["tl.store(MASS + (of_head + row)[:, None] * width + column[None, :], mass, mask=owned)"]
    body += [f"for number in range(0, (width + {wide - 1}) // {wide}):", *indent(step)]
    return kernel(spec, mass_arguments(spec), body, "The softmax of groups' products, summed block by block.")


def means_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of `means_source`'s function, in order."""
    tensors = [Argument("Q", f"*{spec.dtype}", True), Argument("MEANS", "*fp32", True)]
    return [*tensors, *strides("q", "bht", spec.dqk), number("T_all")]


def means_source(spec: KernelSpec) -> str:
    """MEANS[block, channel] of a block's tokens that are there, one block a program."""
    rows, size = spec.tiles[0], spec.block
    body = ["at = tl.program_id(0)", *places(spec), *eighths("q", "bht", spec.dqk), *columns(spec.dqk)]
    body += [
        at_head("tokens", "Q", "h", "q"),
        f"row = tl.arange(0, {rows})",
        f"count = tl.minimum({size}, T_all - at * {size})",
    ]
    body += offsets("token", "(row.to(tl.int64) * q_t)", spec.dqk)
    body += [f"sum_{i} = tl.zeros([{c.size}], tl.float32)" for i, c in enumerate(chunks(spec.dqk))]
    step = [f"from_token = tokens + (tl.cast(at, tl.int64) * {size} + i) * q_t"]
    step += load("token", "from_token", spec.dqk, "(i + row < count)")
    step += [f"sum_{i} += tl.sum(token_{i}.to(tl.float32), 0)" for i in range(len(chunks(spec.dqk)))]
    body += [f"for i in range(0, {size}, {rows}):", *indent(step)]
    body += [f"mean = MEANS + ((b.to(tl.int64) * heads + h) * tl.num_programs(0) + at) * {spec.dqk}"]
    for i, chunk in enumerate(chunks(spec.dqk)):
        within = f", mask={cols(chunk)} < {chunk.end}" if chunk.ragged else ""
        body.append(f"tl.store(mean + {cols(chunk)}, sum_{i} / count{within})")
    return kernel(spec, means_arguments(spec), body, "Means of blocks of tokens.")


def columns_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of `columns_source`'s function, in order."""
    tensors = [Argument(name, f"*{spec.dtype}", True) for name in "QK"]
    outs = [Argument(name, "*fp32", True) for name in ("LSE", "COLUMNS", "PARTS")]
    lengths = [*strides("q", "bht", spec.dqk), *strides("k", "bhn", spec.dqk), *LENGTHS]
    return [*tensors, *outs, Argument("scale", "fp32"), *lengths]


def columns_source(spec: KernelSpec) -> str:
    """COLUMNS[key]: the queries' softmax summed; PARTS[tile of keys]: its diagonals, two tiles wide, from the tile's
    last key for query 0 on."""
    rows, group = spec.tiles[0], spec.group
    body = [f"tile: tl.constexpr = {spec.tiles[1]}", "at = tl.program_id(0)", "h_k = tl.program_id(1)"]
    body += ["b = tl.program_id(2)", f"heads = tl.num_programs(1) * {group}", f"row = tl.arange(0, {rows})"]
    body += ["live = row < T_all", "q = (row + N_all - T_all)[:, None]", "n = tl.arange(0, tile)"]
    body += ["key_index = at * tile + n", "there = key_index < N_all", "e = tl.arange(0, 2 * tile)"]
    body += ["keep = live[:, None] & there[None, :] & (key_index[None, :] <= q)"]
    body += ["turn = (tile - 1 + row)[:, None] - e[None, :]  # the key of each query on a diagonal"]
    body += ["inside = (turn >= 0) & (turn < tile)", "turn = tl.where(inside, turn, 0)"]
    body += [*eighths("q", "bht", spec.dqk), *eighths("k", "bhn", spec.dqk), f"factor = scale * {LOG2E}"]
    body += [*columns(spec.dqk), at_head("keys", "K", "h_k", "k")]
    body += offsets("query", "(row.to(tl.int64) * q_t)", spec.dqk)
    body += offsets("key", "(key_index.to(tl.int64) * k_n)", spec.dqk) + load("key", "keys", spec.dqk, "there")
    step = [f"h = h_k * {group} + i", at_head("queries", "Q", "h", "q"), *load("query", "queries", spec.dqk, "live")]
    step += product(spec, "s", "query", "key", spec.dqk)
    step += ["of_head = b.to(tl.int64) * heads + h"]
    step += ['lse = tl.load(LSE + of_head * T_all + row, mask=live, other=float("inf"))' + f" * {LOG2E}"]
    step += ["p = tl.where(keep, tl.exp2(s * factor - lse[:, None]), 0.0)"]
    step += ["tl.store(COLUMNS + of_head * N_all + key_index, tl.sum(p, 0), mask=there)"]
    step += ["turned = tl.where(inside, tl.gather(p, turn, 1), 0.0)"]
    step += ["tl.store(PARTS + (of_head * tl.num_programs(0) + at) * 2 * tile + e, tl.sum(turned, 0))"]
    body += [f"for i in range(0, {group}):", *indent(step)]
    return kernel(spec, columns_arguments(spec), body, "The last queries' softmax, summed to columns and diagonals.")
