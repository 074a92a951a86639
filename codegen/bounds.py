"""From one conjunction to bounds on the looped position, as least and largest over a tile of the other position.

A bound grows or falls with the fixed position as far as its terms agree on it; then its extremes stand at the tile's
ends. Where they disagree each term gives its own extreme, which is sound and wider. What cannot be solved bounds
nothing that may be read, and leaves nothing that all may read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from codegen.integers import (
    Int,
    add,
    at_most,
    ceil,
    floor,
    load,
    maximum,
    minimum,
    name,
    number,
    rest,
    times,
    where,
)
from rewrite.mask.clauses import Clause, linear, symbols
from rewrite.mask.terms import FIRST, PAST, At, Div, Mod, divided


@dataclass(frozen=True)
class Span:
    """The least and the largest that an expression becomes over the tile."""

    low: Int
    high: Int

    def plus(self, other: Span) -> Span:
        """Sum."""
        return Span(add(self.low, other.low), add(self.high, other.high))

    def times(self, a: int) -> Span:
        """A multiple."""
        low, high = times(a, self.low), times(a, self.high)
        return Span(low, high) if a > 0 else Span(high, low)

    def ceil(self, by: int) -> Span:
        """Divided, rounded up."""
        return Span(ceil(self.low, by), ceil(self.high, by))

    def floor(self, by: int) -> Span:
        """Divided, rounded down."""
        return Span(floor(self.low, by), floor(self.high, by))


def point(x: int | Int) -> Span:
    """What is the same over the whole tile."""
    x = number(x) if isinstance(x, int) else x
    return Span(x, x)


Range = dict[Any, Span]
"""Symbols that vary over the tile."""


def span(x: Any, over: Range) -> Span | None:
    """Extremes of an integer expression; None where nothing is known."""
    if isinstance(x, sympy.Integer):
        return point(int(x))
    if isinstance(x, sympy.Symbol):
        return over.get(x, point(name(x.name)))
    if isinstance(x, (Div, Mod)):
        what, c = divided(x)
        inside = span(what, over)
        if inside is None:
            return None
        return inside.floor(c) if isinstance(x, Div) else _remainder(inside, c)
    if isinstance(x, At):
        return _entry(str(x.args[0]), list(x.args[1:]), over)
    if isinstance(x, (sympy.Add, sympy.Mul)):
        weights, constant = linear(x)
        return None if x in weights else spread(((t, int(w)) for t, w in weights.items()), int(constant), over)
    return None


def spread(weights: Iterable[tuple[Any, int]], constant: int, over: Range) -> Span | None:
    """Extremes of a linear form."""
    total = point(constant)
    for term, weight in weights:
        part = span(term, over)
        if part is None:
            return None
        total = total.plus(part.times(weight))
    return total


def _remainder(x: Span, c: int) -> Span:
    """Where the whole tile lies in one period, the ends' own remainders; else anything."""
    if x.low is x.high:
        return point(rest(x.low, c))
    one = at_most(floor(x.high, c), floor(x.low, c))
    return Span(where(one, rest(x.low, c), number(0)), where(one, rest(x.high, c), number(c - 1)))


def _entry(table: str, at: Sequence[Any], over: Range) -> Span | None:
    """Entries grow with the position only in tables of spans; any other is known where its index does not vary."""
    index = [span(i, over) for i in at]
    known = [i for i in index if i is not None]
    if len(known) < len(index) or any(i.low is not i.high for i in known[:-1]):
        return None
    if known[-1].low is not known[-1].high and not table.endswith((FIRST, PAST)):
        return None
    lead = [i.low for i in known[:-1]]
    return Span(load(table, [*lead, known[-1].low]), load(table, [*lead, known[-1].high]))


@dataclass(frozen=True)
class Period:
    """x is at centre + u, ..., centre + v, modulo `size`; the ends vary with the fixed position."""

    size: int
    centre: Span
    u: Span
    v: Span


@dataclass(frozen=True)
class Solved:
    """One conjunction solved for x: bounds on it (inclusive) and its period.

    `known`: nothing was left out, so what all of this allows is allowed.
    """

    lower: tuple[Span, ...]
    upper: tuple[Span, ...]
    period: Period | None
    known: bool


