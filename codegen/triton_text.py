"""The phrases that all kernels are written in: blocks of a head by chunks, products, scores, where a row stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import fill

from codegen.loops import Loop, Loops, loops, table_axes
from codegen.spec import TRITON, Argument, Chunk, KernelSpec, chunks, number

LOG2E = "1.4426950408889634"
LN2 = "0.6931471805599453"


def indent(lines: Iterable[str], by: int = 4) -> list[str]:
    """Every line moved to the right."""
    return [" " * by + line if line else line for line in lines]


def kernel(spec: KernelSpec, arguments: Sequence[Argument], body: Iterable[str], says: str) -> str:
    """The file: what it computes and the spec as header, then one function."""
    names = fill(", ".join(a.name for a in arguments), 100, break_long_words=False).splitlines()
    vary = ", ".join(f'"{a.name}"' for a in arguments if a.varies)
    head = [f'"""{says}', "", f"{spec}", '"""', "", "import triton", "import triton.language as tl", "", ""]
    head += [f"@triton.jit(do_not_specialize=[{vary}])", f"def {spec.name}(", *indent(names), "):"]
    return "\n".join([*head, *indent(body), ""])


def columns(*dims: int) -> list[str]:
    """The column numbers of all chunks of heads of these dims, named by `cols`."""
    found = {(c.first, c.size) for dim in dims for c in chunks(dim)}
    return [f"d_{f}_{n} = " + (f"{f} + " if f else "") + f"tl.arange(0, {n})" for f, n in sorted(found)]


def cols(chunk: Chunk) -> str:
    """The name of a chunk's column numbers."""
    return f"d_{chunk.first}_{chunk.size}"


def _within(chunk: Chunk, rows: str | None) -> str | None:
    tests = [f"{rows}[:, None]"] if rows is not None else []
    if chunk.ragged:
        tests.append(f"({cols(chunk)} < {chunk.end})[None, :]")
    return " & ".join(tests) or None


def offsets(name: str, rows: str, dim: int) -> list[str]:
    """Blocks `<name>_at_0`, ... of offsets to a head's elements from the rows' first columns `rows`.

    Named before a loop: a sum with a pointer that moves would be made again in each round.
    """
    return [f"{name}_at_{i} = {rows}[:, None] + {cols(chunk)}[None, :]" for i, chunk in enumerate(chunks(dim))]


def load(name: str, pointer: str, dim: int, rows: str | None) -> list[str]:
    """Blocks `<name>_0`, ... of a head by its `offsets`; rows outside `rows` are zero."""
    lines: list[str] = []
    for i, chunk in enumerate(chunks(dim)):
        within = _within(chunk, rows)
        mask = f", mask={within}, other=0.0" if within else ""
        lines.append(f"{name}_{i} = tl.load({pointer} + {name}_at_{i}{mask})")
    return lines


def store(name: str, pointer: str, at: str, dim: int, rows: str | None) -> list[str]:
    """The reverse of `load`, `at` being the rows' first columns, in the type of what is written to."""
    lines: list[str] = []
    for i, chunk in enumerate(chunks(dim)):
        within = _within(chunk, rows)
        mask = f", mask={within}" if within else ""
        lines.append(f"out = {name}_{i}.to({pointer}.dtype.element_ty)")
        lines.append(f"tl.store({pointer} + {at}[:, None] + {cols(chunk)}[None, :], out{mask})")
    return lines


def dot(spec: KernelSpec, left: str, right: str, onto: str | None = None) -> str:
    """A matrix product in fp32, added to `onto`."""
    cast = ".to(tl.float32)" if spec.upcast else ""
    exact = ', input_precision="ieee"' if spec.upcast or spec.dtype == "fp32" else ""
    return f"tl.dot({left}{cast}, {right}{cast}{', ' + onto if onto else ''}{exact})"


def narrow(spec: KernelSpec, name: str) -> str:
    """A block in fp32 as an operand of the next product."""
    return name if spec.dtype == "fp32" else f"{name}.to({TRITON[spec.dtype]})"


