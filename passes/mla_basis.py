"""y, the numbers of a token that a latent is made of, and keys and values as a function of them.

Where all heads have keys and values of their own, y is those. Where they share fewer numbers (rewrite/shared.py), y is
these, keys and values are `basis @ y`, and everything is as wide as what the source caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.latent import features
from rewrite.heads import Weights
from rewrite.shared import shared
from rewrite.site import Site


def basis(site: Site, weights: Weights) -> Tensor | None:
    """(keys and values, features) from y to keys and values of all heads, None where y is them."""
    if shared(site) is None:
        return None
    return torch.cat([(x.weight * x.gain[..., None]).flatten(0, 1) for x in (weights.k, weights.v)])


def back(rows: Tensor | None) -> Tensor | None:
    """(features, keys and values) the way back, by least squares; what of y reaches no head is left out."""
    return None if rows is None else torch.linalg.pinv(rows.T @ rows, hermitian=True) @ rows.T


def of_tokens(k: Tensor, v: Tensor, inverse: Tensor | None) -> Tensor:
    """(b, s, features) y of tokens from k (b, g, s, d) before the rope and v (b, g, s, dv)."""
    rows = features(k, v)
    return rows if inverse is None else rows @ inverse.T.to(rows)


def keys_values(site: Site, rows: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor]:
    """(..., g * d) and (..., g * dv) of y (..., features)."""
    whole = y if rows is None else y @ rows.T.to(y)
    k, v = whole.split([site.k.heads * site.k.dim, site.v.heads * site.v.dim], -1)
    return k, v
