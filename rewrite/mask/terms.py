"""What a mask's predicate is made of: integers over row b, head h, query q, key k, their own `//` and `%`, and tables.

Sympy is told of division and remainder as two functions that it knows nothing about: its own floor is rewritten behind
one's back (`floor(q/4) <= 2` becomes `q/4 < 3`), and what is then left no longer says what was asked.
"""

from __future__ import annotations

import keyword
import re
from typing import Any

import sympy

b, h, q, k = sympy.symbols("b h q k", integer=True)
offset = sympy.Symbol("offset", integer=True)
"""Position of the first query: keys - queries. Only a mask that is aligned at the first token needs it."""
SYMBOLS = {x.name: x for x in (b, h, q, k, offset)}
RESERVED = re.compile(r"[bhqk]|[qk][01]|[NT]|tile|offset|load|min|max|where|tl|abs|tables|(x|low|high|entry)\d+")
"""Names that the texts of loops and predicates use."""
FIRST, PAST = "_first", "_past"
"""Endings of a pair of tables that hold spans of positions: at each position, where its span begins and one past its
end. Either one is the other's inverse, which is how loops over queries and over keys are both solved by two loads."""
FAR = 2**30
"""Farther than any position, with room for sums in 32 bits."""


class Div(sympy.Function):
    """Floor division by a positive integer."""

    is_integer = True

    @classmethod
    def eval(cls, *args: Any) -> Any:
        """A number where both are, else left alone."""
        x, c = args
        if isinstance(x, sympy.Integer) and isinstance(c, sympy.Integer):
            return sympy.Integer(int(x) // int(c))
        return x if c == 1 else None


class Mod(sympy.Function):
    """Remainder of the floor division by a positive integer, 0 to c - 1."""

    is_integer = True

    @classmethod
    def eval(cls, *args: Any) -> Any:
        """A number where both are, else left alone."""
        x, c = args
        if isinstance(x, sympy.Integer) and isinstance(c, sympy.Integer):
            return sympy.Integer(int(x) % int(c))
        return sympy.Integer(0) if c == 1 else None


class At(sympy.Function):
    """The entry of a table: its name and one index for each axis. An index outside reads the nearest entry."""

    is_integer = True

    @classmethod
    def eval(cls, *args: Any) -> Any:
        """Never a number: what the table holds is not part of the predicate."""
        return None


class Term:
    """An integer expression as a user's predicate sees it: + - * // % abs and comparisons, which give predicates that
    take & | ~."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __add__(self, other: Term | int) -> Term:
        return Term(self.value + _raw(other))

    __radd__ = __add__

    def __sub__(self, other: Term | int) -> Term:
        return Term(self.value - _raw(other))

    def __rsub__(self, other: Term | int) -> Term:
        return Term(_raw(other) - self.value)

    def __mul__(self, other: Term | int) -> Term:
        return Term(self.value * _raw(other))

    __rmul__ = __mul__

    def __neg__(self) -> Term:
        return Term(-self.value)

    def __abs__(self) -> Term:
        return Term(sympy.Abs(self.value))

    def __floordiv__(self, other: int) -> Term:
        return Term(Div(self.value, _divisor(other)))

    def __mod__(self, other: int) -> Term:
        return Term(Mod(self.value, _divisor(other)))

    def __lt__(self, other: Term | int) -> Any:
        return compared(sympy.Lt, self.value, _raw(other))

    def __le__(self, other: Term | int) -> Any:
        return compared(sympy.Le, self.value, _raw(other))

    def __gt__(self, other: Term | int) -> Any:
        return compared(sympy.Gt, self.value, _raw(other))

    def __ge__(self, other: Term | int) -> Any:
        return compared(sympy.Ge, self.value, _raw(other))

    def __eq__(self, other: object) -> Any:  # type: ignore[override]
        return compared(sympy.Eq, self.value, _raw(other))

    def __ne__(self, other: object) -> Any:  # type: ignore[override]
        return compared(sympy.Ne, self.value, _raw(other))

    def __hash__(self) -> int:
        return hash(self.value)

    def __bool__(self) -> bool:
        raise TypeError(f"{self.value} has no truth value while the mask is read: compare it, and join with & | ~")

    def __repr__(self) -> str:
        return str(self.value)


def at(table: str, *index: Term | int) -> Term:
    """Entry of a mask's table: `at("width", h)`."""
    if not table.isidentifier() or keyword.iskeyword(table) or RESERVED.fullmatch(table):
        raise ValueError(f"a table is named like a variable that kernels do not have themselves, and {table!r} is not")
    return Term(At(sympy.Symbol(table), *map(_raw, index)))


def compared(kind: Any, left: Any, right: Any) -> Any:
    """A comparison as it was written: sympy is not asked what it knows of its sides, which takes it milliseconds."""
    known = isinstance(left, sympy.Integer) and isinstance(right, sympy.Integer)
    return kind(left, right) if known else kind(left, right, evaluate=False)


def div(x: Any, c: int) -> Any:
    """`Div` over sympy expressions."""
    return Div(x, sympy.Integer(c))


def divided(x: Any) -> tuple[Any, int]:
    """What a `Div` or `Mod` divides, and by what."""
    return x.args[0], int(x.args[1])


def mod(x: Any, c: int) -> Any:
    """`Mod` over sympy expressions."""
    return Mod(x, sympy.Integer(c))


def _raw(x: object) -> Any:
    if isinstance(x, Term):
        return x.value
    if isinstance(x, sympy.Expr) and x.is_integer:
        return x
    if isinstance(x, bool) or not hasattr(x, "__index__"):
        raise TypeError(f"a mask is made of integers, and {x!r} is none")
    return sympy.Integer(int(x))  # type: ignore[call-overload]


def _divisor(c: object) -> Any:
    if isinstance(c, Term) or _raw(c) <= 0:
        raise ValueError(f"positions are divided by a positive integer, and {c!r} is none")
    return _raw(c)
