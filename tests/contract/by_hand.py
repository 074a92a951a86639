"""Sites written by hand, so that emission is tested without the finder; and the plainest rewriting there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rewrite.heads import Heads, Rewritten, Weights
from rewrite.layout import gather
from rewrite.mask import window
from rewrite.site import Affine, Grouped, Mod, Norm, Operand, Output, Proof, Root, Sink, Site


def root(model: nn.Module, path: str) -> Root:
    """The projection at a module path: nn.Linear, or Conv1D, which is the same transposed."""
    module: Any = model.get_submodule(path)
    across = not isinstance(module, nn.Linear) and type(module).__name__ == "Conv1D"
    first, second = module.weight.shape
    rows, columns = (second, first) if across else (first, second)
    starts = np.arange(rows) if across else np.arange(rows) * columns
    bias = path + ".bias" if getattr(module, "bias", None) is not None else None
    at = None if bias is None else np.arange(rows)
    return Root(path + ".weight", starts, rows if across else 1, columns, bias, at, path, path)


def operand(root: Root, rows: Any, gain: Affine | None = None, norm: Norm | None = None) -> Operand:
    rows = np.asarray(rows, dtype=np.int64)
    return Operand((root,), rows, gain or Affine(np.ones(rows.shape)), norm)


def site(model: nn.Module, path: str, q: str, k: str, v: str, o: str, heads: int, kv_heads: int, layout: str) -> Site:
    """`layout`: "apart"; "blocks" (q, k, v rows one after the other); "turns" (q, k, v rows head by head)."""
    roots = [root(model, f"{path}.{name}") for name in (q, k, v)]
    out = root(model, f"{path}.{o}")
    dim = out.columns // heads
    counts, starts = (heads, kv_heads, kv_heads), (0, 0, 0)
    if layout == "blocks":
        starts = (0, heads * dim, (heads + kv_heads) * dim)
    rows = [s + np.arange(n * dim).reshape(n, dim) for s, n in zip(starts, counts, strict=True)]
    if layout == "turns":
        rows = [np.arange(heads * 3 * dim).reshape(heads, 3, dim)[:, i] for i in range(3)]
    sides = [operand(r, x) for r, x in zip(roots, rows, strict=True)]
    kv_of = tuple(j // (heads // kv_heads) for j in range(heads))
    return Site(
        name=path,
        q=sides[0],
        k=sides[1],
        v=sides[2],
        heads=heads,
        kv_of=kv_of,
        form=Grouped(kv_heads),
        mask=window(4),
        scale=(1.0,),
        mods=(),
        out=Output(out, np.arange(heads * dim).reshape(heads, dim)),
        cross=False,
        proof=Proof((), (), ""),
    )


def with_sink(site: Site, tensor: str) -> Site:
    index = np.arange(site.heads)
    logits = Affine(np.zeros(site.heads), np.ones(site.heads), tensor, index)
    mods: tuple[Mod, ...] = (Sink(logits),)
    return replace(site, mods=mods)


def with_row_norm(site: Site, tensor: str) -> Site:
    """A k norm over all heads at once, with a weight for every channel."""
    shape = site.k.rows.shape
    gain = Affine(np.zeros(shape), np.ones(shape), tensor, np.arange(site.k.rows.size).reshape(shape))
    return replace(site, k=operand(site.k.roots[0], site.k.rows, gain, Norm("rms", "row", 1e-6)))


def tensors_of(model: nn.Module) -> Any:
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return (found | dict(model.named_buffers(remove_duplicate=False))).__getitem__


def keep(site: Site, kv_heads: int, weights: Weights, order: tuple[int, ...] | None = None) -> Rewritten:
    """Of each group of kv heads the first; query heads as they are or in another order."""
    group = site.k.heads // kv_heads
    pick = list(range(0, site.k.heads, group))

    def few(h: Heads, at: list[int]) -> Heads:
        return Heads(h.weight[at], None if h.bias is None else h.bias[at], h.gain[at])

    order = order or tuple(range(site.heads))
    new = Weights(few(weights.q, list(order)), few(weights.k, pick), few(weights.v, pick), weights.out[:, list(order)],
                  weights.out_bias)  # fmt: skip
    small = replace(
        site,
        form=Grouped(kv_heads),
        kv_of=tuple(g // group for g in site.kv_of),
        k=replace(site.k, rows=site.k.rows[pick]),
        v=replace(site.v, rows=site.v.rows[pick]),
    )
    return Rewritten(small, new, order)


def changes(
    model: PreTrainedModel, sites: list[Site], kv_heads: int, **other: int
) -> dict[str, tuple[Site, Rewritten]]:
    """Every site rewritten to `kv_heads`; `other` gives the last part of a layer's number another count."""
    tensors = tensors_of(model)
    return {s.name: (s, keep(s, other.get(s.name, kv_heads), gather(s, tensors))) for s in sites}
