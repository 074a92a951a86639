"""Write rewritten sites into a captured graph: the way in which a plain module is emitted.

    before: u = linear(x, k_proj.weight)                       weight (kv heads * dim, inputs)
    after:  u = index_select(linear(x, k_proj.weight), -1, i)  weight (fewer kv heads * dim, inputs)

What lies between the projections and the core is left as it was captured, so any spelling and any length works.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from rewrite.heads import Rewritten
from rewrite.layout import axis_map, expanded, repeats
from rewrite.site import IntArray, Site, Tensors

aten = torch.ops.aten


def lower(program: ExportedProgram, changes: Mapping[str, tuple[Site, Rewritten]], tensors: Tensors) -> GraphModule:
    """A new GraphModule with the call signature, the dynamic sizes and the state-dict names of the captured module.

    `changes` holds per site name the source's `Site` and what became of it. The captured tensors are not touched.
    """
    module = copy.deepcopy(program.module())
    if not isinstance(module, GraphModule):
        raise TypeError(f"torch.export gave a {type(module).__name__}")
    for site, rewritten in changes.values():
        full = expanded(site, rewritten.weights, rewritten.site.kv_of, tensors)
        maps = repeats(site, rewritten.site.kv_of, tensors)
        for name, value in full.items():
            _replace(module, name, value, maps.get(name))
    module.graph.lint()
    module.recompile()
    return module


def _replace(module: GraphModule, name: str, full: Tensor, repeated: IntArray | None) -> None:
    """Put the tensor's new value in place, without its repeated rows."""
    owner, leaf = _owner(module, name)
    old: Tensor = getattr(owner, leaf)
    if repeated is None or np.array_equal(repeated, np.arange(len(repeated))):
        _set(owner, leaf, old, full)
        return
    along = axis_map(repeated, full.shape)
    if along is None:
        kept, index = np.unique(repeated, return_inverse=True)
        small = full.reshape(-1)[torch.from_numpy(kept)]
        axis, shape = 0, tuple(full.shape)
    else:
        axis, rows = along
        kept, index = np.unique(rows, return_inverse=True)
        small, shape = full.index_select(axis, torch.from_numpy(kept)), None
    _set(owner, leaf, old, small)
    at = f"{leaf}_rows"
    owner.register_buffer(at, torch.from_numpy(index.astype(np.int64)), persistent=False)
    prefix = name.rpartition(".")[0]
    _expand_uses(module, name, f"{prefix}.{at}" if prefix else at, axis, shape)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _set(owner: nn.Module, leaf: str, old: Tensor, value: Tensor) -> None:
    if isinstance(old, nn.Parameter):
        setattr(owner, leaf, nn.Parameter(value.to(old.dtype).clone(), requires_grad=old.requires_grad))
    else:
        owner._buffers[leaf] = value.to(old.dtype).clone()  # pyright: ignore[reportPrivateUsage]


def _expand_uses(module: GraphModule, name: str, index: str, axis: int, shape: tuple[int, ...] | None) -> None:
    graph = module.graph
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target == name]:
        with graph.inserting_after(node):
            rows = graph.get_attr(index)
        for user in list(node.users):
            if axis == 0 and shape is None and _is_linear_with(user, node):
                _expand_output(module, user, rows)
            else:
                _expand_tensor(module, node, user, rows, axis, shape)


def _is_linear_with(user: Node, weight: Node) -> bool:
    """A linear whose weight, and whose bias where it has one, is the bare tensor: its output can be expanded."""
    return user.target is aten.linear.default and len(user.args) == 2 and user.args[1] is weight



def _expand_output(module: GraphModule, linear: Node, rows: Node) -> None:
    with module.graph.inserting_after(linear):
        wide = module.graph.call_function(aten.index_select.default, (linear, -1, rows))
    linear.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def _expand_tensor(
    module: GraphModule, tensor: Node, user: Node, rows: Node, axis: int, shape: tuple[int, ...] | None
) -> None:
    with module.graph.inserting_before(user):
        wide = module.graph.call_function(aten.index_select.default, (tensor, axis, rows))
        if shape is not None:
            wide = module.graph.call_function(aten.view.default, (wide, list(shape)))
    user.replace_input_with(tensor, wide)
