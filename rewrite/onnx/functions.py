"""The absorbed latent attention and the bounded cache as ONNX functions: they lie in the file, are made of standard
operators, and a runtime that knows nothing of them reads them as they are written here. The names of the domain are
those of no operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir
from onnxscript import opset23, script, values

DOMAIN, VERSION = "reattn", 1
_domain = values.Opset(DOMAIN, VERSION)
op: Any = opset23

# onnxscript reads the source of these functions, whose arguments are values of the graph: no annotation would be true


@script(_domain, default_opset=op)
def LatentScores(query, latent, read):  # pyright: ignore
    """(batch, heads, tokens, past) of query (batch, heads, tokens, dim), latent (batch, 1, past, rank) and
    read (heads, rank, dim): the heads stand as rows over the one latent."""
    absorbed = op.MatMul(query, op.Transpose(read, perm=[0, 2, 1]))
    rows = op.Reshape(absorbed, op.Concat(op.Constant(value_ints=[0, 1, -1]), op.Shape(latent, start=3), axis=0))
    scores = op.MatMul(rows, op.Transpose(latent, perm=[0, 1, 3, 2]))
    return op.Reshape(scores, op.Concat(op.Shape(query, start=0, end=3), op.Constant(value_ints=[-1]), axis=0))


@script(_domain, default_opset=op)
def RopeScores(turned, rope_key):  # pyright: ignore
    """(batch, heads, tokens, past) of turned (batch, heads, tokens, width) and rope_key (batch, 1, past, width)."""
    rows = op.Reshape(turned, op.Concat(op.Constant(value_ints=[0, 1, -1]), op.Shape(rope_key, start=3), axis=0))
    scores = op.MatMul(rows, op.Transpose(rope_key, perm=[0, 1, 3, 2]))
    return op.Reshape(scores, op.Concat(op.Shape(turned, start=0, end=3), op.Constant(value_ints=[-1]), axis=0))


@script(_domain, default_opset=op)
def LatentValues(shares, latent, up):  # pyright: ignore
    """(batch, heads, tokens, dim) of shares (batch, heads, tokens, past), latent (batch, 1, past, rank) and
    up (heads, dim, rank): the latent is summed first and expanded after, for the new tokens alone."""
    past = op.Shape(latent, start=2, end=3)
    rows = op.Reshape(shares, op.Concat(op.Constant(value_ints=[0, 1, -1]), past, axis=0))
    sums = op.MatMul(rows, latent)
    heads = op.Reshape(sums, op.Concat(op.Shape(shares, start=0, end=3), op.Constant(value_ints=[-1]), axis=0))
    return op.MatMul(heads, op.Transpose(up, perm=[0, 2, 1]))


@script(_domain, default_opset=op)
def KeepLast(hand, bound: int):  # pyright: ignore
    """The last `bound` tokens of hand (batch, heads, tokens, width), or all of fewer."""
    tokens = op.Shape(hand, start=2, end=3)
    limit = op.Constant(value_int=bound)
    start = tokens - op.Min(tokens, op.Reshape(limit, op.Constant(value_ints=[1])))
    return op.Slice(hand, start, tokens, op.Constant(value_ints=[2]))


@script(_domain, default_opset=op)
def KeepFirstAndLast(hand, first, bound: int):  # pyright: ignore
    """`bound` tokens of hand (batch, heads, tokens, width), or all of fewer: those at the places first (batch, count)
    and the last ones."""
    tokens = op.Shape(hand, start=2, end=3)
    limit = op.Constant(value_int=bound)
    held = op.Min(tokens, op.Reshape(limit, op.Constant(value_ints=[1])))
    count = op.Min(held, op.Shape(first, start=1, end=2))
    axis = op.Constant(value_ints=[2])
    places = op.Slice(first, op.Constant(value_ints=[0]), count, op.Constant(value_ints=[1]))
    wide = op.Unsqueeze(places, op.Constant(value_ints=[1, 3]))
    shape = op.Concat(op.Shape(hand, start=0, end=2), count, op.Shape(hand, start=3), axis=0)
    early = op.GatherElements(hand, op.Expand(wide, shape), axis=2)
    return op.Concat(early, op.Slice(hand, tokens - held + count, tokens, axis), axis=2)


FUNCTIONS: Mapping[str, Any] = {f.name: f for f in (LatentScores, RopeScores, LatentValues, KeepLast, KeepFirstAndLast)}


def define(model: onnx_ir.Model) -> None:
    """Give the file the functions that its graph calls."""
    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(called):
        function = onnx_ir.serde.deserialize_function(FUNCTIONS[name].to_function_proto())
        model.functions[function.identifier()] = function
    if called:
        model.opset_imports[DOMAIN] = VERSION