def product(spec: KernelSpec, name: str, left: str, right: str, dim: int, start: str | None = None) -> list[str]:
    """`name` = start + left @ right^T over a head of `dim`, chunk after chunk."""
    lines: list[str] = []
    for i in range(len(chunks(dim))):
        onto = name if i else start
        lines.append(f"{name} = {dot(spec, f'{left}_{i}', f'tl.trans({right}_{i})', onto)}")
    return lines


def scores(spec: KernelSpec, rows: str, keys: str, within: str | None) -> list[str]:
    """The product `s` into logits over log 2; the plain form leaves it to `factor`.

    `rows` and `keys` are how a vector over them becomes a block: "[:, None]" or "[None, :]". `within` is the test of
    which pairs have a bias.
    """
    if not spec.modified:
        return []
    lines: list[str] = []
    if spec.softcap:
        lines += ["# 2 sigmoid(2x) - 1 is tanh; for large x the exponential is inf or 0, and the quotient is right."]
        lines += ["bent = 1.0 - 2.0 / (1.0 + tl.exp2(s * bend))", "s = bent * cap"]
    else:
        lines += ["s = s * factor"]
    if spec.bias:
        mask = f", mask={within}, other=0.0" if within else ""
        lines.append(f"s += tl.load(bias_rows{rows} + key_index{keys}{mask}).to(tl.float32) * {LOG2E}")
    if spec.alibi:
        slope = f"slope{rows}" if spec.packed else "slope"
        lines.append(f"s -= {slope} * (q - k)")
    return lines


def factor(spec: KernelSpec) -> str:
    """What turns `s` into logits over log 2 where it is used: nothing where `scores` did."""
    return "" if spec.modified else " * factor"


def factors(spec: KernelSpec) -> list[str]:
    """The scalars of `scores`."""
    lines = [f"factor = scale * {LOG2E}"]
    if spec.softcap:
        lines += ["bend = 2.0 * factor / softcap", f"cap = softcap * {LOG2E}"]
    return lines


def real_lengths(spec: KernelSpec) -> list[str]:
    """T, N and the offset of this batch row."""
    lines = ["T = tl.load(query_lengths + b)", "N = tl.load(key_lengths + b)"] if spec.lengths else []
    if not spec.lengths:
        lines += ["T = T_all", "N = N_all"]
    return [*lines, "offset = N - T"]


def places(spec: KernelSpec) -> list[str]:
    """Which head (of keys, where a tile holds the group) and batch row this program has."""
    lines = ["b = tl.program_id(2)"]
    if spec.packed:
        lines += ["h_k = tl.program_id(1)", f"h = h_k * {spec.group}", f"heads = tl.num_programs(1) * {spec.group}"]
    else:
        lines += ["h = tl.program_id(1)", f"h_k = h // {spec.group}" if spec.group > 1 else "h_k = h"]
        lines += ["heads = tl.num_programs(1)"]
    return lines


def query_rows(spec: KernelSpec) -> list[str]:
    """The rows of a query tile: `index` (query number), `head`, `live` (to compute), `owned` (to write), q0, q1."""
    rows, group = spec.tiles[0], spec.group
    lines = [f"first = at * {rows}", f"row = first + tl.arange(0, {rows})"]
    if spec.packed and group > 1:
        lines += [
            f"q0 = first // {group} + offset",
            f"q1 = tl.minimum((first + {rows - 1}) // {group} + 1, T) + offset",
        ]
        lines += [f"index = row // {group}  # a row is a query and a head of the group", f"head = h + row % {group}"]
    else:
        lines += ["q0 = first + offset", f"q1 = tl.minimum(first + {rows}, T) + offset", "index = row", "head = h"]
    lines += ["live = index < T", "owned = index < T_all" if spec.lengths else "owned = live"]
    lines += ["q = (index + offset)[:, None]"]
    if spec.alibi:
        lines.append(f"slope = tl.load(slopes + head).to(tl.float32) * {LOG2E}")
    lines.append("row_index = (b.to(tl.int64) * heads + head) * T_all + index")
    if spec.bias:
        lines.append(
            "bias_rows = bias + b.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h + index.to(tl.int64) * bias_q"
        )
    return lines


