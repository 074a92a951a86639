"""Sizes of a model and of a site: what plan and report count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes.factor_shape import sides
from rewrite.checkpoint import Checkpoint, open_checkpoint
from rewrite.shared import shared
from rewrite.site import Dense, Factored, Latent, Operand, Refusal, Site, Sparse


@dataclass(frozen=True)
class Source:
    """The model as it is given. `each` is bytes per number of its main type."""

    label: str
    architecture: str
    parameters: int
    bytes: int
    each: int
    kind: str
    """Main type of its numbers: bfloat16."""
    held: str
    """Where the weights are: in 2 shards."""
    generates: bool
    """Whether it holds a cache while it generates text."""


def shape(site: Site) -> str:
    """How a site looks in one cell: dense 32 × 128, grouped 8 of 32 × 128, latent 448 + 64 for 32 heads,
    sparse 32 × 128, causal & window(64)."""
    if isinstance(site.form, Latent):
        turned = f" + {site.form.rope_dim}" if site.form.rope_dim else ""
        return f"{'rebuilt' if site.form.rebuilt else 'latent'} {site.form.rank}{turned} for {site.heads} heads"
    if isinstance(site.form, Factored):
        ranks = "/".join("dense" if r is None else str(r) for r in site.form.ranks)
        return f"factored {ranks} for {site.heads} heads"
    if isinstance(site.form, Sparse):
        many = f"{site.heads}" if site.kv_heads == site.heads else f"{site.kv_heads} of {site.heads}"
        left = str(site.mask) if site.form.density is None else f"{100 * site.form.density:.3g} % of the pairs"
        return f"sparse {many} × {site.k.dim}, {left}"
    few = shared(site)
    if few is not None:
        return f"latent {few.rank} + {len(few.dims)} for {site.heads} heads"
    width = f"{site.k.dim}" if site.k.dim == site.v.dim else f"{site.k.dim}/{site.v.dim}"
    if isinstance(site.form, Dense) or site.kv_heads == site.heads:
        return f"dense {site.heads} × {width}"
    return f"grouped {site.kv_heads} of {site.heads} × {width}"


def parameters(site: Site) -> int:
    """Numbers in the projections of a site, biases included. The number of kv heads is the form's: of a site that is
    only planned the operands are still those of the source."""

    def numbers(o: Operand, heads: int) -> int:
        return heads * o.dim * (o.roots[0].columns + (o.roots[0].bias is not None))

    out = 0 if isinstance(site.out, Refusal) else site.heads * site.v.dim * site.out.root.rows
    few = shared(site)
    if few is not None:
        given = few.up.rows * few.rank + len(few.dims) * (few.key.columns + (few.key.bias is not None))
        return numbers(site.q, site.heads) + given + out + _reading(site, few.width)
    if isinstance(site.form, Factored):
        have = sides(site)
        held = numbers(site.q, site.heads) + numbers(site.k, site.k.heads) + numbers(site.v, site.v.heads)
        return held - have.dense + have.cost(site.form.ranks) + out
    if isinstance(site.form, Latent):
        added = _reading(site, site.k.heads * (site.k.dim + site.v.dim))
        return numbers(site.q, site.heads) + sum(numbers(o, o.heads) for o in (site.k, site.v)) + out + added
    return numbers(site.q, site.heads) + sum(numbers(o, site.kv_heads) for o in (site.k, site.v)) + out


def _reading(site: Site, features: int) -> int:
    """Numbers of the maps to a latent and from it; the projections stay beside them."""
    held = site.form
    if not isinstance(held, Latent):
        return 0
    d, e = site.k.dim, site.v.dim
    return site.cache_per_token * features + site.heads * (held.rank * (d + e) + held.rope_dim * d)


def saved(before: tuple[Site, ...], after: tuple[Site, ...]) -> int:
    """Numbers that the model loses; layers that share their tensors count once."""
    seen: dict[tuple[str, ...], int] = {}
    for old, new in zip(before, after, strict=True):
        key = (*(r.tensor for r in old.k.roots), *(r.tensor for r in old.v.roots))
        seen[key] = parameters(old) - parameters(new)
    return sum(seen.values())


def describe(model: Any, module: Any) -> Source:
    """The model's label and sizes; those of a folder come from its headers, verified."""
    folder = Path(model) if isinstance(model, (str, Path)) else None
    held: Checkpoint | None = open_checkpoint(folder) if folder is not None else None
    tensors = {id(p): p for p in module.parameters()}.values()
    weight: dict[Any, int] = {}
    for p in tensors:
        weight[p.dtype] = weight.get(p.dtype, 0) + p.numel() * p.element_size()
    main = max(weight, key=lambda d: weight[d]) if weight else None
    generates = getattr(module, "can_generate", None)
    return Source(
        label=str(model) if folder is not None else type(module).__name__,
        architecture=type(module).__name__,
        parameters=sum(p.numel() for p in tensors),
        bytes=held.bytes if held else sum(weight.values()),
        each=main.itemsize if main is not None else 4,
        kind=str(main).removeprefix("torch.") if main is not None else "float32",
        held=_held(folder, held),
        generates=bool(generates()) if callable(generates) else False,
    )


def _held(folder: Path | None, found: Checkpoint | None) -> str:
    if found is not None:
        return f"in {count(len(found.headers), 'shard')}"
    return "in memory" if folder is None else "(no weights here)"


def count(n: int, what: str) -> str:
    """1 site, 2 sites."""
    return f"{n} {what}{'s' if n != 1 else ''}"
