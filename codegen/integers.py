"""Integer expressions of loop bounds: built with what is known of their signs, printed as Python and as Triton.

Triton's `//` and `%` truncate toward zero where Python's round down. So every expression carries its least value where
one is known, a division of what cannot be negative is printed as it is, and any other in a form that needs no sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal
from weakref import WeakValueDictionary

Dialect = Literal["python", "triton"]
LEAST = {"N": 0, "T": 0, "tile": 1, "b": 0, "h": 0, "k0": 0, "k1": 0}
"""Names that are known to be no less; q0, q1 and offset are negative where there are more queries than keys."""

ORDERED = (("q0", "q1"), ("k0", "k1"))
"""Pairs of names of which the first is known to be less."""


class Int:
    """One node; equal nodes are one object. Build it with the functions of this file."""

    __slots__ = ("__weakref__", "args", "least", "op")
    op: str
    args: tuple[Any, ...]
    least: int | None

    def __repr__(self) -> str:
        return self.text()

    def text(self, dialect: Dialect = "python") -> str:
        """The expression in one piece; `printed.program` names what is used more than once."""
        from codegen.printed import Printer

        return Printer(dialect, {}).text(self)

    @property
    def value(self) -> int | None:
        """The number, where it is one."""
        return self.args[0] if self.op == "number" else None


_NODES: WeakValueDictionary[tuple[Any, ...], Int] = WeakValueDictionary()


def _node(op: str, args: tuple[Any, ...], least: int | None) -> Int:
    found = _NODES.get((op, args))
    if found is None:
        found = Int()
        found.op, found.args, found.least = op, args, least
        _NODES[op, args] = found
    return found


def number(n: int) -> Int:
    """A constant."""
    return _node("number", (int(n),), int(n))


def name(text: str) -> Int:
    """A variable."""
    return _node("name", (text,), LEAST.get(text))


_PAIRS = tuple((name(low), name(high)) for low, high in ORDERED)
ZERO, ONE = number(0), number(1)
TRUE, FALSE = ONE, ZERO


def linear(x: Int) -> tuple[int, dict[Int, int]]:
    """Constant, and how often each other node is taken."""
    if x.op == "number":
        return x.args[0], {}
    if x.op == "sum":
        return x.args[0], dict(x.args[1])
    return 0, {x: 1}


def weighted(parts: Iterable[tuple[int, Int]], constant: int = 0) -> Int:
    """constant + sum of weight * part."""
    terms: dict[Int, int] = {}
    for weight, part in parts:
        inner, inside = linear(part)
        constant += weight * inner
        for node, times in inside.items():
            terms[node] = terms.get(node, 0) + weight * times
    terms = {node: times for node, times in terms.items() if times}
    if not terms:
        return number(constant)
    if constant == 0 and list(terms.values()) == [1]:
        return next(iter(terms))
    return _node("sum", (constant, tuple(terms.items())), _least(constant, terms))


def _least(constant: int, terms: dict[Int, int]) -> int | None:
    """What a sum is at least, from what its terms are; a pair of which one name is larger counts together."""
    for low, high in _PAIRS:
        if low in terms and high in terms and terms[high] > 0 > terms[low]:
            shared = min(terms[high], -terms[low])
            terms = {**terms, low: terms[low] + shared, high: terms[high] - shared}
            constant += shared
    for node, times in terms.items():
        if times:
            if times < 0 or node.least is None:
                return None
            constant += times * node.least
    return constant


def add(*parts: Int | int) -> Int:
    """The sum."""
    return weighted((1, number(x) if isinstance(x, int) else x) for x in parts)


def minus(a: Int, b: Int | int) -> Int:
    """a - b."""
    return weighted([(1, a), (-1, number(b) if isinstance(b, int) else b)])


def times(a: int, x: Int) -> Int:
    """A number of times x."""
    return weighted([(a, x)])


def product(a: Int, b: Int) -> Int:
    """a * b; counts of tiles, never positions, which may not fit 32 bits."""
    if a.value is not None or b.value is not None:
        return times(a.value, b) if a.value is not None else times(b.args[0], a)
    known = a.least is not None and b.least is not None and min(a.least, b.least) >= 0
    return _node("times", (a, b), 0 if known else None)


def maximum(*parts: Int) -> Int:
    """The largest."""
    return _extreme("max", parts)


def minimum(*parts: Int) -> Int:
    """The smallest."""
    return _extreme("min", parts)


def _extreme(op: str, parts: Sequence[Int]) -> Int:
    """Without what another part surely exceeds. Parts are kept whole, so that what is sorted twice is computed once."""
    kept: list[Int] = []
    for x in dict.fromkeys(parts):
        worse = (lambda a, b: surely(a, b)) if op == "max" else (lambda a, b: surely(b, a))
        if not any(worse(x, other) for other in kept):
            kept = [other for other in kept if not worse(other, x)] + [x]
    if len(kept) == 1:
        return kept[0]
    known = [x.least for x in kept if x.least is not None]
    least = max(known, default=None) if op == "max" else min(known) if len(known) == len(kept) else None
    return _node(op, tuple(kept), least)


_NESTED = ("max", "min", "floor")


def _gap(a: Int, b: Int) -> int | None:
    """What b - a is at least, from their terms."""
    if a.op == "number":
        return None if b.least is None else b.least - a.args[0]
    if a.op != "sum" and b.op != "sum" and not (a.op == b.op == "name"):
        return None
    constant, terms = linear(b)
    inner, inside = linear(a)
    for node, times in inside.items():
        terms[node] = terms.get(node, 0) - times
    return _least(constant - inner, terms)


@lru_cache(maxsize=1 << 16)
def surely(a: Int, b: Int, depth: int = 3) -> bool:
    """Whether a <= b is known without numbers. False: it is not known."""
    if a is b:
        return True
    gap = _gap(a, b)
    if gap is not None or depth == 0 or not (a.op in _NESTED or b.op in _NESTED):
        return gap is not None and gap >= 0
    return (
        (b.op == "max" and any(surely(a, x, depth - 1) for x in b.args))
        or (a.op == "min" and any(surely(x, b, depth - 1) for x in a.args))
        or (b.op == "min" and all(surely(a, x, depth - 1) for x in b.args))
        or (a.op == "max" and all(surely(x, b, depth - 1) for x in a.args))
        or (a.op == b.op == "floor" and a.args[1] is b.args[1] and surely(a.args[0], b.args[0], depth - 1))
    )


def floor(x: Int, by: Int | int) -> Int:
    """x // by, rounded down; `by` is positive."""
    by = number(by) if isinstance(by, int) else by
    if by.value is None:
        if x is ZERO:
            return ZERO
        return _node("floor", (x, by), 0 if x.least is not None and x.least >= 0 else None)
    c = by.args[0]
    constant, terms = linear(x)
    whole = {node: w // c for node, w in terms.items() if w % c == 0}
    rest = weighted(((w, node) for node, w in terms.items() if w % c), constant % c)
    least = None if rest.least is None else rest.least // c
    inner = number(rest.args[0] // c) if rest.op == "number" else _node("floor", (rest, by), least)
    inner = rest if c == 1 else inner
    return weighted([*((w, node) for node, w in whole.items()), (1, inner)], constant // c)


def ceil(x: Int, by: Int | int) -> Int:
    """x / by, rounded up; `by` is positive."""
    by = number(by) if isinstance(by, int) else by
    return ZERO if x is ZERO else floor(add(x, by, -1), by)


def rest(x: Int, by: Int | int) -> Int:
    """x % by, from 0 to by - 1."""
    by = number(by) if isinstance(by, int) else by
    if by is ONE:
        return ZERO
    if x.value is not None and by.value is not None:
        return number(x.value % by.value)
    return _node("rest", (x, by), 0)


def load(table: str, index: Sequence[Int]) -> Int:
    """The entry of a table nearest to the index."""
    return _node("load", (table, *index), None)


def at_most(a: Int, b: Int) -> Int:
    """Whether a <= b."""
    gap = minus(b, a)
    if surely(a, b):
        return TRUE
    if gap.value is not None:
        return FALSE
    return _node("le", (a, b), 0)


def less(a: Int, b: Int) -> Int:
    """Whether a < b."""
    gap = minus(b, a)
    if surely(add(a, 1), b):
        return TRUE
    if gap.value is not None:
        return FALSE
    return _node("lt", (a, b), 0)


def both(*parts: Int) -> Int:
    """Whether all hold."""
    kept = tuple(dict.fromkeys(inner for x in parts for inner in (x.args if x.op == "and" else (x,)) if x is not TRUE))
    if FALSE in kept:
        return FALSE
    return TRUE if not kept else kept[0] if len(kept) == 1 else _node("and", kept, 0)


def where(condition: Int, yes: Int, no: Int) -> Int:
    """`yes` where the condition holds, else `no`."""
    if condition is TRUE or yes is no:
        return yes
    if condition is FALSE:
        return no
    known = yes.least is not None and no.least is not None
    least = min(yes.least, no.least) if known and yes.least is not None and no.least is not None else None
    return _node("where", (condition, yes, no), least)


def children(x: Int) -> tuple[Int, ...]:
    """What a node is made of."""
    if x.op == "sum":
        return tuple(node for node, _ in x.args[1])
    return tuple(a for a in x.args if isinstance(a, Int))
