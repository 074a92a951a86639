"""Text to mask: the algebra that a mask prints, library names and comparisons of b, h, q, k joined with & | ~."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from rewrite.mask import library
from rewrite.mask.algebra import Mask, Table, mask
from rewrite.mask.terms import SYMBOLS, At, Term, at

CONSTANTS = {"all": library.all_, "causal": library.causal, "causal_top_left": library.causal_top_left}
FUNCTIONS: dict[str, Callable[..., Mask]] = {
    f.__name__: f
    for f in (
        library.blocks_diagonal,
        library.chunk,
        library.dilated,
        library.longformer,
        library.neighbourhood,
        library.sharded,
        library.strided,
    )
}
WIDTHS: dict[str, Callable[..., Mask]] = {
    f.__name__: f for f in (library.around, library.global_, library.prefix, library.sink, library.window)
}
COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: lambda x, y: x < y,
    ast.LtE: lambda x, y: x <= y,
    ast.Gt: lambda x, y: x > y,
    ast.GtE: lambda x, y: x >= y,
    ast.Eq: lambda x, y: x == y,
    ast.NotEq: lambda x, y: x != y,
}
COUNTED: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda x, y: x + y,
    ast.Sub: lambda x, y: x - y,
    ast.Mult: lambda x, y: x * y,
    ast.FloorDiv: lambda x, y: x // y,
    ast.Mod: lambda x, y: x % y,
}


def parse(text: str, tables: Mapping[str, Table] | None = None) -> Mask:
    """The mask that prints as `text`, with the tables that it reads.

    Raises ValueError, with the part that is not understood.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"mask {text!r} cannot be read: {error.msg}") from None
    return _mask(tree, tables or {}).named(text.strip())


def _mask(node: ast.expr, tables: Mapping[str, Table]) -> Mask:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _mask(node.left, tables), _mask(node.right, tables)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand, tables)
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _called(node.func.id, node, tables)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        left, right = _term(node.left), _term(node.comparators[0])
        keep = COMPARED[type(node.ops[0])](Term(left.value), right)
        return mask(lambda *_: keep, None, _read(keep, tables))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return library.all_ if node.value else Mask("False", sympy.false)
    raise ValueError(
        f"{ast.unparse(node)!r} is no mask: {', '.join([*CONSTANTS, *FUNCTIONS, *WIDTHS])}, documents, "
        "streaming, blocks and comparisons of b, h, q, k are"
    )


def _called(name: str, node: ast.Call, tables: Mapping[str, Table]) -> Mask:
    if name in WIDTHS and len(node.args) == 1:
        width = _term(node.args[0])
        return WIDTHS[name](width, _read(width.value, tables))
    if name in ("documents", "streaming", "blocks"):
        names = [x.id for x in node.args if isinstance(x, ast.Name)]
        missing = [x for x in names if not any(t.startswith(x) for t in tables)]
        if missing or not names:
            raise ValueError(
                f"{ast.unparse(node)!r} reads tables that are not given: {', '.join(missing) or 'no name'}"
            )
        if name == "documents":
            return library.spans(names[0], tables)
        if name == "streaming":
            return library.streaming_of(names[0], names[1], tables)
        return library.blocks_of(names[0], tables, *map(ast.literal_eval, node.args[1:]))
    if name not in FUNCTIONS:
        raise ValueError(f"there is no mask {name!r}; there are {', '.join([*FUNCTIONS, *WIDTHS])}")
    return FUNCTIONS[name](*map(ast.literal_eval, node.args))


def _read(value: Any, tables: Mapping[str, Table]) -> dict[str, Table]:
    names = {str(x.args[0]) for x in value.atoms(At)}
    return {name: table for name, table in tables.items() if name in names}


def _term(node: ast.expr) -> Term:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Term(sympy.Integer(node.value))
    if isinstance(node, ast.Name) and node.id in SYMBOLS:
        return Term(SYMBOLS[node.id])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_term(node.operand)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return at(node.value.id, *map(_term, index))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "abs":
        return abs(_term(node.args[0]))
    if isinstance(node, ast.BinOp) and type(node.op) in COUNTED:
        left, right = _term(node.left), _term(node.right)
        divided = isinstance(node.op, (ast.FloorDiv, ast.Mod))
        return COUNTED[type(node.op)](left, _whole(right) if divided else right)
    raise ValueError(f"{ast.unparse(node)!r} is no integer expression of b, h, q, k and tables")


def _whole(x: Term) -> int:
    if not isinstance(x.value, sympy.Integer):
        raise ValueError(f"positions are divided by a number, not by {x}")
    return int(x.value)
