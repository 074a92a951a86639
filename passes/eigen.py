"""Eigendecompositions of symmetric matrices, on one thread.

LAPACK reduces a matrix column by column, and threads meet at each: two of them gain next to nothing on idle cores and
take ten times as long where a core is shared. One thread also gives the same bits however many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.gqa_source import FLOOR
from rewrite.threads import one_thread

TINY = 1e-300


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, least first, and eigenvectors."""
    with one_thread():
        values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def eigvalsh(gram: Tensor) -> Tensor:
    """Eigenvalues, least first."""
    with one_thread():
        return torch.linalg.eigvalsh(gram)


def orthonormal(columns: Tensor) -> Tensor:
    """Columns that span the same."""
    with one_thread():
        return torch.linalg.qr(columns)[0]


def rooted(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric roots of (g, n, n) and their inverses; what is nothing beside the layer's largest is raised to it."""
    values, vectors = eigh((metric + metric.transpose(1, 2)) / 2)
    values = raised(values).sqrt()
    return vectors @ (values[..., None] * vectors.mT), vectors @ ((1 / values)[..., None] * vectors.mT)


def raised(x: Tensor) -> Tensor:
    """What is nothing beside the largest, raised to `FLOOR` of it."""
    return x.clamp(min=max(FLOOR * float(x.max()), TINY)) if x.numel() else x