def at_head(name: str, tensor: str, head: str, letter: str) -> str:
    """`name` = where a head of `tensor` begins."""
    return f"{name} = {tensor} + b.to(tl.int64) * {letter}_b + {head}.to(tl.int64) * {letter}_h"


def eighths(letter: str, axes: str, dim: int) -> list[str]:
    """What Triton does not see of strides by itself, as it looks for multiples of 16: heads of 8, 24, 40, 72."""
    if dim % 16 != 8:
        return []
    return [f"{letter}_{axis} = tl.multiple_of({letter}_{axis}, 8)" for axis in axes]


def row_offsets(name: str, letter: str, spec: KernelSpec, token: str = "t") -> str:
    """`name` = offsets of a query tile's rows from the first head's start."""
    base = f"{name} = index.to(tl.int64) * {letter}_{token}"
    return base + (f" + (head - h).to(tl.int64) * {letter}_h" if spec.packed and spec.group > 1 else "")


def loop_text(loop: Loop, body: Sequence[str], first: str = "0", last: str | None = None) -> list[str]:
    """One of the kernel's two loops, nothing where it has no tile at any length."""
    if loop.empty:
        return []
    return [f"for i in range({first}, {last or loop.name + '_end'}):", *indent([*loop.tile(), *body])]


def bounds(spec: KernelSpec, found: Loops, live: str) -> list[str]:
    """How many tiles each loop has; none where nothing in the tile is `live`."""
    lines = ["list_row = b * list_b + h * list_h + at"] if found.listed else []
    lines += found.shared
    for loop in (found.full, found.masked):
        if loop.empty:
            continue
        lines += [*loop.starts(), *loop.bounds()]
        lines += [f"{loop.name}_end = tl.where({live}, {loop.name}_end, 0)"] if spec.lengths else []
    return lines


def mask_arguments(spec: KernelSpec) -> list[Argument]:
    """Lists and tables of the mask: pointers, the tables' sizes, and where a list's rows are."""
    listed = loops(spec.mask, "q" if spec.phase == "dkdv" else "k").listed
    names = ["full_counts", "full_list", "masked_counts", "masked_list"] if listed else []
    numbers = ["list_b", "list_h", "full_width", "masked_width"] if listed else []
    for table, axes in table_axes(spec.mask).items():
        names.append(table)
        numbers += [f"{table}_n{axis}" for axis in range(axes)]
    return [*(Argument(name, "*i32", True) for name in names), *(number(name) for name in numbers)]


def modifier_arguments(spec: KernelSpec) -> list[Argument]:
    """Bias, slopes, lengths, the scale and the cap."""
    found: list[Argument] = []
    if spec.bias:
        found += [Argument("bias", f"*{spec.dtype}", True), *strides("bias", "bhq", 1)]
    if spec.alibi:
        found.append(Argument("slopes", "*fp32", True))
    if spec.lengths:
        found += [Argument("query_lengths", "*i32", True), Argument("key_lengths", "*i32", True)]
    found.append(Argument("scale", "fp32"))
    if spec.softcap:
        found.append(Argument("softcap", "fp32"))
    return found


def strides(letter: str, axes: str, dim: int) -> list[Argument]:
    """A tensor's strides; those of a head of `dim` are multiples of 16 where `dim` is."""
    return [Argument(f"{letter}_{axis}", "i32", dim % 16 == 0) for axis in axes]


HEAVY_FIRST = "at = tl.num_programs(0) - 1 - tl.program_id(0)  # of causal queries, the last read most"
LENGTHS = (number("T_all"), number("N_all"))