def solve(clause: Clause, x: Any, over: Range) -> Solved:
    """Sort the atoms of a conjunction by what they say of x; those without x say nothing here."""
    lower: list[Span] = []
    upper: list[Span] = []
    periods: dict[Any, tuple[list[Span], list[Span]]] = {}
    known = clause.whole
    for atom in clause.atoms:
        terms = [t for t, _ in atom.weights if x in symbols(t)]
        if not terms:
            continue
        other = spread(atom.without(terms[0]).weights, atom.constant, over) if len(terms) == 1 else None
        if other is None:
            known = False
            continue
        side, bound = _divided(atom.terms[terms[0]], point(0), other)
        if isinstance(terms[0], Mod):
            periods.setdefault(terms[0], ([], []))[side].append(bound)
        else:
            reached = _bound(terms[0], side, bound, x, over)
            known = known and reached is not None
            if reached is not None:
                (lower, upper)[reached[0]].append(reached[1])
    made = [_period(term, *ends, x, over) for term, ends in periods.items()]
    found = [p for p in made if p is not None]
    # of several periods the longest is a loop's; the others are left to the predicate
    best = max(found, key=lambda p: p.size, default=None)
    return Solved(tuple(lower), tuple(upper), best, known and len(made) == len(found) <= 1)


def _divided(a: int, least: Span, other: Span) -> tuple[int, Span]:
    """a * t + other >= least, as (0, t's lower bound) or (1, its upper bound)."""
    if a > 0:
        return 0, least.plus(other.times(-1)).ceil(a)
    return 1, other.plus(least.times(-1)).floor(-a)


def _bound(term: Any, side: int, bound: Span, x: Any, over: Range) -> tuple[int, Span] | None:
    """From a bound (0 lower, 1 upper) on a term to one on x inside it."""
    if term == x:
        return side, bound
    if isinstance(term, Div):
        what, c = divided(term)
        scaled = bound.times(c)
        return _inside(what, side, scaled if side == 0 else scaled.plus(point(c - 1)), x, over)
    if isinstance(term, At) and str(term.args[0]).endswith((FIRST, PAST)):
        return _inverse(term, side, bound, x, over)
    return None


def _inside(expression: Any, side: int, bound: Span, x: Any, over: Range) -> tuple[int, Span] | None:
    """A bound on a whole expression."""
    weights, constant = linear(expression)
    terms = [t for t in weights if x in symbols(t)]
    if len(terms) != 1:
        return None
    weight = int(weights.pop(terms[0]))
    other = spread(((t, int(w)) for t, w in weights.items()), int(constant), over)
    if other is None:
        return None
    sign = 1 if side == 0 else -1
    # an upper bound e <= d is -e >= -d
    turned, reached = _divided(sign * weight, bound.times(sign), other.times(sign))
    return _bound(terms[0], turned, reached, x, over)


def _inverse(term: At, side: int, bound: Span, x: Any, over: Range) -> tuple[int, Span] | None:
    """first[i] <= p is i < past[p], past[i] > p is i >= first[p]: each table of a span undoes the other."""
    table = str(term.args[0])
    stem, kind = (table.removesuffix(FIRST), FIRST) if table.endswith(FIRST) else (table.removesuffix(PAST), PAST)
    other = sympy.Symbol(stem + (PAST if kind == FIRST else FIRST))
    lead = [span(i, over) for i in term.args[1:-1]]
    if any(i is None or i.low is not i.high for i in lead):
        return None
    at = [i.low for i in lead if i is not None]
    shifted = bound if side == 1 else bound.plus(point(-1))
    reached = Span(load(str(other), [*at, shifted.low]), load(str(other), [*at, shifted.high]))
    return _inside(term.args[-1], side, reached if side == 0 else reached.plus(point(-1)), x, over)


def _period(term: Any, lower: Sequence[Span], upper: Sequence[Span], x: Any, over: Range) -> Period | None:
    """Bounds of a remainder as a window of x that comes again and again."""
    size = int(term.args[1])
    low = [point(0), *lower]
    high = [point(size - 1), *upper]
    u = Span(maximum(*(s.low for s in low)), maximum(*(s.high for s in low)))
    v = Span(minimum(*(s.low for s in high)), minimum(*(s.high for s in high)))
    centre, inner = point(0), term.args[0]
    while True:
        weights, constant = linear(inner)
        terms = [t for t in weights if x in symbols(t)]
        weight = int(weights.pop(terms[0])) if len(terms) == 1 else 0
        other = spread(((t, int(w)) for t, w in weights.items()), int(constant), over)
        if abs(weight) != 1 or other is None:
            return None
        # weight * t + other is at centre + [u, v]
        centre = centre.plus(other.times(-1)).times(weight)
        u, v = (u, v) if weight > 0 else (v.times(-1), u.times(-1))
        if terms[0] == x:
            return Period(size, centre, u, v)
        if not isinstance(terms[0], Div):
            return None
        inner, by = divided(terms[0])
        centre, u, v, size = centre.times(by), u.times(by), v.times(by).plus(point(by - 1)), size * by
