"""A predicate as a disjunction of conjunctions of `form >= 0`, a form being a number plus numbers of terms.

Positions are integers, so what is strict is one less, but only once denominators are gone: q/4 < 3 is 4 * 3 - q > 0,
which is 11 - q >= 0. A term is a symbol, a `Div`, `Mod` or `At`, or whatever else stands there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from math import gcd, lcm
from typing import Any

import sympy

MOST = 64
"""Conjunctions of a disjunction; beyond it, parts of conjunctions are left out and the clause says so."""


@dataclass(frozen=True)
class Form:
    """constant + sum of weights[t] * t."""

    constant: int
    weights: tuple[tuple[Any, int], ...]

    @cached_property
    def terms(self) -> dict[Any, int]:
        """Weight of each term."""
        return dict(self.weights)

    def without(self, term: Any) -> Form:
        """All but one term."""
        return Form(self.constant, tuple(x for x in self.weights if x[0] != term))

    def has(self, symbol: Any) -> bool:
        """Whether the symbol stands anywhere in it."""
        return any(symbol in symbols(t) for t, _ in self.weights)


@dataclass(frozen=True)
class Clause:
    """All of `atoms` are at least 0. Not `whole`: something was left out, so it holds more often than the predicate."""

    atoms: tuple[Form, ...]
    whole: bool = True


def form(weights: Mapping[Any, int], constant: int) -> Form:
    """In one order, with a common factor divided out: over integers 4 q - 7 >= 0 is q - 2 >= 0."""
    kept = {t: w for t, w in weights.items() if w}
    common = gcd(*kept.values()) if kept else 1
    order = sorted(kept, key=_order)
    return Form(constant // common, tuple((t, kept[t] // common) for t in order))


@lru_cache(maxsize=65536)
def symbols(term: Any) -> frozenset[Any]:
    """What stands in a term; sympy collects it anew at every question."""
    return frozenset(term.free_symbols)


@lru_cache(maxsize=65536)
def _order(term: Any) -> tuple[int, str]:
    text = str(term)
    return len(text), text


@lru_cache(maxsize=4096)
def clauses(keep: Any) -> tuple[Clause, ...]:
    """The predicate, none for what never holds. Equal predicates give equal clauses in equal order."""
    return _pruned(_dnf(keep, False))


def linear(x: Any) -> tuple[dict[Any, Fraction], Fraction]:
    """Weights and constant of an integer expression."""
    weights: dict[Any, Fraction] = {}
    constant = _collect(x, Fraction(1), weights)
    return weights, constant


def _collect(x: Any, times: Fraction, weights: dict[Any, Fraction]) -> Fraction:
    if x.is_Rational:
        return times * Fraction(int(x.p), int(x.q))
    if isinstance(x, sympy.Add):
        return sum((_collect(part, times, weights) for part in x.args), Fraction(0))
    if isinstance(x, sympy.Mul):
        factor, other = _coefficient(x)
        if factor != 1 and factor.is_Rational:
            return _collect(other, times * Fraction(int(factor.p), int(factor.q)), weights)
        spread = sympy.expand(x)
        if spread != x:
            return _collect(spread, times, weights)
    weights[x] = weights.get(x, Fraction(0)) + times
    return Fraction(0)


def _coefficient(x: Any) -> tuple[Any, Any]:
    return x.as_coeff_Mul()


def _atom(left: Any, right: Any, strict: bool) -> list[Clause]:
    """left >= right, or left > right."""
    weights, constant = linear(left)
    constant += _collect(right, Fraction(-1), weights)
    scale = lcm(constant.denominator, *(w.denominator for w in weights.values()))
    whole = {t: int(w * scale) for t, w in weights.items()}
    return _unfolded(whole, int(constant * scale) - int(strict))


def _unfolded(weights: dict[Any, int], constant: int) -> list[Clause]:
    """Absolute values as what they are the larger of: at least 0 if either is, or both where it is taken away."""
    term = next((t for t in weights if isinstance(t, sympy.Abs)), None)
    if term is None:
        made = form(weights, constant)
        if not made.weights:
            return [Clause(())] if made.constant >= 0 else []
        return [Clause((made,))]
    weight = weights.pop(term)
    sides: list[list[Clause]] = []
    inner, number = linear(term.args[0])
    for sign in (1, -1):
        side = dict(weights)
        for t, w in inner.items():
            side[t] = side.get(t, 0) + sign * weight * int(w)
        sides.append(_unfolded(side, constant + sign * weight * int(number)))
    return sides[0] + sides[1] if weight > 0 else _product(sides)


def _dnf(keep: Any, no: bool) -> list[Clause]:
    if isinstance(keep, sympy.Not):
        return _dnf(keep.args[0], not no)
    if keep in (sympy.true, sympy.false):
        return [Clause(())] if bool(keep) != no else []
    if isinstance(keep, (sympy.And, sympy.Or)):
        parts = [_dnf(x, no) for x in keep.args]
        if isinstance(keep, sympy.And) != no:
            return _product(parts)
        return [c for part in parts for c in part]
    left, right = keep.args
    if isinstance(keep, (sympy.Eq, sympy.Ne)):
        if isinstance(keep, sympy.Eq) != no:
            return _product([_atom(left, right, False), _atom(right, left, False)])
        return _atom(left, right, True) + _atom(right, left, True)
    if isinstance(keep, (sympy.Lt, sympy.Le)):
        left, right = right, left
    strict = isinstance(keep, (sympy.Lt, sympy.Gt))
    return _atom(right, left, not strict) if no else _atom(left, right, strict)


def _product(parts: Sequence[list[Clause]]) -> list[Clause]:
    """One of each part; the widest parts are left out where there would be too many."""
    found = [Clause(())]
    for part in sorted(parts, key=len):
        if len(found) * len(part) > MOST:
            return [Clause(c.atoms, False) for c in found]
        found = [_simple(a, b) for a in found for b in part]
        found = [c for c in found if c is not None]  # type: ignore[misc]
    return found


def _simple(a: Clause, b: Clause) -> Clause | None:
    """Both at once, the tightest of like forms; None where two of them contradict each other."""
    tight: dict[tuple[tuple[Any, int], ...], int] = {}
    for atom in (*a.atoms, *b.atoms):
        tight[atom.weights] = min(tight.get(atom.weights, atom.constant), atom.constant)
    for weights, constant in tight.items():
        against = tuple((t, -w) for t, w in weights)
        if constant + tight.get(against, -constant) < 0:
            return None
    return Clause(tuple(Form(c, w) for w, c in tight.items()), a.whole and b.whole)


def _pruned(found: list[Clause]) -> tuple[Clause, ...]:
    """Without what is in another clause."""
    kept: list[Clause] = []
    for clause in sorted(found, key=lambda c: len(c.atoms)):
        if not any(_within(clause, other) for other in kept):
            kept.append(clause)
    return tuple(sorted(kept, key=lambda c: [(x.constant, [(_order(t), w) for t, w in x.weights]) for x in c.atoms]))


def _within(inner: Clause, outer: Clause) -> bool:
    have = {atom.weights: atom.constant for atom in inner.atoms}
    return outer.whole and all(have.get(x.weights, x.constant + 1) <= x.constant for x in outer.atoms)
