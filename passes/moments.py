"""What calibration sums at a site. A target names what it `needs`; every sum is float64 and adds up over batches.

Letters: b batch, h query heads, g kv heads, t query tokens, s key tokens, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codegen.latent import features
from passes.mla_basis import of_tokens
from rewrite.site import Norm, Operand, Rope, Site

SCORES = 1 << 25
"""Scores (windows x heads x queries x keys) that are held at once: a quarter of a gigabyte in float64."""


@dataclass(frozen=True, eq=False)
class SiteBatch:
    """What one site sees on one batch."""

    site: Site
    u: Mapping[str, Tensor]
    """Outputs of the projections, (b, t, rows), under "q", "k" and "v"; several roots stand one after the other."""
    q: Tensor
    k: Tensor
    v: Tensor
    """(b, heads, t, dim) after norm, gain and shift, before the rope, float64."""
    p: Callable[[], Tensor]
    """Attention probabilities (b, h, t, s) of the site on this batch; computed when asked for."""
    keep: Tensor | None
    """(b, t) bool: tokens that count; None where all do."""
    part: Callable[[slice, Tensor | None], Tensor] | None = None
    """`p` of some windows and some queries, where it can be had without the others: a long window's are gigabytes."""
    back: Tensor | None = None
    """(features, keys and values) from keys and values to y, where they share fewer numbers (passes/mla_basis.py)"""
    apart: bool = False
    """Whether windows are known to stand apart (`windowed`)."""

    def some(self, windows: slice, queries: Tensor) -> Tensor:
        """(windows, h, queries, s) of `p`."""
        return self.p()[windows][:, :, queries] if self.part is None else self.part(windows, queries)

    @property
    def raw_k(self) -> Tensor:
        """(b, g, t, d): keys as the projection gives them, before norm and gain."""
        return self.u["k"][..., torch.from_numpy(self.site.k.rows)].transpose(1, 2)

    @property
    def y(self) -> Tensor:
        """(b, s, features) what a latent is made of: keys of all heads, then values, or the numbers that they share."""
        return of_tokens(self.k, self.v, self.back)


def q_gram(batch: SiteBatch) -> Tensor:
    """(h, d, d) sum of q qᵀ, head by head."""
    rows = _counted(batch.q, batch.keep)
    return torch.einsum("hna,hnb->hab", rows, rows)


def k_gram(batch: SiteBatch) -> Tensor:
    """(g*d + 1, g*d + 1) sum of k̃ k̃ᵀ, k̃ the keys of all heads with a 1 behind them (sums and count stand there)."""
    return _augmented(_counted(batch.k, batch.keep))


def v_gram(batch: SiteBatch) -> Tensor:
    """(g*d + 1, g*d + 1) sum of ṽ ṽᵀ, as `k_gram`."""
    return _augmented(_counted(batch.v, batch.keep))


def kv_gram(batch: SiteBatch) -> Tensor:
    """(features + 1, features + 1) sum of ỹ ỹᵀ, y what a latent is made of with a 1 behind it."""
    return _augmented(_counted(batch.y[:, None], batch.keep))


def raw_gram(batch: SiteBatch) -> Tensor:
    """The same with raw keys."""
    return _augmented(_counted(features(batch.raw_k, batch.v)[:, None], batch.keep))


def k_inverse(batch: SiteBatch) -> Tensor:
    """(g + 1,) sum of 1/ρ_i, ρ_i what the norm divides key head i by (1 without a norm); the count stands last."""
    return _inverse(batch.site.k, batch.u["k"], batch.keep)


def v_inverse(batch: SiteBatch) -> Tensor:
    """(g + 1,) as `k_inverse`, for values."""
    return _inverse(batch.site.v, batch.u["v"], batch.keep)


