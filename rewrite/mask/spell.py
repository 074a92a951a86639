"""A predicate as text: as algebra to read, as Python over arrays, and whatever else a dialect spells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy

from rewrite.mask.terms import SYMBOLS, At, Div, Mod

BoolArray = npt.NDArray[np.bool_]
Tables = Mapping[str, npt.NDArray[Any]]
RELATIONS: tuple[tuple[Any, str, str], ...] = (
    (sympy.Le, "<=", ">"),
    (sympy.Lt, "<", ">="),
    (sympy.Ge, ">=", "<"),
    (sympy.Gt, ">", "<="),
    (sympy.Eq, "==", "!="),
    (sympy.Ne, "!=", "=="),
)


@dataclass(frozen=True)
class Dialect:
    """How a language writes division and remainder (`div`, `mod`: of what may be negative) and the entry of a table."""

    div: Callable[[str, int], str]
    mod: Callable[[str, int], str]
    load: Callable[[str, Sequence[str]], str]
    abs: str = "abs"
    plain: Callable[[Any], bool] = lambda _: False
    """Of which expressions `//` and `%` are right as they are."""


def _div(x: str, c: int) -> str:
    return f"{x} // {c}"


def _mod(x: str, c: int) -> str:
    return f"{x} % {c}"


ALGEBRA = Dialect(_div, _mod, lambda name, index: f"{name}[{', '.join(index)}]")
PYTHON = Dialect(_div, _mod, lambda name, index: f"load({', '.join([name, *index])})")
"""Over numbers, numpy arrays and torch tensors; `load(table, *index)` reads the nearest entry (see `nearest`)."""


def integer(x: Any, dialect: Dialect) -> str:
    """An integer expression, without brackets around it."""
    if isinstance(x, (sympy.Integer, sympy.Symbol)):
        return str(x)
    if isinstance(x, sympy.Add):
        terms = sorted(x.args, key=lambda t: (bool(t.could_extract_minus_sign()), bool(t.is_Integer)))
        text = integer(terms[0], dialect)
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            text += (" - " if minus else " + ") + integer(-term if minus else term, dialect)
        return text
    if isinstance(x, sympy.Mul):
        return (
            "*".join(_bracket(factor, dialect) for factor in x.args) if x.args[0] != -1 else "-" + _bracket(-x, dialect)
        )
    if isinstance(x, At):
        return dialect.load(str(x.args[0]), [integer(i, dialect) for i in x.args[1:]])
    if isinstance(x, sympy.Abs):
        return f"{dialect.abs}({integer(x.args[0], dialect)})"
    return _divided(x, dialect)


def _divided(x: Any, dialect: Dialect) -> str:
    if isinstance(x, (Div, Mod)) and isinstance(x.args[1], sympy.Integer):
        plain = dialect.plain(x.args[0])
        spelled = (_div if plain else dialect.div) if isinstance(x, Div) else (_mod if plain else dialect.mod)
        return spelled(_bracket(x.args[0], dialect), int(x.args[1]))
    raise ValueError(
        f"{x} is no integer expression of a mask: + - * by a number, // and % by a positive integer (`Div`, `Mod` of "
        "rewrite.mask, not sympy's floor and Mod), abs and tables are"
    )


def _bracket(x: Any, dialect: Dialect) -> str:
    text = integer(x, dialect)
    return text if isinstance(x, (sympy.Symbol, At, sympy.Abs)) or (x.is_Integer and x >= 0) else f"({text})"


def boolean(keep: Any, dialect: Dialect, no: bool = False) -> str:
    """A predicate (`no`: its negation). Negations go to the comparisons, for `~` of a Python bool is not its not."""
    if isinstance(keep, sympy.Not):
        return boolean(keep.args[0], dialect, not no)
    if keep in (sympy.true, sympy.false):
        return str(bool(keep) != no)
    if isinstance(keep, (sympy.And, sympy.Or)):
        joint = " & " if isinstance(keep, sympy.And) != no else " | "
        # what reads fewer terms first, then by text: sympy's own order hangs on hashes of names
        parts = sorted((boolean(x, dialect, no) for x in keep.args), key=lambda t: (len(t), t))
        return joint.join(f"({part})" for part in parts)
    for kind, yes, other in RELATIONS:
        if type(keep) is kind:
            left, right = keep.args
            return f"{integer(left, dialect)} {other if no else yes} {integer(right, dialect)}"
    raise ValueError(f"{keep} is no predicate of a mask: comparisons of integers joined with & | ~ are")


def nearest(table: npt.NDArray[Any], *index: Any) -> Any:
    """Entries of a numpy table; an index outside reads the nearest entry."""
    return table[tuple(np.clip(i, 0, n - 1) for i, n in zip(index, table.shape, strict=True))]


@lru_cache(maxsize=4096)
def compiled(keep: Any) -> Callable[..., Any]:
    """`function(q, k, h, b, offset, load, tables)`: the predicate over numbers or arrays that broadcast."""
    names = sorted({str(x.args[0]) for x in keep.atoms(At)})
    arguments = ", ".join(["q", "k", "h", "b", "offset", "load", *names])
    space: dict[str, Any] = {}
    exec(f"def rule({arguments}):\n    return {boolean(keep, PYTHON)}", space)  # from our own printer
    rule = space["rule"]
    return lambda q, k, h, b, offset, load, tables: rule(q, k, h, b, offset, load, *(tables[n] for n in names))


def holds(keep: Any, tables: Tables, q: Any, k: Any, h: Any = 0, b: Any = 0, offset: int = 0) -> BoolArray:
    """The predicate over numpy arrays, broadcast against each other."""
    at = np.broadcast_shapes(*(np.shape(x) for x in (q, k, h, b)))
    value = compiled(keep)(*map(np.asarray, (q, k, h, b)), offset, nearest, tables)
    return np.broadcast_to(np.asarray(value, dtype=bool), at).copy()


def free(keep: Any) -> frozenset[str]:
    """Which of b, h, q, k and offset a predicate or an integer expression hangs on."""
    return frozenset(x.name for x in keep.free_symbols if x.name in SYMBOLS)
