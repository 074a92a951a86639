"""Sites made by hand, for tests of passes that read a `Site` and no graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rewrite.mask import causal
from rewrite.site import Affine, Dense, Grouped, Norm, Operand, Output, Proof, Root, Rope, Site

LAYOUTS = ("separate", "thirds", "per head", "conv1d")


def half_rope(dim: int, base: float = 10_000.0) -> Rope:
    n = dim // 2
    pairs = np.stack([np.arange(n), np.arange(n) + n], 1)
    return Rope(pairs, base ** (-np.arange(n) / n), np.zeros(n))


def make_site(
    layout: str = "separate",
    heads: int = 4,
    kv_heads: int = 4,
    dim: int = 4,
    width: int = 12,
    *,
    bias: bool = True,
    rope: Rope | None = None,
    norm: Norm | None = None,
    seed: int = 0,
) -> tuple[Site, dict[str, Tensor]]:
    """A site named "attn" and random tensors for it; the layout says how q, k and v lie in the checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def draw(name: str, *shape: int) -> None:
        tensors[name] = torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
    roots, where = _roots(layout, rows, heads, dim, width, bias, draw)
    draw("o.weight", width, heads * dim)
    draw("o.bias", width)
    out = Root("o.weight", np.arange(width) * heads * dim, 1, heads * dim, "o.bias" if bias else None, np.arange(width))

    def operand(which: str, count: int) -> Operand:
        one = Affine(np.ones((count, dim)))
        turned = which != "v"
        return Operand(
            (roots[which],),
            where[which].reshape(count, dim),
            one,
            norm=norm if turned else None,
            rope=rope if turned else None,
        )

    group = heads // kv_heads
    site = Site(
        name="attn",
        q=operand("q", heads),
        k=operand("k", kv_heads),
        v=operand("v", kv_heads),
        heads=heads,
        kv_of=tuple(h // group for h in range(heads)),
        form=Dense(kv_heads) if group == 1 else Grouped(kv_heads),
        mask=causal,
        scale=(dim**-0.5,),
        mods=(),
        out=Output(out, np.arange(heads * dim).reshape(heads, dim)),
        cross=False,
        proof=Proof((), (), ""),
    )
    return site, tensors


def shared_site(
    heads: int = 4, plain: int = 4, turning: int = 4, value: int = 3, rank: int = 8, seed: int = 0
) -> tuple[Site, dict[str, Tensor]]:
    """A site whose heads are expanded from `rank` numbers and share one key of `turning`, between the plain dims and
    none: the layout of DeepSeek, its rows of keys and values side by side. All read as many numbers as it caches."""
    width, dim, rows = rank + turning, plain + turning, heads * (plain + value)
    made, tensors = make_site(heads=heads, kv_heads=heads, dim=dim, width=width, bias=False, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, shape in (("up", (rows, rank)), ("down", (width, width)), ("o", (width, heads * value))):
        tensors[f"{name}.weight"] = torch.randn(*shape, generator=generator, dtype=torch.float64)
    up = Root("up.weight", np.arange(rows) * rank, 1, rank, source="normed")
    down = Root("down.weight", np.arange(width) * width, 1, width, source="hidden")
    table = np.arange(rows).reshape(heads, plain + value)
    shared = np.broadcast_to(np.arange(rank, width), (heads, turning))
    n = turning // 2
    rope = Rope(plain + np.arange(turning).reshape(-1, 2), np.array([1.0, 0.1, 0.01, 0.001])[:n], np.zeros(n))
    k = Operand(
        (down, up), np.concatenate([width + table[:, :plain], shared], 1), Affine(np.ones((heads, dim))), rope=rope
    )
    v = Operand((up,), table[:, plain:], Affine(np.ones((heads, value))))
    out = Root("o.weight", np.arange(width) * heads * value, 1, heads * value)
    columns = np.arange(heads * value).reshape(heads, value)
    return replace(made, q=replace(made.q, rope=rope), k=k, v=v, out=Output(out, columns)), tensors


def _roots(layout, rows, heads, dim, width, bias, draw):
    if layout == "separate":
        return _separate(rows, width, bias, draw)
    total = sum(rows.values())
    conv = layout == "conv1d"
    draw("qkv.weight", *((width, total) if conv else (total, width)))
    draw("qkv.bias", total)
    starts, stride = (np.arange(total), total) if conv else (np.arange(total) * width, 1)
    root = Root("qkv.weight", starts, stride, width, "qkv.bias" if bias else None, np.arange(total))
    if layout == "per head":
        if rows["k"] != rows["q"]:
            raise ValueError("per-head interleave needs as many kv heads as query heads")
        table = np.arange(total).reshape(heads, 3, dim)
        where = {w: table[:, i].reshape(-1) for i, w in enumerate("qkv")}
    else:
        ends = np.cumsum([0, *rows.values()])
        where = {w: np.arange(ends[i], ends[i + 1]) for i, w in enumerate("qkv")}
    return dict.fromkeys("qkv", root), where


def _separate(rows, width, bias, draw):
    roots = {}
    for which, count in rows.items():
        draw(f"{which}.weight", count, width)
        draw(f"{which}.bias", count)
        roots[which] = Root(
            f"{which}.weight", np.arange(count) * width, 1, width, f"{which}.bias" if bias else None, np.arange(count)
        )
    return roots, {w: np.arange(c) for w, c in rows.items()}
