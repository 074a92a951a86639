"""The exported graph as lifting reads it: one spelling per product, and what every value hangs on."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

# these read the shape or dtype of their tensors, never a value
SHAPE_ONLY = frozenset(
    "new_ones new_zeros new_full new_empty new_empty_strided zeros_like ones_like full_like empty_like rand_like "
    "randn_like fill sym_size sym_stride sym_numel sym_storage_offset _assert_tensor_metadata".split()
)
# these take the shape or dtype of every argument but the first
FIRST_ONLY = frozenset("type_as expand_as view_as reshape_as to.other".split())


def op_name(node: fx.Node) -> str:
    """The op without namespace and overload: "matmul", "scaled_dot_product_attention"; "" for what is no call."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "_overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The traced sizes of a tensor node."""
    return tuple(int(n) for n in node.meta["val"].shape)


def is_tensor(node: fx.Node) -> bool:
    """The node's value is one tensor, of sizes that are numbers."""
    return isinstance(node.meta.get("val"), Tensor) and is_sized(node)


def is_sized(node: fx.Node) -> bool:
    """Every axis has a number: what an expert sees of the tokens has none, a router's values decide it."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else ()
    return all(not isinstance(n, torch.SymInt) or n.node.maybe_as_int() is not None for n in sizes)


def is_absent(value: Tensor) -> bool:
    """A tensor without data: fake or on the meta device."""
    return value.device.type == "meta" or type(value).__name__ == "FakeTensor"


@dataclass(frozen=True, eq=False)
class Graph:
    """A static graph. Placeholders are parameters (by state-dict name), constants (with their value) or inputs."""

    graph: fx.Graph
    parameters: Mapping[fx.Node, str]
    weights: Mapping[str, Tensor]
    constants: Mapping[fx.Node, Any]
    inputs: Mapping[fx.Node, Any]
    folded: dict[fx.Node, Any] = field(default_factory=dict)
    """Values of nodes that hang on nothing, computed once."""
    numbers: Mapping[fx.Node, tuple[int, int]] = field(default_factory=dict)
    """Nodes in which one integer argument is read as another: a window too wide to see becomes one that shows."""

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes in order of execution."""
        return tuple(self.graph.nodes)

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """When a node runs."""
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def _bits(self) -> dict[fx.Node, int]:
        return {node: 1 << i for i, node in enumerate((*self.inputs, *self.parameters))}

    @cached_property
    def _hangs(self) -> dict[fx.Node, int]:
        hangs: dict[fx.Node, int] = {}
        for node in self.nodes:
            hangs[node] = self._bits.get(node, 0)
            for source in by_value(node):
                hangs[node] |= hangs[source]
        return hangs

    def on_inputs(self, node: fx.Node) -> bool:
        """An input of the model stands behind the node's value: it is an activation."""
        return bool(self._hangs[node] & ((1 << len(self.inputs)) - 1))

    def on_parameters(self, node: fx.Node) -> bool:
        """A parameter stands behind the node's value."""
        return bool(self._hangs[node] >> len(self.inputs))

    def is_constant(self, node: fx.Node) -> bool:
        """Neither a parameter nor an input stands behind the node's value."""
        return self._hangs[node] == 0

    def behind(self, node: fx.Node) -> list[fx.Node]:
        """The parameters and inputs behind the node's value."""
        return [p for p, bit in self._bits.items() if self._hangs[node] & bit]


