"""Which nodes of a captured graph a site's weights reach, and running just those.

everything before  ->  boundary values  ->  [ slice: all that the site's tensors touch ]  ->  the rest
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from passes.disk import Disk
from passes.find import Region
from rewrite.errors import Refused
from rewrite.site import Operand, Output, Site

Env = dict[Node, Any]


def tensors_of(operand: Operand) -> set[str]:
    """State-dict names of all tensors that a target may change for this operand."""
    names = {r.tensor for r in operand.roots} | {r.bias for r in operand.roots if r.bias}
    return names | {a.tensor for a in (operand.gain, operand.shift, operand.after) if a is not None and a.tensor}


def site_tensors(site: Site) -> set[str]:
    """State-dict names of all tensors that a target may change at this site."""
    names = tensors_of(site.q) | tensors_of(site.k) | tensors_of(site.v)
    if isinstance(site.out, Output):
        names |= {site.out.root.tensor} | ({site.out.root.bias} if site.out.root.bias else set())
    return {n for n in names if n}


def placeholders(program: ExportedProgram) -> dict[str, str]:
    """Placeholder -> name of the parameter, buffer or constant that it stands for."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


class Machine:
    """A captured graph with its tensors, run node by node. `state` holds what the placeholders stand for; with a
    `disk` parameters on meta are read from there."""

    def __init__(self, program: ExportedProgram, module: nn.Module, disk: Disk | None = None) -> None:
        names = placeholders(program)
        owned: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
        owned |= dict(module.named_buffers(remove_duplicate=False))
        self.nodes = list(program.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.graph_module = program.graph_module
        self.inputs = [n for n in self.nodes if n.op == "placeholder" and n.name not in names]
        self.of_tensor: dict[str, list[Node]] = {}
        known: Env = {}
        absent: dict[Node, str] = {}
        for node in self.nodes:
            if node.op == "placeholder" and node.name in names:
                name = names[node.name]
                value = owned[name] if name in owned else program.constants[name]
                if disk is not None and isinstance(value, Tensor) and value.is_meta:
                    absent[node] = name
                else:
                    known[node] = value.detach() if isinstance(value, Tensor) else value
                self.of_tensor.setdefault(name, []).append(node)
        self.state: Env = known if disk is None else disk.state(absent)
        self.state.update(known)

    def step(self, node: Node, look: Callable[[Node], Any]) -> Any:
        """The value of one node."""
        if node.op == "get_attr":
            return getattr(self.graph_module, str(node.target))
        target: Any = node.target
        return target(*map_arg(node.args, look), **map_arg(node.kwargs, look))

    def runs(self, node: Node) -> bool:
        """Whether the node computes something that somebody reads (metadata assertions do not)."""
        return node.op in ("call_function", "get_attr") and bool(node.users)


@dataclass(frozen=True, eq=False)
class Slice:
    """The nodes of one site: `nodes` in graph order up to the output projection, `boundary` what they read."""

    site: Site
    nodes: tuple[Node, ...]
    boundary: tuple[Node, ...]
    roots: Mapping[str, tuple[Node, ...]]
    """Projections of "q", "k" and "v", parallel with the operands' roots."""
    entry: Node
    """What the output projection reads: the heads' outputs."""
    out: Node


def slice_of(machine: Machine, site: Site, region: Region, twin: Callable[[str], Node]) -> Slice:
    """What the site's tensors reach before and at its output projection."""
    if region.out is None:
        raise Refused("refused", f"{site.name}: its output projection is not known: {site.out}")
    out = twin(region.out)
    starts = [p for name in site_tensors(site) for p in machine.of_tensor.get(name, ())]
    inside = _reached(starts, lambda n: n.users) & _reached([out], lambda n: n.all_input_nodes)
    nodes = tuple(n for n in machine.nodes if n in inside and n.op != "placeholder")
    read = {a for n in nodes for a in n.all_input_nodes if a not in inside and a not in machine.state}
    roots = {k: tuple(twin(n) for n in getattr(region, f"{k}_roots")) for k in "qkv"}
    values = _reached(roots["v"], lambda n: n.users)
    entry = next(n for n in out.all_input_nodes if n in values)
    return Slice(site, nodes, tuple(sorted(read, key=machine.place.__getitem__)), roots, entry, out)


def _reached(start: Iterable[Node], more: Callable[[Node], Iterable[Node]]) -> set[Node]:
    seen, todo = set(start), list(start)
    while todo:
        for node in more(todo.pop()):
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


HEAVY = ("linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum", "conv1d", "convolution", "conv2d")


def twins(static: Graph, dynamic: Graph) -> Callable[[str], Node]:
    """Node of the dynamic graph for a node name of the static one: the k-th projection or product of a kind.

    Names differ between two exports of one model (symbolic sizes take numbers), the order of the products does not.
    """
    here, there = _products(static), _products(dynamic)
    if [(n.target) for n in here] != [n.target for n in there]:
        raise Refused(
            "refused",
            f"the model runs other operations at other lengths: {len(here)} products against {len(there)}",
            "give calibration of one fixed length",
        )
    table = {a.name: b for a, b in zip(here, there, strict=True)}

    def twin(name: str) -> Node:
        if name not in table:
            raise Refused("refused", f"{name} is no projection that can be followed to other lengths")
        return table[name]

    return twin


def _products(graph: Graph) -> list[Node]:
    def tensor(node: Node) -> bool:
        return isinstance(node.meta.get("val"), Tensor)

    return [n for n in graph.nodes if n.op == "call_function" and _kind(n) in HEAVY and tensor(n)]


def _kind(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def run_slice(
    machine: Machine,
    part: Slice,
    env: Env,
    new: Mapping[str, Tensor],
    stop: Node | None = None,
    known: Env | None = None,
) -> Env:
    """Values of the slice's nodes with tensors replaced by `new` (state-dict names), up to and with `stop`; values
    that are `known` are not computed."""
    swapped = {p: value for name, value in new.items() for p in machine.of_tensor.get(name, ())}
    local: Env = dict(known or {})

    def look(node: Node) -> Any:
        for values in (local, swapped, env, machine.state):
            if node in values:
                return values[node]
        raise KeyError(node.name)

    with torch.no_grad():
        for node in part.nodes:
            if machine.runs(node) and node not in local:
                local[node] = machine.step(node, look)
            if node is stop:
                break
    return local


def features_last(value: Tensor, width: int) -> Tensor:
    """A projection's input or output as (..., width): einsum keeps (heads, dim) apart, conv has channels first."""
    if value.shape[-1] == width:
        return value
    if value.dim() >= 2 and value.shape[-1] * value.shape[-2] == width:
        return value.flatten(-2)
    if value.dim() == 3 and value.shape[1] == width:
        return value.transpose(1, 2)
    raise Refused("refused", f"a projection of width {width} has values of shape {tuple(value.shape)}")


def projected(part: Slice, local: Env, which: str) -> Tensor:
    """(batch, tokens, rows): outputs of the operand's projections, one after the other."""
    operand: Operand = getattr(part.site, which)
    widths: dict[Node, int] = {}
    for node, root in zip(part.roots[which], operand.roots, strict=True):
        # a projection whose weight is several tensors is named once for each of them
        widths[node] = widths.get(node, 0) + root.rows
    parts = [features_last(local[n], width) for n, width in widths.items()]
    return torch.cat([p if p.dim() == 3 else p.reshape(-1, *p.shape[-2:]) for p in parts], -1)


def entering(part: Slice, local: Env) -> Tensor:
    """(tokens, heads, dim): what the output projection reads, in the order in which the graph holds the heads."""
    if not isinstance(part.site.out, Output):
        raise Refused("refused", f"{part.site.name}: {part.site.out}")
    width = part.site.out.root.columns
    rows = features_last(local[part.entry], width).reshape(-1, width)
    columns = torch.from_numpy(part.site.out.columns)
    return rows[:, columns.reshape(-1)].reshape(len(rows), *columns.shape)


def entered(part: Slice, like: Tensor, z: Tensor) -> Tensor:
    """The inverse of `entering`: heads' outputs (tokens, heads, dim) as the output projection reads them."""
    if not isinstance(part.site.out, Output):
        raise Refused("refused", f"{part.site.name}: {part.site.out}")
    width = part.site.out.root.columns
    rows = features_last(like, width)
    flat = rows.reshape(-1, width).clone()
    flat[:, torch.from_numpy(part.site.out.columns.reshape(-1))] = z.flatten(1).to(flat.dtype)
    if rows.shape[-1] == like.shape[-1] or like.shape[-1] * like.shape[-2] == width:
        return flat.reshape(like.shape)
    return flat.reshape(rows.shape).transpose(1, 2)
