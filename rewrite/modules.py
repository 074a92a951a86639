"""Which modules of the model a site's parts belong to, told by the names of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rewrite.heads import KeyNorm, Weights
from rewrite.site import Affine, Operand, Site


def common(paths: Sequence[str]) -> str:
    """The deepest module path that all lie in."""
    parts = [path.split(".") if path else [] for path in paths]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def owner(site: Site) -> str:
    """The module that holds all projections of the site."""
    tensors = [r.tensor for o in (site.q, site.k, site.v) for r in o.roots]
    return common([".".join(tensor.split(".")[:-2]) for tensor in tensors])


def key_norm_module(site: Site) -> str:
    """The module whose parameter is the gain of the key norm."""
    return (site.k.gain.tensor or "").rpartition(".")[0]


def why_normed(site: Site) -> str | None:
    """Why keys behind a norm can be cached only as the norm gives them, or None where raw ones can be."""
    k, held = site.k, owner(site)
    if k.gain.tensor is None:
        return "its key norm has no parameter by which the module that norms could be told"
    if not key_norm_module(site).startswith(f"{held}." if held else ""):
        return f"its key norm's gain '{k.gain.tensor}' belongs to no module of its own inside '{held}'"
    if key_norm_module(site) == held:
        return f"its key norm is written out in '{held}' and is no module that could be left out"
    if k.gain.tensor == site.q.gain.tensor:
        return f"one module norms queries and keys, '{key_norm_module(site)}'"
    if k.shift is not None:
        return "its key norm adds a constant"
    rows = k.rows if k.norm is None or k.norm.over == "head" else k.rows.reshape(1, -1)
    if not np.array_equal(rows, rows[:, :1] + np.arange(rows.shape[1])):
        return "its keys are in another order behind the norm than before it"
    return None


def caches_raw(site: Site) -> bool:
    """Whether the rebuilt form caches keys as the projection gives them, and norms them when they are read."""
    return site.k.norm is not None and why_normed(site) is None


def raw_keys(operand: Operand) -> Operand:
    """Keys without their norm."""
    return replace(operand, norm=None, gain=Affine(np.ones(operand.rows.shape)))


def raw_site(site: Site) -> Site:
    """The site as a latent of raw keys sees it."""
    return replace(site, k=raw_keys(site.k))


def raw_weights(weights: Weights) -> Weights:
    """The same of its weights."""
    return replace(weights, k=replace(weights.k, gain=weights.k.gain * 0 + 1))


def key_norm(site: Site, weights: Weights) -> KeyNorm | None:
    """What a latent of raw keys does when it reads them."""
    if site.k.norm is None or not caches_raw(site):
        return None
    return KeyNorm(site.k.norm, weights.k.gain)
