"""The whole mask as one expression over blocks of positions, for tiles that need masking."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy

from codegen.integers import Dialect
from codegen.printed import load_triton
from rewrite.mask import Mask, spell
from rewrite.mask.terms import At, Mod, b, h, k


def predicate(mask: Mask, dialect: Dialect) -> str:
    """The mask as an expression over q and k (blocks of positions that broadcast), scalars b, h and offset, and tables.

    Python: over numbers, numpy arrays or torch tensors, with a function `load(table, *index)` that reads the nearest
    entry. Triton: tables are pointers to contiguous integers with their lengths beside them, `window` and `window_n0`,
    and no division of what may be negative is left to its `//`, which truncates.
    """
    return _text(mask.keep, dialect)


@lru_cache(maxsize=1024)
def _text(keep: Any, dialect: Dialect) -> str:
    if keep in (sympy.true, sympy.false):
        return "(q == q) & (k == k)" if keep == sympy.true else "(q != q) & (k != k)"
    return spell.boolean(keep, spell.PYTHON if dialect == "python" else _TRITON)


def _floor(x: str, c: int) -> str:
    return f"({x} - ({x} % {c} + {c}) % {c}) // {c}"


def _rest(x: str, c: int) -> str:
    return f"({x} % {c} + {c}) % {c}"


_TRITON = spell.Dialect(_floor, _rest, load_triton, "tl.abs", lambda x: not_negative(x))


def not_negative(x: Any) -> bool:
    """Whether an integer expression of the mask is known to be 0 or more: keys, heads and rows are, queries are not."""
    if isinstance(x, sympy.Integer):
        return x >= 0
    if isinstance(x, sympy.Symbol):
        return x in (b, h, k)
    if isinstance(x, (sympy.Add, sympy.Mul)):
        return all(not_negative(part) for part in x.args)
    if isinstance(x, (Mod, sympy.Abs)):
        return True
    return not isinstance(x, At) and bool(x.args) and not_negative(x.args[0])
