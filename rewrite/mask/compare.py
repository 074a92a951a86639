"""Whether one mask allows no pair that another forbids, at whatever length.

Proven by elimination: the predicate "first, and not second" is a disjunction of systems of linear inequalities in
positions, quotients and table entries; if none has a solution, the first implies the second. Refuted by a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy

from rewrite.mask.clauses import Clause, clauses, linear
from rewrite.mask.spell import Tables, holds
from rewrite.mask.terms import FIRST, PAST, SYMBOLS, At, Div, Mod, b, div, divided, h, offset, q

if TYPE_CHECKING:
    from rewrite.mask.algebra import Mask

MOST = 3000
"""Inequalities of a system; more are given up."""
Row = tuple[tuple[tuple[Any, int], ...], int]
"""Weights of variables and a constant: their sum is at least 0."""


def implies(first: Mask, second: Mask) -> bool | None:
    """True: every pair of positions from 0 that `first` allows `second` allows. None: not decided."""
    from rewrite.mask.algebra import apart

    second = apart(first, second)
    tables = {**first.tables, **second.tables}
    keep = sympy.And(first.keep, sympy.Not(second.keep))
    if all(_empty(clause, tables) for clause in clauses(keep)):
        return True
    return False if _witness(keep, tables) else None


def equals(first: Mask, second: Mask) -> bool | None:
    """Whether both allow the same pairs at every length; None: not decided."""
    there, back = implies(first, second), implies(second, first)
    if there is False or back is False:
        return False
    return True if there and back else None


def _empty(clause: Clause, tables: Tables) -> bool:
    """Whether the clause's inequalities are known to have no solution."""
    rows: list[dict[Any, int]] = []
    variables: set[Any] = set()
    for atom in clause.atoms:
        rows.append(_row(dict(atom.weights), atom.constant, rows, variables, tables))
    for symbol in variables & set(SYMBOLS.values()):
        rows.append({symbol: 1})
    if offset in variables:
        rows.append({q: 1, offset: -1})
    found = {_tight(row) for row in rows}
    return _eliminated(found)


def _row(weights: dict[Any, int], constant: int, rows: list[dict[Any, int]], seen: set[Any], tables: Tables) -> Any:
    """A form over variables (1: the constant); what is known of new variables goes to `rows`."""
    out: dict[Any, int] = {1: constant}
    for term, weight in weights.items():
        if isinstance(term, Mod):
            what, c = divided(term)
            parts = {div(what, c): -c * weight}
            inner, number = linear(what)
            out[1] += int(number) * weight
            for t, w in inner.items():
                parts[t] = parts.get(t, 0) + int(w) * weight
            for t, w in _row(parts, 0, rows, seen, tables).items():
                out[t] = out.get(t, 0) + w
            continue
        out[term] = out.get(term, 0) + weight
        if term not in seen:
            seen.add(term)
            _learn(term, rows, seen, tables)
    return out


def _learn(term: Any, rows: list[dict[Any, int]], seen: set[Any], tables: Tables) -> None:
    if isinstance(term, Div):
        what, c = divided(term)
        inner, number = linear(what)
        weights = {t: int(w) for t, w in inner.items()}
        # c * term <= what <= c * term + c - 1
        low = _row({**weights, term: weights.get(term, 0) - c}, int(number), rows, seen, tables)
        rows += [low, {**{t: -w for t, w in low.items()}, 1: c - 1 - low[1]}]
    if isinstance(term, At):
        name = str(term.args[0])
        data = tables[name]
        if data.size:
            rows += [{term: 1, 1: -int(data.min())}, {term: -1, 1: int(data.max())}]
        position = term.args[-1]
        if name.endswith((FIRST, PAST)) and isinstance(position, sympy.Symbol):
            seen.add(position)
            rows.append({position: 1, term: -1} if name.endswith(FIRST) else {term: 1, position: -1, 1: -1})


def _tight(row: Mapping[Any, int]) -> Row:
    """Divided by the common factor, the constant rounded down: the variables are integers."""
    kept = {t: w for t, w in row.items() if t != 1 and w}
    common = gcd(*kept.values()) if kept else 1
    order = sorted(kept, key=str)
    return tuple((t, kept[t] // common) for t in order), row.get(1, 0) // common


def _eliminated(rows: Iterable[Row]) -> bool:
    """Fourier and Motzkin: whether combining the rows until no variable is left gives a contradiction."""
    found = _tightest(rows)
    while found:
        if any(not weights and constant < 0 for weights, constant in found.items()):
            return True
        sides: dict[Any, tuple[list[Row], list[Row]]] = {}
        for row in found.items():
            for variable, weight in row[0]:
                sides.setdefault(variable, ([], []))[weight < 0].append(row)
        if not sides:
            return False
        chosen = min(sorted(sides, key=str), key=lambda v: _cost(v, *sides[v]))
        up, down = sides[chosen]
        rest = [row for row in found.items() if all(v != chosen for v, _ in row[0])]
        if len(up) * len(down) + len(rest) > MOST:
            return False
        found = _tightest([*rest, *(_without(chosen, a, b) for a in up for b in down)])
    return False


def _cost(variable: Any, up: list[Row], down: list[Row]) -> tuple[bool, int]:
    """Variables that are never multiplied first: no integer is lost where they are eliminated."""
    return any(abs(dict(weights)[variable]) != 1 for weights, _ in (*up, *down)), len(up) * len(down)


def _without(variable: Any, a: Row, b: Row) -> Row:
    wa, wb = dict(a[0]), dict(b[0])
    up, down = wa[variable], -wb[variable]
    joint = {t: down * w for t, w in wa.items()}
    for t, w in wb.items():
        joint[t] = joint.get(t, 0) + up * w
    return _tight({**joint, 1: down * a[1] + up * b[1]})


def _tightest(rows: Iterable[Row]) -> dict[tuple[tuple[Any, int], ...], int]:
    found: dict[tuple[tuple[Any, int], ...], int] = {}
    for weights, constant in rows:
        if weights or constant < 0:
            found[weights] = min(found.get(weights, constant), constant)
    return found


def _witness(keep: Any, tables: Tables) -> bool:
    """A pair at small positions, or near what the mask's own numbers add up to."""
    numbers = {abs(int(x)) for x in keep.atoms(sympy.Integer)} | {0, 1}
    numbers |= {int(x) for table in tables.values() for x in np.unique(table)[:8] if 0 <= x < 2**29}
    near = sorted({x + y + d for x in numbers for y in numbers for d in (-1, 0, 1)} | set(range(48)))
    at = np.array([x for x in near if 0 <= x][:600])
    heads = range(8 if h in keep.free_symbols else 1)
    rows = range(4 if b in keep.free_symbols else 1)
    starts = (0, 1, 7) if offset in keep.free_symbols else (0,)
    for head in heads:
        for row in rows:
            for start in starts:
                positions = at[at >= start]
                if holds(keep, tables, positions[:, None], at[None], head, row, start).any():
                    return True
    return False
