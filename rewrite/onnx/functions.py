"""The absorbed latent attention, the bounded cache and attention under its mask as ONNX functions: they lie in the
file, are made of standard operators, and a runtime that knows nothing of them reads them as they are written here. The
names of the domain are those of no operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir
from onnxscript import graph, opset23, script, values

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


@script(_domain, default_opset=op)
def MaskedAttention(query, key, value, mask):  # pyright: ignore
    """(batch, tokens, heads, dv) of query (batch, heads, tokens, d), scaled, key and value (batch, groups, past, d or
    dv) and mask (batch, 1, tokens, past): the heads of a group stand as rows."""
    lead, rest = op.Shape(key, start=0, end=2), op.Constant(value_ints=[-1])
    rows = op.Reshape(query, op.Concat(lead, rest, op.Shape(query, start=3), axis=0))
    as_heads = op.Concat(op.Shape(query, start=0, end=3), rest, axis=0)
    scores = op.Reshape(op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2])), as_heads)
    as_shares = op.Concat(lead, rest, op.Shape(key, start=2, end=3), axis=0)
    shares = op.Reshape(op.Softmax(scores + mask, axis=-1), as_shares)
    return op.Transpose(op.Reshape(op.MatMul(shares, value), as_heads), perm=[0, 2, 1, 3])


@script(_domain, default_opset=op)
def WholeAttention(query, key, value, given, begin, lowest, sink: int, window: int):  # pyright: ignore
    """As `TiledAttention`, of few queries: nearly all that is at hand is read, and it is read where it lies."""
    one, by = op.Constant(value_ints=[1]), op.Constant(value_int=1)
    sinks, width = op.Reshape(op.Constant(value_int=sink), one), op.Reshape(op.Constant(value_int=window), one)
    tokens, hand, total = op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), op.Shape(given, start=3)
    away, zero = total - hand, one - one
    slots = op.Range(op.Squeeze(zero), op.Squeeze(hand), by)
    first = op.And(away > zero, slots < sinks)
    at = op.Where(first, begin + slots, slots + away)
    apart = op.Unsqueeze(op.Range(op.Squeeze(total - tokens), op.Squeeze(total), by), one) - at
    reach = op.And(apart >= zero, op.Or(apart < width, at - begin < sinks))
    # one that a row has not dropped yet, or not got yet, is in a place of its own
    keep = op.And(reach, op.Or(op.Not(first), at < away + sinks))
    shown = op.Expand(op.Min(at, total - one), op.Concat(op.Shape(key, start=0, end=1), one, tokens, hand, axis=0))
    mask = op.Where(op.And(keep, op.GatherElements(given, shown, axis=3)), lowest - lowest, lowest)
    return MaskedAttention(query, key, value, mask)


@script(_domain, default_opset=op)
def TiledAttention(query, key, value, given, begin, early, place, lowest, sink: int, window: int, tile: int):  # pyright: ignore
    """(batch, tokens, heads, dv) of query (batch, heads, tokens, d), scaled, and what is at hand of key and value
    (batch, groups, hand, d or dv), tile by tile of at most `tile` queries: each reads the first tokens and those nearer
    than `window` to some query of it, and nothing else is multiplied. given (batch, 1, tokens, total) holds where the
    model reads; positions count from begin (batch, 1, 1, 1); the first tokens are at the positions early (batch, sink),
    in the places `place` (batch, sink) of what is at hand; `lowest` is added to what is not read."""
    zero, one, two = op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    none, by = op.Constant(value_int=0), op.Constant(value_int=1)
    sinks = op.Reshape(op.Constant(value_int=sink), one)
    width = op.Reshape(op.Constant(value_int=window), one)
    most = op.Reshape(op.Constant(value_int=tile), one)
    batch, groups = op.Shape(key, start=0, end=1), op.Shape(key, start=1, end=2)
    tokens, hand, total = op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), op.Shape(given, start=3)
    away, held = total - hand, hand - tokens
    nothing = lowest - lowest
    tiles = (tokens + most - one) / most
    if op.Squeeze(tiles == one):
        out = WholeAttention(query, key, value, given, begin, lowest, sink=sink, window=window)
    else:
        step = (tokens + tiles - one) / tiles
        within = op.Range(none, op.Squeeze(step), by)
        wide = op.Unsqueeze(place, op.Constant(value_ints=[1, 3]))
        many = op.Concat(batch, groups, sinks, axis=0)
        first_key = op.GatherElements(key, op.Expand(wide, op.Concat(many, op.Shape(key, start=3), axis=0)), axis=2)
        width_v = op.Shape(value, start=3)
        first_value = op.GatherElements(value, op.Expand(wide, op.Concat(many, width_v, axis=0)), axis=2)
        early_at = op.Unsqueeze(early, op.Constant(value_ints=[1, 2]))
        early_in = op.Expand(op.Min(early_at, total - one), op.Concat(batch, one, tokens, sinks, axis=0))
        first_given = op.GatherElements(given, early_in, axis=3)

        @graph()
        def one_tile(number):  # pyright: ignore
            start = number * step
            row = op.Min(start + within, tokens - one)
            # where tokens were dropped, what is held is full, and this is behind the first tokens' places
            low = op.Max(held + start - width + one, zero)
            high = op.Min(held + start + step, hand)
            near = op.Range(op.Squeeze(low + away), op.Squeeze(high + away), by)
            near_at = op.Expand(near, op.Concat(batch, one, one, high - low, axis=0))
            # a first token that lies in the window is read there
            tile_at = op.Concat(op.Where(early_at < low + away, early_at, total), near_at, axis=3)
            behind = op.Unsqueeze(row + total - tokens, one) - tile_at
            read = op.And(behind >= zero, op.Or(behind < width, tile_at - begin < sinks))
            corner, end = op.Concat(start, low + away, axis=0), op.Concat(start + step, high + away, axis=0)
            part = op.Slice(given, corner, end, op.Constant(value_ints=[2, 3]))
            seen = op.Concat(op.Gather(first_given, row, axis=2), op.Gather(part, row - start, axis=2), axis=3)
            keys = op.Concat(first_key, op.Slice(key, low, high, two), axis=2)
            its_values = op.Concat(first_value, op.Slice(value, low, high, two), axis=2)
            asked = op.Gather(query, row, axis=2)
            found = MaskedAttention(asked, keys, its_values, op.Where(op.And(read, seen), nothing, lowest))
            return found

        numbers = op.Unsqueeze(op.Range(none, op.Squeeze(tiles), by), one)
        stacked = op.Transpose(op.Scan(numbers, body=one_tile, num_scan_inputs=1), perm=[1, 0, 2, 3, 4])
        as_rows = op.Concat(batch, op.Constant(value_ints=[-1]), op.Shape(query, start=1, end=2), width_v, axis=0)
        out = op.Slice(op.Reshape(stacked, as_rows), zero, tokens, one)
    return out


_LATENT = (LatentScores, RopeScores, LatentValues)
_BOUNDED = (KeepLast, KeepFirstAndLast, MaskedAttention, WholeAttention, TiledAttention)
FUNCTIONS: Mapping[str, Any] = {f.name: f for f in (*_LATENT, *_BOUNDED)}


def define(model: onnx_ir.Model) -> None:
    """Give the file the functions that its graph calls, and those that they call."""
    todo = _called(model.graph)
    while todo:
        todo.remove(name := min(todo))
        function = onnx_ir.serde.deserialize_function(FUNCTIONS[name].to_function_proto())
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
        if inner := _called(function):
            function.opset_imports[DOMAIN] = VERSION
            todo |= inner - {known for _, known, _ in model.functions}


def _called(graph: onnx_ir.Graph | onnx_ir.Function) -> set[str]:
    return {node.op_type for node in graph.all_nodes() if node.domain == DOMAIN}
