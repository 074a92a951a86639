"""Equal regions are lifted once: the text of a region with local numbers, and a site carried over to its twin."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from passes.canonicalise import Graph, by_value, is_absent, shape_of
from passes.find.anchor import Anchor, Scan
from passes.find.execute import Unknown, constant
from passes.find.lift import Lifting, Region
from passes.find.names import module_path, owner, where
from passes.find.output import ahead
from passes.find.roots import transparent
from passes.find.streams import same_tokens
from rewrite.modules import common
from rewrite.site import Affine, Operand, Output, Root, Sink

MANY = 4000


@dataclass(eq=False)
class Text:
    """The text of one region: nodes in the order met, so that equal regions number alike."""

    scan: Scan
    numbers: dict[fx.Node, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    beside: set[fx.Node] = field(default_factory=set)

    @property
    def key(self) -> str:
        """Hash of the text."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:16]

    def name(self, node: fx.Node) -> str:
        """The node's local name, written out when first met."""
        if node in self.numbers:
            return f"%{self.numbers[node]}"
        if len(self.numbers) > MANY:
            return "..."
        line = self._line(node)
        self.numbers[node] = len(self.numbers)
        self.lines.append(line)
        return f"%{self.numbers[node]}"

    def _line(self, node: fx.Node) -> str:
        graph = self.scan.graph
        if node in graph.parameters:
            weight = graph.weights[graph.parameters[node]]
            return f"param {shape_of(node)} {weight.requires_grad} {is_absent(weight)}"
        if node in graph.inputs:
            return f"input {node.name}"
        if graph.is_constant(node):
            return _content(graph, node)
        if node in self.beside or node.op != "call_function":
            return f"beside {_shape(node)}"
        root = self.scan.root(node)
        if root is not None:
            source = transparent(graph, root.source)
            if source not in self.numbers:
                self.numbers[source] = len(self.numbers)
                self.lines.append(f"source {_shape(source)}")
            self.numbers.setdefault(root.source, self.numbers[source])
        args = [self._argument(x) for x in (node.args, node.kwargs)]
        return f"{node.target} {args} {_shape(node)}"

    def _argument(self, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return self.name(x)
        if isinstance(x, (list, tuple)):
            return [self._argument(y) for y in x]
        if isinstance(x, Mapping):
            return {key: self._argument(y) for key, y in x.items()}
        return repr(x)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)


def _content(graph: Graph, node: fx.Node) -> str:
    try:
        value = constant(graph, node)
    except (Unknown, RuntimeError, TypeError):
        return f"unknown {node.name}"
    if not isinstance(value, Tensor):
        return f"constant {value}"
    whole = value.contiguous().reshape(-1)
    whole = torch.view_as_real(whole) if whole.is_complex() else whole
    return f"constant {tuple(value.shape)} {value.dtype} {hashlib.sha256(whole.numpy().tobytes()).hexdigest()[:16]}"


def text(scan: Scan, anchor: Anchor) -> Text:
    """Everything the site is lifted from: core, scores, operands, and the way to the output projection."""
    core = anchor.node if anchor.below is None else anchor.below.node
    out = Text(scan)
    out.name(anchor.node)
    out.name(core)
    way = ahead(scan, core)
    if way is not None:
        for node in (*way.path, way.root.node):
            out.beside.update(x for x in by_value(node) if x not in out.numbers and x not in way.path)
        out.beside = {x for x in out.beside if scan.graph.on_inputs(x)}
        for node in way.path:
            out.name(node)
        out.name(way.root.node)
    return out


def carried(scan: Scan, lifting: Lifting, mine: Text, twin: Text, anchor: Anchor) -> Lifting:
    """The site of `mine` with the names of its twin."""
    back = {number: node for node, number in reversed(twin.numbers.items())}
    nodes = {node.name: back[number] for node, number in mine.numbers.items()}
    weights = {name: back[mine.numbers[node]] for node, name in scan.graph.parameters.items() if node in mine.numbers}
    names = _Names(scan.graph, nodes, weights)
    old, place = lifting.site, lifting.place
    roots = [nodes[name] for name in (*place.q_roots, *place.k_roots, *place.v_roots)]
    first_q, first_k = (scan.root(nodes[names_[0]]) for names_ in (place.q_roots, place.k_roots))
    assert first_q is not None
    assert first_k is not None
    site = replace(
        old,
        name=common([*(module_path(node) for node in roots), module_path(anchor.node)]),
        q=names.operand(old.q, place.q_roots),
        k=names.operand(old.k, place.k_roots),
        v=names.operand(old.v, place.v_roots),
        mods=tuple(Sink(names.affine(mod.logits)) if isinstance(mod, Sink) else mod for mod in old.mods),
        out=names.output(old.out, place.out),
        cross=not same_tokens(scan.graph, first_q.source, first_k.source),
        where=where(anchor.node),
    )
    return Lifting(site, names.place(place), lifting.true_weights)


@dataclass(frozen=True, eq=False)
class _Names:
    """Old node and tensor names to the twin's nodes."""

    graph: Graph
    nodes: Mapping[str, fx.Node]
    tensors: Mapping[str, fx.Node]

    def tensor(self, name: str) -> str:
        return self.graph.parameters[self.tensors[name]]

    def affine(self, values: Affine) -> Affine:
        return values if values.tensor is None else replace(values, tensor=self.tensor(values.tensor))

    def root(self, root: Root, node: str) -> Root:
        name = self.tensor(root.tensor)
        bias = None if root.bias is None else self.tensor(root.bias)
        source = self.nodes[root.source].name if root.source in self.nodes else root.source
        return replace(root, tensor=name, bias=bias, source=source, module=owner(module_path(self.nodes[node]), name))

    def operand(self, o: Operand, nodes: tuple[str, ...]) -> Operand:
        return replace(
            o,
            roots=tuple(self.root(root, node) for root, node in zip(o.roots, nodes, strict=True)),
            gain=self.affine(o.gain),
            shift=None if o.shift is None else self.affine(o.shift),
            after=None if o.after is None else self.affine(o.after),
        )

    def output(self, out: Any, node: str | None) -> Any:
        if not isinstance(out, Output) or node is None:
            return out
        return replace(out, root=self.root(out.root, node))

    def place(self, place: Region) -> Region:
        q, k, v = (tuple(self.nodes[n].name for n in names) for names in (place.q_roots, place.k_roots, place.v_roots))
        return Region(q, k, v, self.nodes[place.core].name, None if place.out is None else self.nodes[place.out].name)


__all__ = ["Text", "carried", "text"]
