"""Keys and values that are a linear function of few numbers of a token, y = (c, r): a latent c that one projection
expands to all heads, and keys r of a second projection that all heads share. Such a site caches y.

    values         up_v @ c                 keys            up_k @ c on some dims, r on the others
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewrite.site import IntArray, Operand, Root, Site


@dataclass(frozen=True, eq=False)
class Shared:
    """What a site's keys and values share."""

    up: Root
    """The projection that reads c."""
    key: Root
    """The projection that gives r."""
    dims: IntArray
    """(rope_dim,) dims of every key head that are r, in its order."""
    rows: IntArray
    """(rope_dim,) which rows of `key` they are."""
    up_rows: tuple[IntArray, IntArray]
    """Rows of `up` that keys (heads, dim) and values (heads, dim) are; -1 where it is r."""

    @property
    def rank(self) -> int:
        """Numbers of c."""
        return self.up.columns

    @property
    def width(self) -> int:
        """Numbers of y."""
        return self.rank + len(self.dims)


def shared(site: Site) -> Shared | None:
    """What its keys and values share, or None where they are no such function of fewer numbers than they have."""
    k, v = site.k, site.v
    if len(k.roots) != 2 or len(v.roots) != 1 or k.heads != v.heads or not (_plain(k) and _plain(v)):
        return None
    up = v.roots[0]
    places = [i for i, root in enumerate(k.roots) if (root.tensor, root.source) == (up.tensor, up.source)]
    if len(places) != 1 or up.bias is not None:
        return None
    at = places[0]
    bounds = [0, k.roots[0].rows, k.roots[0].rows + k.roots[1].rows]
    expanded = (k.rows >= bounds[at]) & (k.rows < bounds[at + 1])
    if (expanded != expanded[:1]).any():
        return None
    key, dims = k.roots[1 - at], np.flatnonzero(~expanded[0])
    rows = k.rows[:, dims] - bounds[1 - at]
    turning = np.empty(0, dtype=np.int64) if k.rope is None else k.rope.pairs.reshape(-1)
    if not len(dims) or (rows != rows[:1]).any() or not np.isin(turning, dims).all():
        return None
    starts = {int(start): row for row, start in enumerate(up.starts)}
    of_keys = np.where(expanded, k.rows - bounds[at], 0)
    placed = [starts.get(int(start), -1) for start in k.roots[at].starts[of_keys].reshape(-1)]
    if min(placed) < 0:
        return None
    up_k = np.where(expanded, np.array(placed).reshape(k.rows.shape), -1)
    found = Shared(up, key, dims, rows[0], (up_k, v.rows))
    return found if found.width < k.heads * (k.dim + v.dim) else None


def _plain(operand: Operand) -> bool:
    """Neither a norm nor a shift stands between projections and rope."""
    return operand.norm is None and operand.shift is None
