"""Coarse scores in plain torch: what generated kernels compute on a GPU (codegen/coarse_launch.py) is held to this.

Both files have the same functions. Scores of blocks come a part of the rows at a time, so that nothing as large as all
pairs of tokens is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 16
"""Rows of blocks whose scores are held at once."""
Scores = Callable[[int, int], Tensor]
"""Rows first .. last of blocks as (b, h, rows, columns), in float32 or wider."""


def antidiagonal(q: Tensor, k: Tensor, factor: float, block: int, stride: int) -> Scores:
    """The softmax over groups of `stride` tokens, summed over blocks; a group's product is along antidiagonals."""
    s, cells = stride, block // stride
    # the last query of a group meets the group's first key
    coarse_q, coarse_k = _groups(q, s, block).flip(-2).flatten(-2), _groups(k, s, block).flatten(-2)
    real_q, real_k = -(-q.shape[2] // s), -(-k.shape[2] // s)
    before = (k.shape[2] - q.shape[2]) // s

    def scores(first: int, last: int) -> Tensor:
        at_q = torch.arange(first * cells, last * cells, device=q.device)
        at_k = torch.arange(coarse_k.shape[2], device=q.device)
        seen = (at_k <= at_q[:, None] + before) & (at_k < real_k)
        products = factor * _products(coarse_q[:, :, first * cells : last * cells], coarse_k)
        mass = products.masked_fill(~seen, -math.inf).softmax(-1)
        mass = mass * (at_q < real_q)[:, None]
        return mass.unflatten(-1, (-1, cells)).sum(-1).unflatten(-2, (-1, cells)).sum(-2)

    return scores


def pooled(q: Tensor, k: Tensor, factor: float, block: int) -> Scores:
    """The softmax over the products of blocks' means."""
    mean_q, mean_k = (_means(x, block) for x in (q, k))
    before = (k.shape[2] - q.shape[2]) // block

    def scores(first: int, last: int) -> Tensor:
        at_q = torch.arange(first, last, device=q.device)
        seen = torch.arange(mean_k.shape[2], device=q.device) <= before + at_q[:, None]
        products = factor * _products(mean_q[:, :, first:last], mean_k)
        return products.masked_fill(~seen, -math.inf).softmax(-1)

    return scores


def columns(q: Tensor, k: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The softmax of queries at the end of the keys, summed over its columns and over its diagonals: (b, h, keys) by
    key, and by how far the key is behind the query."""
    keys = k.shape[2]
    at_q = torch.arange(keys - q.shape[2], keys, device=q.device)[:, None]
    at_k = torch.arange(keys, device=q.device)
    mass = (factor * _products(q, k)).masked_fill(at_k > at_q, -math.inf).softmax(-1)
    # entry (q, distance) stands at key q - distance
    turned = mass.gather(-1, (at_q - at_k).clamp(min=0).expand_as(mass)) * (at_k <= at_q)
    return mass.sum(-2), turned.sum(-2)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """(b, h, rows, columns) in float32; the heads of a kv head become rows, so that no key is copied."""
    folded = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ k.mT
    return folded.float().unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def _padded(x: Tensor, block: int) -> Tensor:
    """Whole blocks of tokens, zeros at the end."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))


def _groups(x: Tensor, stride: int, block: int) -> Tensor:
    """(b, h, groups, stride, d)."""
    return _padded(x, block).unflatten(2, (-1, stride))


def _means(x: Tensor, block: int) -> Tensor:
    """(b, h, blocks, d) in float32, of the tokens that are there."""
    sums = _padded(x, block).unflatten(2, (-1, block)).float().sum(3)
    there = torch.full((sums.shape[2], 1), float(block), device=x.device)
    there[-1] = x.shape[2] - block * (sums.shape[2] - 1)
    return sums / there
