"""A site's weights head by head, and what a target makes of them: the one form in which weights are computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rewrite.site import Norm, Site


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
class KeyNorm:
    """What the model does to raw keys (g, d) of a token: gain (g, d) times norm."""

    norm: Norm
    gain: Tensor


@dataclass(frozen=True, eq=False)
class Latents:
    """What a site caches in place of keys and values, and how it is read. Float64.

    y (features,) of a token: keys of all kv heads after norm, gain and shift and before the rope, head after head,
    then values: features = g * d + g * dv; or the fewer numbers that all heads share (rewrite/shared.py). With rotation
    R_t by `frequencies` on channel pairs (2j, 2j + 1):

        cached     c = down @ y,   r = R_s (turn @ y)
        score      scale * ((read[h] @ q_h) . c  +  R_t (query_turn[h] @ q_h) . r)      softcap, bias, mask as before
        output     out[h] @ (up_v[h] @ (sum_s p_s c_s)),  then out_bias

    q_h is the query before the rope. A constant start of the source's rope stands in `turn` and `query_turn`.
    Rebuilt: no rope channels; the key of kv head i is up_k[i] @ c, and is turned by the source's own rope. With
    `key_norm` the keys in y are raw, as the projection gives them, and rebuilt keys are normed before they turn.
    """

    down: Tensor
    """(rank, features)"""
    turn: Tensor
    """(rope_dim, features)"""
    read: Tensor
    """(h, rank, d)"""
    query_turn: Tensor
    """(h, rope_dim, d)"""
    up_v: Tensor
    """(h, dv, rank)"""
    frequencies: Tensor
    """(rope_dim / 2,), in radians per token; one may occur several times"""
    up_k: Tensor | None = None
    """(g, d, rank), of the rebuilt form alone"""
    key_norm: KeyNorm | None = None
    """Of the rebuilt form alone"""

    @property
    def rank(self) -> int:
        """Numbers cached as they are."""
        return self.down.shape[0]

    @property
    def rope_dim(self) -> int:
        """Numbers cached turned."""
        return self.turn.shape[0]


@dataclass(frozen=True, eq=False)
class Factor:
    """A projection as a product: weight (heads * dim, inputs) = up @ down. Float64."""

    up: Tensor
    """(heads * dim, rank), head after head"""
    down: Tensor
    """(rank, inputs)"""


@dataclass(frozen=True, eq=False)
class Factors:
    """Projections of keys and values through few numbers, where nothing is cached; None is one that stays as it is.
    The weights beside them are the very same numbers at full width."""

    k: Factor | None
    v: Factor | None

    @property
    def shared(self) -> bool:
        """Keys and values come from the same numbers."""
        return self.k is not None and self.v is not None and self.k.down is self.v.down

    @property
    def ranks(self) -> tuple[int | None, ...]:
        """How many numbers, as in `rewrite.site.Factored`."""
        ranks = tuple(None if part is None else part.down.shape[0] for part in (self.k, self.v))
        return ranks[:1] if self.shared else ranks


@dataclass(frozen=True, eq=False)
class Rewritten:
    """What a target makes of a site. `site` is the new one; query head j of `weights` is head `order[j]` of the
    source. Where `order` is the identity `kv_of` may be any map; else heads are permuted so that it is j // group.

    With `latents` the site's q, k and v are the source's (they say what y is) and of `weights` only `out` and
    `out_bias` are new. A `site` that is the source's own says that nothing changed, and `notes` why."""

    site: Site
    weights: Weights
    order: tuple[int, ...]
    notes: tuple[str, ...] = ()
    latents: Latents | None = None
    factors: Factors | None = None


@dataclass(frozen=True, eq=False)
class Change:
    """One converted site: what it was, what it became, and the attention output's relative squared error on the
    calibration text (None without calibration)."""

    site: Site
    rewritten: Rewritten
    error: float | None
