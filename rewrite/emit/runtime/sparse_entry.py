"""What stands before a module with masks of its own and before its attention kernel."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, EncoderDecoderCache

from rewrite.emit.runtime.heads import Part
from rewrite.emit.runtime.latent_entry import kernel_of
from rewrite.emit.runtime.sparse import TILE, Given, Hand, Sparse, starts
from rewrite.emit.runtime.sparse_cache import SparsePair, SparseView
from rewrite.emit.runtime.sparse_run import Attend

SPARSE_KERNEL = "reattn_sparse"
TAKES = ("sdpa", "eager")


class EnterSparse:
    """Forward pre-hook of an attention module: its caches become views, and the call starts anew."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the call as the class says."""
        sparse: Sparse = module.reattn
        sparse.call = Given()
        return tuple(seen(a, sparse) for a in args), {n: seen(v, sparse) for n, v in kwargs.items()}


def seen(value: Any, sparse: Sparse) -> Any:
    """A cache as a view, anything else as it is."""
    if isinstance(value, EncoderDecoderCache):
        return SparsePair(value, sparse)
    return SparseView(value, sparse) if isinstance(value, Cache) else value


def sparse_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """The attention function of such a module: the one that its model was told to use, on the keys that are read."""
    sparse: Sparse = module.reattn
    name = sparse.source._attn_implementation
    if name not in TAKES:
        raise ValueError(
            f"attention '{name}' is asked for, and takes no mask by head: choose one of {', '.join(TAKES)} with "
            "set_attn_implementation"
        )
    call, sparse.call = sparse.call, Given()
    call.starts = starts(attention_mask) if sparse.shift else None
    hands = written(call)
    out = operated(sparse, call, module, query, key, value, attention_mask, kwargs) if name == "sdpa" else None
    if out is not None:
        return out.transpose(1, 2), None
    attend = Attend(module, name, kernel_of(module, sparse.source), call, attention_mask, kwargs)
    outs: list[Tensor] = []
    weights: list[Tensor | None] = []
    for i, group in enumerate(sparse.groups):
        q = sparse.queries(query, group)
        if hands is not None:
            out, p = attend.held(group, q, hands[i])
        else:
            run = attend.tiled if tiles(query, name, kwargs) and group.keep is not None else attend.dense
            out, p = run(group, q, sparse.shown(key, group), sparse.shown(value, group))
        outs.append(out)
        weights.append(p)
    whole = [p for p in weights if p is not None]
    alike = len(whole) == len(outs) and len({p.shape[-1] for p in whole}) == 1
    return sparse.joined(outs), sparse.joined([p.transpose(1, 2) for p in whole]).transpose(1, 2) if alike else None


def operated(
    sparse: Sparse,
    call: Given,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """(batch, heads, tokens, dim) of a whole text without padding by reattn's operator, which runs its own kernel on a
    GPU. None where the process has not loaded it (`from rewrite import attention` does), or the call is another."""
    rest = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    other = rest or kwargs.get("dropout") or isinstance(getattr(module, "sinks", None), Tensor)
    if sparse.algebra is None or given is not None or other or call.past or q.shape[2] != k.shape[2]:
        return None
    if not hasattr(torch.ops.reattn, "attention"):
        return None
    scale = kwargs.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.reattn.attention(q, k, v, sparse.algebra, "", [], scale, None, None, None, None, None, None)[0]


def written(call: Given) -> list[Hand] | None:
    """Write what the module gave its cache, now that the mask tells where each row begins. Gives what is at hand where
    that is more than what was given."""
    if call.layer is None:
        return None
    hands = call.layer.append(*call.new, None if call.starts is None else call.starts[:, 0, -1, 0])
    return hands if call.past else None


def tiles(query: Tensor, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether queries are taken tile by tile: not where all probabilities are asked for at once, drawn from, or where
    the call is recorded for other lengths."""
    tokens = query.shape[2]
    recorded = isinstance(tokens, torch.SymInt) or torch.compiler.is_compiling()
    return name == "sdpa" and not recorded and tokens > TILE and not kwargs.get("dropout")


def install_sparse(model: Part, recipe: dict[str, Any]) -> None:
    """One site with masks of its own."""
    module: Any = model.get_submodule(recipe["module"])
    module.reattn = Sparse(recipe["groups"], recipe["shift"], recipe["algebra"], module.config)
    module.config = copy.copy(module.config)
    # the module's own copy of the config alone names this kernel, so the model's choice stays the user's
    module.config._attn_implementation_internal = SPARSE_KERNEL
    module.register_forward_pre_hook(EnterSparse(), with_kwargs=True)


AttentionInterface.register(SPARSE_KERNEL, sparse_attention)
