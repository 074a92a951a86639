"""Write masks into a captured graph: the attention operator in place of a fused core, hidden scores before a softmax.

before: sdpa(q, k, v, None, ...)              after: reattn::attention(q, k, v, mask), which leaves tiles out
before: sdpa(q, k, v, bias, ...)              after: sdpa(q, k, v, bias where the mask holds, ...)
before: softmax(scores)                       after: softmax(scores where the mask holds)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from codegen import ops
from codegen.options import Options
from passes.region import site_tensors
from rewrite.emit.predicate import tree
from rewrite.emit.runtime.sparse import holds
from rewrite.heads import Rewritten
from rewrite.mask import Mask
from rewrite.site import Output, Sink, Site, Sparse

Pairs = Mapping[str, tuple[Site, Rewritten]]
OPERATOR = "reattn's operator: generated kernels on a GPU, tiles left out on a CPU"
TABLE = "its own dense core with the mask in its scores, so no time is saved: its mask or bias is an operand"
SCORES = "its own dense core with the mask in its scores, so no time is saved: it is written as a softmax of products"


class Core(nn.Module):
    """Attention by the operator; heads and positions as in rewrite.attend. `axes`: those of the result from the slowest
    to the fastest, as the core had them that it stands for, because a view may follow."""

    def __init__(self, mask: Mask, scale: float | None, axes: Sequence[int]) -> None:
        super().__init__()
        self.mask, self.scale, self.axes = mask, scale, tuple(axes)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(b, h, t, dv)."""
        out = ops.call(q, k, v, self.mask, Options(q.shape[-1] ** -0.5 if self.scale is None else self.scale))
        back = [self.axes.index(i) for i in range(4)]
        return out.permute(self.axes).contiguous().permute(back)


class Hidden(nn.Module):
    """Where a mask holds, and scores or a mask without the rest."""

    def __init__(self, mask: Mask, heads: int) -> None:
        super().__init__()
        self.trees = [tree(mask, i) for i in mask.heads(heads)]

    def keep(self, queries: Any, keys: Any, like: Tensor) -> Tensor:
        """(heads, queries, keys), or without heads where they are alike."""
        q = torch.arange(queries, device=like.device)[:, None] + keys - queries
        k = torch.arange(keys, device=like.device)[None]
        found = [holds(one, q, k) for one in self.trees]
        return found[0] if len(found) == 1 else torch.stack(found)

    def forward(self, scores: Tensor) -> Tensor:
        """Scores (..., heads, queries, keys) before their softmax."""
        return scores.masked_fill(~self.keep(scores.shape[-2], scores.shape[-1], scores), -torch.inf)


class HiddenBeside(nn.Module):
    """The same of a core's own mask or bias, which may be narrower than the scores."""

    def __init__(self, hidden: Hidden) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, given: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """A mask as the core takes it."""
        keep = self.hidden.keep(q.shape[-2], k.shape[-2], q)
        if given.dtype == torch.bool:
            return given & keep
        return (
            given.masked_fill(~keep, -torch.inf)
            if given.shape[-2:] == keep.shape[-2:]
            else torch.where(keep, given, -torch.inf)
        )


def backends(program: ExportedProgram, pairs: Pairs) -> dict[str, str]:
    """What computes each sparse site in the graph; for one that the graph cannot be given a mask "refused: why"."""
    module = program.module()
    out: dict[str, str] = {}
    for name, (site, new) in pairs.items():
        if isinstance(new.site.form, Sparse):
            core = _core(module, site, new.site.mask)
            out[name] = f"refused: {core}" if isinstance(core, str) else _backend(core)
    return out


def hide(module: GraphModule, pairs: Pairs) -> None:
    """Give every sparse site's core its mask."""
    for number, (site, new) in enumerate(pairs.values()):
        if not isinstance(new.site.form, Sparse):
            continue
        core = _core(module, site, new.site.mask)
        if isinstance(core, str):
            raise ValueError(f"{site.name}: {core}")
        _hide(module, core, new.site.mask, site, f"reattn_sparse_{number}")


def _backend(core: Node) -> str:
    if not _fused(core):
        return SCORES
    return OPERATOR if _given(core) is None and not _dropout(core) else TABLE


def _hide(module: GraphModule, core: Node, mask: Mask, site: Site, name: str) -> None:
    kind = _backend(core)
    held: nn.Module
    if kind is OPERATOR:
        strides: Any = core.meta["val"].stride()
        scale: Any = core.kwargs.get("scale")
        held, args = Core(mask, scale, sorted(range(4), key=lambda i: -strides[i])), core.args[:3]
    elif kind is TABLE and _given(core) is not None:
        held, args = HiddenBeside(Hidden(mask, site.heads)), (_given(core), *core.args[:2])
    else:
        held, args = Hidden(mask, site.heads), core.args[:1]
    module.add_submodule(name, held)
    with module.graph.inserting_before(core):
        made = module.graph.call_module(name, tuple(args))
    if kind is OPERATOR:
        core.replace_all_uses_with(made)
        module.graph.erase_node(core)
    elif kind is TABLE:
        core.args = (*core.args[:3], made, *core.args[4:5], False, *core.args[6:])
        core.kwargs = {n: x for n, x in core.kwargs.items() if n not in ("attn_mask", "is_causal")}
    else:
        core.args = (made, *core.args[1:])


def _core(module: GraphModule, site: Site, mask: Mask) -> Node | str:
    """The one softmax or fused attention between the site's projections and its output projection."""
    if not isinstance(site.out, Output):
        return str(site.out)
    names = site_tensors(site) - {site.out.root.tensor, site.out.root.bias}
    nodes = list(module.graph.nodes)
    ahead = _reached([n for n in nodes if n.op == "get_attr" and n.target in names], forward=True)
    ends = [u for n in nodes if n.op == "get_attr" and n.target == site.out.root.tensor for u in n.users]
    inside = ahead & _reached(ends, forward=False)
    found = [n for n in nodes if n in inside and (_fused(n) or "softmax" in str(n.target))]
    if len(found) != 1:
        return f"{len(found)} softmaxes stand between its projections and its output projection"
    return _unfit(found[0], site, mask) or found[0]


def _unfit(core: Node, site: Site, mask: Mask) -> str | None:
    shape = core.args[0].meta["val"].shape if isinstance(core.args[0], Node) and "val" in core.args[0].meta else ()
    if _fused(core):
        return None if len(shape) == 4 else f"its core is given {len(shape)} axes, not rows, heads, tokens and dim"
    if any(isinstance(mod, Sink) for mod in site.mods):
        return "its softmax has a column beside the keys, for its sink"
    if core.args[1] not in (-1, len(shape) - 1):
        return "its softmax does not run over the last axis"
    if mask.per_head and (len(shape) < 3 or shape[-3] != site.heads):
        return (
            f"its scores have axes {tuple(shape)}, among which its {site.heads} heads do not stand before the queries"
        )
    return None


def _fused(node: Node) -> bool:
    return "scaled_dot_product_attention" in str(node.target)


def _given(core: Node) -> Any:
    return core.args[3] if len(core.args) > 3 else core.kwargs.get("attn_mask")


def _dropout(core: Node) -> Any:
    return core.args[4] if len(core.args) > 4 else core.kwargs.get("dropout_p")


def _reached(start: list[Node], *, forward: bool) -> set[Node]:
    seen, todo = set(start), list(start)
    while todo:
        node = todo.pop()
        for more in node.users if forward else node.all_input_nodes:
            if more not in seen:
                seen.add(more)
                todo.append(more)
    return seen
