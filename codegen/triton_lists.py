"""The kernel that makes lists of tiles: for one fixed tile, row and head a program goes through the others, decides as
`codegen/lists.py` does in torch which it visits and which need masking, and writes their numbers one after another.

What a table holds over a pair of tiles comes from its doubled forms (`lists.doubled`) along its last axis that varies,
by two looks; along other axes that vary every entry is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from codegen.integers import Int
from codegen.lists import bounds, clauses_of, entries, form, run_of, spans
from codegen.loops import table_axes
from codegen.printed import program
from codegen.spec import Argument, KernelSpec, number
from codegen.triton_text import indent, kernel
from rewrite.mask.clauses import Clause
from rewrite.mask.terms import FAR, At

OUT = ("FULL", "MASKED")


def list_arguments(spec: KernelSpec) -> list[Argument]:
    """The arguments of `list_source`'s function, in order."""
    read = entries(spec.mask)
    # what is read at positions is read from its doubled forms alone
    tensors = sorted({str(x.args[0]) for x in spec.mask.keep.atoms(At) if x not in read})
    numbers: list[str] = []
    for table, axes in table_axes(spec.mask).items():
        numbers += [f"{table}_n{axis}" for axis in range(axes)]
    for j, entry in enumerate(read):
        tensors += [f"least_{j}", f"largest_{j}"]
        numbers += [f"levels_{j}", *(f"steps_{j}_{axis}" for axis in varying(entry)[:-1])]
    tensors += [f"{name}{more}" for name in OUT for more in ("_COUNTS", "")]
    numbers += ["T_all", "N_all", "fixed", "looped", "width"]
    return [*(Argument(name, "*i32", True) for name in tensors), *(number(name) for name in numbers)]


@cache
def varying(entry: At) -> tuple[int, ...]:
    """Axes of a table along which a pair of tiles reads more than one entry."""
    return tuple(axis for axis, span in enumerate(spans(entry)) if span.low is not span.high)


def list_source(spec: KernelSpec) -> str:
    """Numbers of tiles without masking and of those with, and how many of each."""
    over, wide = spec.phase[-1], spec.tiles[1]
    body = ["at = tl.program_id(0)", "h = tl.program_id(1)", "b = tl.program_id(2)"]
    body += ["T = T_all", "N = N_all", "offset = N - T"]
    fixed, looped = (_queries, _keys) if over == "k" else (_keys, _queries)
    body += [f"tile = {'looped' if over == 'k' else 'fixed'}", *fixed("at", "fixed")]
    body += ["row = (b.to(tl.int64) * tl.num_programs(1) + h) * tl.num_programs(0) + at"]
    body += ["full_count = at * 0", "masked_count = at * 0"]
    step = [f"number = chunk * {wide} + tl.arange(0, {wide})", "there = number < width", *looped("number", "looped")]
    step += ["key_tile = k0 // tile", "some = number < 0", "every = number < 0"]
    found = entries(spec.mask)
    for j, entry in enumerate(found):
        step += _looks(j, entry)
    for i, clause in enumerate(clauses_of(spec.mask)):
        step += _clause(i, clause, found)
    # of the ragged tile at the end of the looped axis some positions do not exist
    step += ["some = some & there", f"every = every & some & ((number + 1) * looped <= {'N' if over == 'k' else 'T'})"]
    for name, chosen in zip(OUT, ("every", "some & (every == 0)"), strict=True):
        count = f"{name.lower()}_count"
        step += [f"chosen = ({chosen}).to(tl.int32)", f"place = {count} + tl.cumsum(chosen, 0) - 1"]
        step += [f"tl.store({name} + row * width + place, number, mask=chosen > 0)", f"{count} += tl.sum(chosen, 0)"]
    body += [f"for chunk in range(0, (width + {wide - 1}) // {wide}):", *indent(step)]
    body += [f"tl.store({name}_COUNTS + row, {name.lower()}_count)" for name in OUT]
    return kernel(spec, list_arguments(spec), body, "Lists of the tiles to visit for every fixed tile.")


def _queries(number: str, size: str) -> list[str]:
    return [f"q0 = {number} * {size} + offset", f"q1 = tl.minimum({number} * {size} + {size}, T) + offset"]


def _keys(number: str, size: str) -> list[str]:
    return [f"k0 = {number} * {size}", f"k1 = tl.minimum(k0 + {size}, N)"]


def _texts(prefix: str, roots: Iterable[Int]) -> tuple[list[str], list[str]]:
    return program(list(roots), "triton", prefix)


def _looks(j: int, entry: At) -> list[str]:
    """The least and the largest entry that each pair of tiles reads: low<j>, high<j>."""
    table, reach = str(entry.args[0]), spans(entry)
    lines, texts = _texts(f"i{j}_", (x for span in reach for x in (span.low, span.high)))
    for axis in range(len(reach)):
        for name, text in zip(("from", "to"), texts[2 * axis : 2 * axis + 2], strict=True):
            lines.append(f"{name}_{j}_{axis} = tl.minimum(tl.maximum({text}, 0), {table}_n{axis} - 1)")
    *others, last = varying(entry) or (len(reach) - 1,)
    lines += [f"reach = to_{j}_{last} - from_{j}_{last} + 1", "level = reach * 0"]
    lines += [f"for i in range(1, levels_{j}):", "    level += (reach >= (1 << i)).to(tl.int32)"]
    lines += [f"late = to_{j}_{last} + 1 - (1 << level)  # two runs that overlap cover any span"]
    lines += [f"low{j} = number * 0 + {FAR}", f"high{j} = number * 0 - {FAR}"]
    index = {axis: f"from_{j}_{axis}" for axis in range(len(reach))}
    index |= {axis: f"tl.minimum(from_{j}_{axis} + s_{axis}, to_{j}_{axis})" for axis in others}
    look: list[str] = []
    for place in (f"from_{j}_{last}", "late"):
        where = "level.to(tl.int64)"
        for axis in range(len(reach)):
            where = f"({where} * {table}_n{axis} + {place if axis == last else index[axis]})"
        look += [f"place = {where}", f"low{j} = tl.minimum(low{j}, tl.load(least_{j} + place))"]
        look += [f"high{j} = tl.maximum(high{j}, tl.load(largest_{j} + place))"]
    for axis in reversed(others):
        look = [f"for s_{axis} in range(0, steps_{j}_{axis}):", *indent(look)]
    return lines + look


def _clause(i: int, clause: Clause, found: Sequence[At]) -> list[str]:
    """What one conjunction visits, and what it allows wholly."""
    solved, read = bounds(clause)
    run = run_of(solved)
    lines, (begin, end, inner, past) = _texts(f"c{i}_", (*run.visit, *run.every))
    lines += [f"may = ({begin} <= key_tile) & (key_tile < {end})", f"must = ({inner} <= k0) & (k1 <= {past})"]
    for n, atom in enumerate(read):
        span = form(atom, found)
        if span is None:
            lines.append("must = must & (k0 < 0)")
            continue
        more, (low, high) = _texts(f"a{i}_{n}_", (span.low, span.high))
        lines += [*more, f"may = may & ({high} >= 0)", f"must = must & ({low} >= 0)"]
    return [*lines, "some = some | may", "every = every | must"]