def by_value(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values the node reads."""
    name = op_name(node)
    if name in SHAPE_ONLY:
        return []
    overload = getattr(node.target, "_overloadname", "")
    if name in FIRST_ONLY or f"{name}.{overload}" in FIRST_ONLY:
        return node.all_input_nodes[:1]
    return node.all_input_nodes


def canonicalise(ep: ExportedProgram) -> Graph:
    """Read a static export that went through `run_decompositions({})`. Node names stay; what is split keeps its
    name on the last part:

        baddbmm(c, a, b)        -> add(mul(c, beta), mul(bmm(a, b), alpha))
        einsum(.., a, b, c)     -> einsum(.., einsum(.., a, b), c)
    """
    graph = ep.graph
    if any(_splits(node) for node in graph.nodes):
        graph = copy.deepcopy(graph)
        for node in list(graph.nodes):
            if _splits(node):
                _split(graph, node)
    by_name = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    parameters: dict[fx.Node, str] = {}
    constants: dict[fx.Node, Any] = {}
    inputs: list[fx.Node] = []
    for spec in ep.graph_signature.input_specs:
        node = by_name[spec.arg.name]
        if spec.kind == InputKind.PARAMETER:
            parameters[node] = str(spec.target)
        elif spec.kind == InputKind.USER_INPUT:
            inputs.append(node)
        else:
            target = str(spec.target)
            constants[node] = ep.state_dict[target] if target in ep.state_dict else ep.constants.get(target)
    examples = _examples(ep, inputs)
    for node in inputs:
        if not is_tensor(node):
            constants[node] = examples[node]
    tensors = {node: examples[node] for node in inputs if is_tensor(node)}
    weights = {name: ep.state_dict[name] for name in parameters.values()}
    return Graph(graph, parameters, weights, constants, tensors)


def _examples(ep: ExportedProgram, inputs: list[fx.Node]) -> dict[fx.Node, Any]:
    """The example inputs, in the order of the placeholders."""
    if ep.example_inputs is None:
        return {node: node.meta.get("val") for node in inputs}
    leaves = torch.utils._pytree.tree_leaves(_reordered(ep))  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    if len(leaves) != len(inputs):
        return {node: node.meta.get("val") for node in inputs}
    return dict(zip(inputs, leaves, strict=True))


def _reordered(ep: ExportedProgram) -> Any:
    """Example inputs as (args, kwargs) with the keywords in the order of the call that was traced."""
    args, kwargs = ep.example_inputs or ((), {})
    spec = ep.call_spec.in_spec
    names = spec.children()[1].context if spec is not None else list(kwargs)
    return args, [kwargs[name] for name in names if name in kwargs]


def _splits(node: fx.Node) -> bool:
    name = op_name(node)
    return name == "baddbmm" or (name == "einsum" and len(node.args[1]) > 2)  # type: ignore[arg-type]


def _split(graph: fx.Graph, node: fx.Node) -> None:
    if op_name(node) == "baddbmm":
        _split_baddbmm(graph, node)
    else:
        _split_einsum(graph, node)


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    node.meta["val"] = torch.empty(shape, dtype=like.meta["val"].dtype, device="meta")
    return node


def _split_baddbmm(graph: fx.Graph, node: fx.Node) -> None:
    bias, a, b = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    aten, shape = torch.ops.aten, shape_of(node)
    with graph.inserting_before(node):
        product = _call(graph, node, aten.bmm.default, (a, b), shape)
        scaled = _call(graph, node, aten.mul.Tensor, (product, alpha), shape) if alpha != 1 else product
        if beta == 0:
            scaled_bias: Any = 0
        else:
            assert isinstance(bias, fx.Node)
            scaled_bias = _call(graph, node, aten.mul.Tensor, (bias, beta), shape_of(bias)) if beta != 1 else bias
    # the last part keeps the node itself, and with it the name that other passes know
    node.target = aten.add.Tensor
    node.args, node.kwargs = (scaled, scaled_bias), {}


def _split_einsum(graph: fx.Graph, node: fx.Node) -> None:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if "..." in equation or "->" not in equation:
        return
    left, out = equation.split("->")
    terms = left.split(",")
    sizes = {c: n for term, x in zip(terms, operands, strict=True) for c, n in zip(term, shape_of(x), strict=True)}
    with graph.inserting_before(node):
        while len(operands) > 2:
            needed = set(out) | set(reduce(operator.add, terms[2:]))
            both = "".join(dict.fromkeys(c for c in terms[0] + terms[1] if c in needed))
            shape = tuple(sizes[c] for c in both)
            args = (f"{terms[0]},{terms[1]}->{both}", operands[:2])
            part = _call(graph, node, torch.ops.aten.einsum.default, args, shape)
            terms, operands = [both, *terms[2:]], [part, *operands[2:]]
    node.args = (f"{','.join(terms)}->{out}", operands)
