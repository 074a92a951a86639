"""A site's weights head by head, and what a target makes of them: the one form in which weights are computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rewrite.site import Site


@dataclass(frozen=True, eq=False)
class Heads:
    """One operand head by head: weight (heads, dim, inputs), bias (heads, dim) or None, gain (heads, dim)."""

    weight: Tensor
    bias: Tensor | None
    gain: Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """A site's weights in float64, in the site's own head order: out (outputs, heads, dim), out_bias (outputs,)."""

    q: Heads
    k: Heads
    v: Heads
    out: Tensor
    out_bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Rewritten:
    """What a target makes of a site. `site` is the new one; query head j of `weights` is head `order[j]` of the
    source. Where `order` is the identity `kv_of` may be any map; else heads are permuted so that it is j // group."""

    site: Site
    weights: Weights
    order: tuple[int, ...]
    notes: tuple[str, ...] = ()
