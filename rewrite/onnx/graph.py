"""What is asked of a finished graph: its axes move, its operators are standard, nothing that is cached is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
)

from rewrite.errors import Refused
from rewrite.onnx.functions import DOMAIN, define

IR_VERSIONS = {23: 11, 24: 12}
"""Opset -> the version of the file format that came with it."""
SAME = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Cast", "Identity", "Split", "Flatten"})
"""Operators whose output holds what their first input holds, and no more of it."""
REPEAT = frozenset({"Expand", "Tile", "Gather", "GatherND", "GatherElements"})
"""Those whose output can hold it several times."""


def finish(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], opset: int) -> None:
    """Put what the exporter made into shape: equal parts once, the functions that are called, the axes' names."""
    # the exporter notes on every node which lines of which files of this machine it comes from
    ClearMetadataAndDocStringPass()(model)
    CommonSubexpressionEliminationPass()(model)
    # a copy between an operator and an output would keep it from writing in place
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    # what is written by hand may be newer than what the exporter knows; the older operators stand unchanged in it
    model.opset_imports[""] = opset
    model.ir_version = max(model.ir_version, IR_VERSIONS[opset])
    define(model)
    for function in model.functions.values():
        function.opset_imports[""] = opset
    lengths = {v.name: v.shape[2] for v in model.graph.inputs if v.shape is not None and len(v.shape) == 4}
    for value in model.graph.outputs:
        if value.name is not None and value.name.startswith("present.") and value.shape is not None:
            length = lengths.get(value.name.replace("present.", "past_key_values.", 1))
            if length is not None:
                value.shape[2] = ir.SymbolicDim("total") if length == ir.SymbolicDim("past") else length
    _named(model, inputs, outputs)


def _named(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Inputs that the model never reads are left out by the exporter; nothing else may differ."""
    found = [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]
    if not set(found[0]) <= set(inputs) or found[1] != list(outputs):
        raise RuntimeError(f"the exporter named {found}, asked for {(list(inputs), list(outputs))}")


def fixed(model: ir.Model, shapes: dict[str, dict[int, str]]) -> str | None:
    """The axes that were to move and got the size of the example."""
    stuck: list[str] = []
    for value in model.graph.inputs:
        shape = value.shape
        wanted = shapes.get(value.name or "", {})
        stuck += [
            f"axis {axis} ({name}) of {value.name} stayed {shape[axis]}"
            for axis, name in wanted.items()
            if shape is not None and isinstance(shape[axis], int)
        ]
    return ", ".join(stuck) if stuck else None


def fixed_size(stuck: str) -> Refused:
    """The error for axes that do not move."""
    return Refused("onnx", f"the model fixes a size while it is traced: {stuck}", "a file of ours serves any size")


def foreign(model: ir.Model) -> set[str]:
    """Operators of a domain that is neither the standard nor defined in the file."""
    defined = {(domain, name) for domain, name, _ in model.functions}
    nodes = [*model.graph.all_nodes(), *(n for f in model.functions.values() for n in f.all_nodes())]
    return {
        f"{n.domain}::{n.op_type}"
        for n in nodes
        if n.domain not in ("", "ai.onnx") and (n.domain, n.op_type) not in defined
    }


def repeated(model: ir.Model) -> str | None:
    """The first node that repeats what an input of the cache holds, as a sentence."""
    for given in model.graph.inputs:
        if given.name is not None and given.name.startswith("past_key_values."):
            node = next(_repeats(given), None)
            if node is not None:
                return f"{given.name} is repeated by {node.op_type} '{node.name}'"
    return None


def _repeats(given: ir.Value) -> Iterator[ir.Node]:
    holds, todo = {given}, [given]
    while todo:
        value = todo.pop()
        for node, at in value.uses():
            if node.op_type in REPEAT and at == 0:
                yield node
            heads = node.op_type == "Concat" and node.attributes["axis"].as_int() == 1
            if heads and sum(x in holds for x in node.inputs) > 1:
                yield node
            if (node.op_type in SAME and at == 0) or node.op_type in ("Concat", "TensorScatter"):
                new = [x for x in node.outputs if x not in holds]
                holds.update(new)
                todo += new


def operators(model: ir.Model) -> dict[str, int]:
    """How often each operator stands in the graph, those in a function counted where it is called."""
    found: dict[str, int] = {}
    for node in model.graph.all_nodes():
        name = node.op_type if node.domain in ("", DOMAIN) else f"{node.domain}::{node.op_type}"
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


def require(model: ir.Model, shapes: dict[str, dict[int, str]], *, contrib: bool) -> None:
    """Raise where the graph is not what was asked for."""
    stuck = fixed(model, shapes)
    if stuck is not None:
        raise fixed_size(stuck)
    others = foreign(model) - ({"com.microsoft::GroupQueryAttention"} if contrib else set())
    if others:
        raise Refused("onnx", f"the graph needs operators that are not standard: {', '.join(sorted(others))}")
    again = repeated(model)
    if again is not None:
        raise Refused(
            "onnx",
            f"its class computes its attention itself, and {again}",
            "a file of ours repeats nothing that is cached: with as many kv heads as query heads it can be written",
        )