def phases(batch: SiteBatch) -> Tensor:
    """(3, h, d, d, 2) sums over queries of the phase moments of the rope; the last axis holds re and im.

    With φ_a the frequency of coordinate a (see `coordinates`) and Δ = key position - query position:
    [0] E_p[e^{i(φ_a - φ_b)Δ}] under the query's attention p, [1] E_p[e^{iφ_a Δ}]·conj(E_p[e^{iφ_b Δ}]),
    [2] as [0] with every visible key equal. Diagonals of [0] and [2] count the queries.
    """
    batch = windowed(batch)
    p = batch.p()[..., : batch.k.shape[2]]
    queries = batch.keep if batch.keep is not None and batch.keep.shape == p[:, 0, :, 0].shape else None
    if queries is not None:
        p = p * queries[:, None, :, None]
    even = (p > 0).double()
    even = even / even.sum(-1, keepdim=True).clamp(min=1.0)
    phi = frequencies(batch.site.k)
    total = [_by_distance(p, phi), _by_query(p, phi), _by_distance(even, phi)]
    return torch.view_as_real(torch.stack(total))


def apart(queries: int, scores: int) -> tuple[Tensor, ...]:
    """Queries that are looked at one after the other, so that of all their `scores` few are held at once."""
    return torch.arange(queries).split(max(1, SCORES // scores))


def turns(batch: SiteBatch) -> Tensor:
    """(h, d + 1, 2) sums over queries of E_p[e^{iφ_a Δ}] for every coordinate a, as in `phases`; then the attention
    that was counted."""
    batch = windowed(batch)
    (b, h, t, _), s = batch.q.shape, batch.k.shape[2]
    counts = batch.keep is not None and batch.keep.shape == (b, t)
    mass = torch.zeros(h, t + s - 1, dtype=torch.float64)
    for at in apart(t, b * h * s):
        p = batch.some(slice(None), at)[..., :s]
        p = p * batch.keep[:, None, at, None] if counts and batch.keep is not None else p
        after = t - 1 - int(at[-1])
        mass[:, after : after + len(at) + s - 1] += _distances(p)
    phi = torch.cat([frequencies(batch.site.k), torch.zeros(1, dtype=torch.float64)])
    turn = _turns(torch.arange(t + s - 1) - t + 1, phi)
    return torch.view_as_real(mass.to(turn.dtype) @ turn)


def windowed(batch: SiteBatch) -> SiteBatch:
    """The batch with its windows apart: a projection that takes rows of tokens gives one window of all of them."""
    if batch.apart:
        return batch
    if batch.part is None:
        p = batch.p()
        batch = replace(batch, p=lambda: p)
    windows = batch.some(slice(None), torch.zeros(1, dtype=torch.long)).shape[0]

    def apart(x: Tensor) -> Tensor:
        """(1, heads, b*t, d) to (b, heads, t, d)."""
        return x if x.shape[0] == windows else x.squeeze(0).unflatten(1, (windows, -1)).transpose(0, 1)

    u = {n: x if x.shape[0] == windows else x.reshape(windows, -1, x.shape[-1]) for n, x in batch.u.items()}
    return replace(batch, u=u, q=apart(batch.q), k=apart(batch.k), v=apart(batch.v), apart=True)


NEEDS: Mapping[str, Callable[[SiteBatch], Tensor]] = {
    "q_gram": q_gram,
    "k_gram": k_gram,
    "v_gram": v_gram,
    "kv_gram": kv_gram,
    "k_inverse": k_inverse,
    "v_inverse": v_inverse,
    "phases": phases,
    "turns": turns,
}
"""Every statistic that a target may ask for."""


def coordinates(rope: Rope | None, dim: int) -> Tensor:
    """(d, d) unitary map to coordinates in which the rope is diagonal: per pair (x_a + i·x_b)/√2 and its conjugate
    in the places of a and b, plain dims as they are."""
    u = torch.eye(dim, dtype=torch.complex128)
    if rope is None:
        return u
    root = 0.5**0.5
    for a, b in rope.pairs.tolist():
        u[a, a], u[a, b] = root, root * 1j
        u[b, a], u[b, b] = root, -root * 1j
    return u


def frequencies(operand: Operand) -> Tensor:
    """(d,) turn per position of every coordinate; 0 where nothing rotates. Tables of angles that are not affine in
    the position have none: there the caller must not ask."""
    phi = torch.zeros(operand.dim, dtype=torch.float64)
    rope = operand.rope
    if rope is not None and len(rope.frequencies):
        turn = torch.from_numpy(rope.frequencies).double()
        phi[rope.pairs[:, 0]] = turn
        phi[rope.pairs[:, 1]] = -turn
    return phi


def divisor(norm: Norm | None, u: Tensor) -> Tensor:
    """(..., heads, 1) what the norm divides heads by; u (..., heads, dim)."""
    if norm is None:
        return torch.ones_like(u[..., :1])
    u = u if norm.over == "head" else u.flatten(-2)[..., None, :]
    if norm.kind == "layer":
        u = u - u.mean(-1, keepdim=True)
    square = u.square().sum(-1, keepdim=True) if norm.kind == "l2" else u.square().mean(-1, keepdim=True)
    return (square + norm.eps).sqrt()


def _inverse(operand: Operand, u: Tensor, keep: Tensor | None) -> Tensor:
    heads = u.double()[..., torch.from_numpy(operand.rows)]
    one_over = (1 / divisor(operand.norm, heads))[..., 0].expand(*heads.shape[:-1])
    rows = _counted(one_over.transpose(1, 2)[..., None], keep)[..., 0]
    return torch.cat([rows.sum(1), torch.tensor([float(rows.shape[1])], dtype=torch.float64)])


def _counted(x: Tensor, keep: Tensor | None) -> Tensor:
    """(heads, tokens, dim) of those tokens that count; a mask of another length belongs to other tokens."""
    rows = x.transpose(0, 1).flatten(1, 2)
    return rows[:, keep.reshape(-1)] if keep is not None and keep.numel() == rows.shape[1] else rows


def _augmented(rows: Tensor) -> Tensor:
    flat = rows.transpose(0, 1).flatten(1)
    flat = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
    return flat.T @ flat


def _by_distance(p: Tensor, phi: Tensor) -> Tensor:
    """(h, d, d) sum over queries of E_p[e^{i(φ_a - φ_b)Δ}], from the distribution of distances."""
    t, s = p.shape[-2:]
    turn = _turns(torch.arange(t + s - 1) - t + 1, phi)
    return torch.stack([(turn.T * m) @ turn.conj() for m in _distances(p)])


def _distances(p: Tensor) -> Tensor:
    """(h, t + s - 1) attention by distance, from 1 - t on."""
    _, heads, t, s = p.shape
    # each row one place further to the left than the one before: distances stand in columns
    rows = torch.zeros(heads, t * (s + t + 1), dtype=torch.float64)
    torch.sum(p, 0, out=rows[:, : t * (s + t)].unflatten(1, (t, -1))[:, :, t:])
    return rows.unflatten(1, (t, -1)).sum(1)[:, 1 : s + t]


def _by_query(p: Tensor, phi: Tensor) -> Tensor:
    """(h, d, d) sum over queries of E_p[e^{iφ_a Δ}]·conj(E_p[e^{iφ_b Δ}])."""
    t, s = p.shape[-2:]
    # re and im in one product of real numbers: half the multiplications of a complex one, and no copy of p
    both = p @ torch.view_as_real(_turns(torch.arange(s), phi)).flatten(1)
    mean = torch.view_as_complex(both.unflatten(-1, (-1, 2))) * _turns(torch.arange(t), phi).conj()
    rows = mean.transpose(0, 1).flatten(1, 2)
    return rows.transpose(1, 2) @ rows.conj()


def _turns(at: Tensor, phi: Tensor) -> Tensor:
    angles = at.double()[:, None] * phi[None]
    return torch.polar(torch.ones_like(angles), angles)
