"""Write rewritten sites into a captured graph: the way in which a plain module is emitted.

    before: u = linear(x, k_proj.weight)                       weight (kv heads * dim, inputs)
    after:  u = index_select(linear(x, k_proj.weight), -1, i)  weight (fewer kv heads * dim, inputs)

What lies between the projections and the core is left as it was captured, so any spelling and any length works.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.lower_factored import split
from passes.lower_sparse import hide
from rewrite.cuts import site_cuts
from rewrite.heads import Rewritten
from rewrite.layout import axis_map, expanded, repeats
from rewrite.site import IntArray, Site, Tensors

aten = torch.ops.aten


@dataclass(frozen=True)
class Shrunk:
    """A tensor that is held without its repeats: `rows` is the buffer with the place to read from, along `axis`;
    `shape` where it is gathered entry by entry."""

    rows: str
    axis: int
    index: tuple[int, ...]
    shape: tuple[int, ...] | None


def lower(program: ExportedProgram, changes: Mapping[str, tuple[Site, Rewritten]], tensors: Tensors) -> GraphModule:
    """A new GraphModule with the call signature, the dynamic sizes and the state-dict names of the captured module.

    `changes` holds per site name the source's `Site` and what became of it. The captured tensors are not touched.
    """
    module = copy.deepcopy(program.module())
    shrunk: dict[str, Shrunk] = {}
    for site, rewritten in changes.values():
        full = expanded(site, rewritten.weights, rewritten.site.kv_of, tensors)
        found = site_cuts(site, rewritten, tensors)
        if isinstance(found, str):
            raise ValueError(found)
        split(module, found, full)
        full = {name: value for name, value in full.items() if name not in {cut.tensor for cut in found}}
        maps = repeats(site, rewritten.site.kv_of, tensors)
        for name, value in full.items():
            made = _replace(module, name, value, maps.get(name))
            if made is not None:
                shrunk[name] = made
    _expand(module, shrunk)
    hide(module, changes)
    module.graph.lint()
    module.recompile()
    return module


def _replace(module: GraphModule, name: str, full: Tensor, repeated: IntArray | None) -> Shrunk | None:
    """Put the tensor's new value in place, without its repeated rows where it has some."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if repeated is None or np.array_equal(repeated, np.arange(len(repeated))):
        _set(owner, leaf, full)
        return None
    along = axis_map(repeated, full.shape)
    axis, rows = along or (0, repeated)
    kept, index = np.unique(rows, return_inverse=True)
    _set(owner, leaf, (full if along else full.reshape(-1)).index_select(axis, torch.from_numpy(kept)))
    owner.register_buffer(f"{leaf}_rows", torch.from_numpy(index.astype(np.int64)), persistent=False)
    shape = None if along else tuple(full.shape)
    return Shrunk(f"{name}_rows", axis, tuple(index.tolist()), shape)


def _set(owner: nn.Module, leaf: str, value: Tensor) -> None:
    old: Tensor = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value.to(old.dtype).clone(), requires_grad=old.requires_grad))
    else:
        owner.register_buffer(leaf, value.to(old.dtype).clone())


def _expand(module: GraphModule, shrunk: Mapping[str, Shrunk]) -> None:
    """Widen every use of a shrunk tensor: the output of a linear where that is the same, else the tensor itself."""
    reads = [n for n in module.graph.nodes if n.op == "get_attr" and n.target in shrunk]
    of = {n: shrunk[n.target] for n in reads}
    for user in dict.fromkeys(u for n in reads for u in n.users):
        if _linear_over(user, of):
            _widen_output(module, user, of[_weight(user)])
        else:
            for tensor in [n for n in user.all_input_nodes if n in of]:
                _widen_tensor(module, user, tensor, of[tensor])


def _linear_over(user: Node, of: Mapping[Node, Shrunk]) -> bool:
    """A linear whose weight, and whose bias where it has one, repeat alike along the output."""
    if user.target is not aten.linear.default or _weight(user) not in of:
        return False
    weight, bias = of[_weight(user)], user.args[2] if len(user.args) > 2 else None
    alike = bias is None or (isinstance(bias, Node) and bias in of and of[bias].index == weight.index)
    return alike and weight.axis == 0 and weight.shape is None


def _weight(linear: Node) -> Node:
    weight: Any = linear.args[1]
    return weight


def _widen_output(module: GraphModule, linear: Node, how: Shrunk) -> None:
    with module.graph.inserting_after(linear):
        rows = module.graph.get_attr(how.rows)
    with module.graph.inserting_after(rows):
        wide = module.graph.call_function(aten.index_select.default, (linear, -1, rows))
    linear.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def _widen_tensor(module: GraphModule, user: Node, tensor: Node, how: Shrunk) -> None:
    with module.graph.inserting_before(user):
        rows = module.graph.get_attr(how.rows)
        wide = module.graph.call_function(aten.index_select.default, (tensor, how.axis, rows))
        if how.shape is not None:
            wide = module.graph.call_function(aten.view.default, (wide, list(how.shape)))
    user.replace_input_with(tensor, wide)
