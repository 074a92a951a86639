"""Merging the keys of a group of heads: one key head z instead of several, and what each query becomes.

The score of query head l, which read kv head i, at distance Δ is qᵀ R(Δ) k_i. With z = Σ_i Z_i k_i, turned by the
same rope, and q' = A q it becomes qᵀ Aᵀ R(Δ) Z k. The squared error, expected over queries, keys and distances,

    Σ_l τ_l E tr M_l [R S_i - A_lᵀ R Z] G [R S_i - A_lᵀ R Z]ᵀ,        M = E[q qᵀ], G = E[k kᵀ], S_i picks head i,

is quadratic in A for fixed Z and in Z for fixed A, so each has a closed form, and they take turns. Where distances
spread evenly over the circle the optimum is one complex number per head and frequency (what commutes with the rope);
where nothing turns it is the low rank of all keys in the queries' metric; slow pairs lie between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passes.eigen import eigh, eigvalsh
from passes.gqa_source import FLOOR, Facts, shift_invariant

STEPS = 30
"""Turns of the two closed forms; the error falls by each and has long settled."""
RIDGE = 1e-9


@dataclass(frozen=True, eq=False)
class KeyMerge:
    """`down` (t, d, d): z = Σ_i down[i] k_i. `up` of every reader: q' = up[l] q, (d, d). `loss`: expected error."""

    members: tuple[int, ...]
    down: Tensor
    up: dict[int, Tensor]
    loss: float


@dataclass(frozen=True, eq=False)
class _Group:
    """One group in the complex coordinates."""

    gram: Tensor
    """(t*d, t*d)"""
    mean: Tensor
    """(t*d,)"""
    heads: tuple[tuple[int, int], ...]
    """(query head, place of its kv head in the group)"""
    q: Tensor
    """(readers, d, d)"""
    weight: Tensor
    """(readers,)"""
    far: Tensor
    mean_far: Tensor

    @property
    def dim(self) -> int:
        return self.q.shape[-1]


def merge_keys(facts: Facts, members: tuple[int, ...], even: float | None = 0.0, steps: int = STEPS) -> KeyMerge:
    """The merge of some kv heads. `even` is the share of evenly attended distances in the phase moments; None takes
    every rotating pair for a uniform phase."""
    if len(members) == 1:
        one = torch.eye(facts.site.k.dim, dtype=torch.float64)
        return KeyMerge(members, one[None], dict.fromkeys(facts.readers[members[0]], one), 0.0)
    group = _group(facts, members, even)
    down = _in_coordinates(start(facts, members), facts.unitary)
    up = _solve_up(group, down)
    for _ in range(steps):
        down = _solve_down(group, up)
        up = _solve_up(group, down)
    loss = _loss(group, down, up)
    back = facts.unitary
    t, d = len(members), group.dim
    real_down = (back.conj().T @ down.reshape(d, t, d).transpose(0, 1) @ back).real
    real_up = {head: (back.conj().T @ a @ back).real for (head, _), a in zip(group.heads, up, strict=True)}
    return _gauged(facts, KeyMerge(members, real_down, real_up, loss))


def closed_loss(facts: Facts, members: tuple[int, ...]) -> float:
    """Expected score error of the group with complex numbers per pair and a low rank of the plain dims alone: a
    bound of `merge_keys`' loss that is cheap enough to search groups by."""
    gram = facts.k.of(members)
    loss = 0.0
    if (pairs := _pairs(facts)) is not None:
        values = eigvalsh(_pair_gram(facts, members, pairs)[0])
        loss += float(values[..., :-1].clamp(min=0).sum())
    plain = _plain(facts)
    if len(plain):
        values = eigvalsh(_plain_gram(facts, members, gram.centred, plain)[0])
        loss += float(values[: -len(plain)].clamp(min=0).sum())
    return loss


def start(facts: Facts, members: tuple[int, ...]) -> Tensor:
    """(t, d, d) the first `down`: complex rank 1 for every rotating pair, low rank for the plain dims."""
    t, d = len(members), facts.site.k.dim
    down = torch.zeros(t, d, d, dtype=torch.float64)
    if (pairs := _pairs(facts)) is not None:
        gram, omega = _pair_gram(facts, members, pairs)
        top = eigh(gram)[1][..., -1]
        lead = top.gather(-1, top.abs().argmax(-1, keepdim=True))
        c = (top * (lead.conj() / lead.abs())).conj() * omega
        a, b = pairs[:, 0], pairs[:, 1]
        for i in range(t):
            down[i, a, a], down[i, b, b] = c[:, i].real, c[:, i].real
            down[i, a, b], down[i, b, a] = -c[:, i].imag, c[:, i].imag
    plain = _plain(facts)
    if len(plain):
        gram, roots = _plain_gram(facts, members, facts.k.of(members).centred, plain)
        top = eigh(gram)[1][:, -len(plain) :].T.reshape(len(plain), t, len(plain))
        rows = torch.einsum("rti,tij->trj", top, roots)
        down[:, plain[:, None], plain[None]] = rows
    return down


def pair_energy(second: Tensor, pairs: Tensor) -> Tensor:
    """(..., P) mean squared length of every pair from (..., d, d) second moments."""
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    return diagonal[..., pairs[:, 0]] + diagonal[..., pairs[:, 1]]


def _pairs(facts: Facts) -> Tensor | None:
    rope = facts.site.k.rope
    return None if rope is None else torch.from_numpy(rope.pairs).long()


def _plain(facts: Facts) -> Tensor:
    """Dims that never turn."""
    still = torch.ones(facts.site.k.dim, dtype=torch.bool)
    if (pairs := _pairs(facts)) is not None:
        still[pairs.reshape(-1)] = False
    return still.nonzero()[:, 0]


def _metric(facts: Facts, members: tuple[int, ...]) -> Tensor:
    """(t, d, d) Σ over a member's readers of τ E[q qᵀ]."""
    weighted = facts.q * facts.key_weight[:, None, None]
    return torch.stack([weighted[list(facts.readers[i])].sum(0) for i in members])


def _pair_gram(facts: Facts, members: tuple[int, ...], pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Γ (P, t, t) complex Hermitian, weighted by the queries' energy, and the weights ω (P, t)."""
    k = facts.k.of(members).second
    a, b = pairs[:, 0], pairs[:, 1]
    real = k[:, a, :, a] + k[:, b, :, b]
    imag = k[:, b, :, a] - k[:, a, :, b]
    omega = pair_energy(_metric(facts, members), pairs).T
    omega = omega.clamp(min=FLOOR * max(float(omega.max()), torch.finfo(torch.float64).tiny)).sqrt()
    gram = torch.complex(real, imag) * omega[:, :, None] * omega[:, None, :]
    return (gram + gram.conj().transpose(-1, -2)) / 2, omega


def _plain_gram(facts: Facts, members: tuple[int, ...], centred: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """N C Nᵀ (t*s, t*s) of the plain dims in the queries' metric, and the metric's roots (t, s, s)."""
    k = facts.k.of(members)
    second = centred if shift_invariant(facts.site) else k.second
    second = second[:, plain][:, :, :, plain]
    values, vectors = eigh(_metric(facts, members)[:, plain[:, None], plain[None]])
    values = values.clamp(min=FLOOR * max(float(values.max()), torch.finfo(torch.float64).tiny))
    roots = vectors @ (values.sqrt()[..., None] * vectors.transpose(-1, -2))
    gram = torch.einsum("tij,tjuk,ulk->tiul", roots, second, roots)
    size = len(members) * len(plain)
    gram = gram.reshape(size, size)
    return (gram + gram.T) / 2, roots


def _in_coordinates(down: Tensor, unitary: Tensor) -> Tensor:
    """(t, d, d) real to (d, t*d) complex."""
    return (unitary @ down.to(unitary.dtype) @ unitary.conj().T).transpose(0, 1).flatten(1)


def _group(facts: Facts, members: tuple[int, ...], even: float | None) -> _Group:
    t, d = len(members), facts.site.k.dim
    u = facts.unitary
    k = facts.k.of(members)
    gram = torch.einsum("ab,tbuc,dc->taud", u, k.second.to(u.dtype), u.conj()).reshape(t * d, t * d)
    heads = tuple((head, place) for place, i in enumerate(members) for head in facts.readers[i])
    pick = [head for head, _ in heads]
    far, mean_far = _far(facts, even)
    return _Group(
        gram=(gram + gram.conj().T) / 2,
        mean=(k.mean.to(u.dtype) @ u.T).reshape(-1),
        heads=heads,
        q=u @ facts.q[pick].to(u.dtype) @ u.conj().T,
        weight=facts.key_weight[pick] / facts.key_weight.max(),
        far=far[pick],
        mean_far=mean_far[pick],
    )


def _far(facts: Facts, even: float | None) -> tuple[Tensor, Tensor]:
    if even is None:
        turning = torch.ones(facts.site.k.dim, dtype=torch.bool)
        turning[_plain(facts)] = False
        apart = turning[:, None] | turning[None]
        same = torch.eye(len(turning), dtype=torch.bool)
        return facts.far.masked_fill(apart & ~same, 0.0), facts.mean_far.masked_fill(apart, 0.0)
    return (1 - even) * facts.far + even * facts.even, (1 - even) * facts.mean_far


def _error_form(group: _Group, left: Tensor, right: Tensor, at: int) -> Tensor:
    """E[R left G rightᴴ Rᴴ] under the reader's distances, what all keys of a query share taken out."""
    full = (left @ group.gram @ right.conj().T) * group.far[at]
    return full - torch.outer(left @ group.mean, (right @ group.mean).conj()) * group.mean_far[at]


def _selector(group: _Group, place: int) -> Tensor:
    d = group.dim
    chosen = torch.zeros(d, group.gram.shape[0], dtype=group.gram.dtype)
    chosen[:, place * d : (place + 1) * d] = torch.eye(d, dtype=group.gram.dtype)
    return chosen


def _solve_up(group: _Group, down: Tensor) -> list[Tensor]:
    """The best A of every reader for a given Z."""
    ups: list[Tensor] = []
    for at, (_, place) in enumerate(group.heads):
        seen = _error_form(group, down, down, at)
        wanted = _error_form(group, down, _selector(group, place), at)
        ups.append(torch.linalg.solve(_ridged(seen), wanted))
    return ups


def _solve_down(group: _Group, up: list[Tensor]) -> Tensor:
    """The best Z for given A: P1 Z G - P2 Z μμᴴ = Q, in which only the direction of μ tells P2 from zero."""
    d, gram = group.dim, group.gram
    p1 = torch.zeros(d, d, dtype=gram.dtype)
    p2, wanted = torch.zeros_like(p1), torch.zeros(d, gram.shape[0], dtype=gram.dtype)
    for at, (_, place) in enumerate(group.heads):
        a, m = up[at], group.q[at] * group.weight[at]
        far, mean_far = group.far[at].conj(), group.mean_far[at].conj()
        p1 = p1 + (a @ m @ a.conj().T) * far
        p2 = p2 + (a @ m @ a.conj().T) * mean_far
        picked = slice(place * d, (place + 1) * d)
        wanted = wanted + ((a @ m) * far) @ gram[picked]
        wanted = wanted - torch.outer(((a @ m) * mean_far) @ group.mean[picked], group.mean.conj())
    root = torch.linalg.cholesky(_ridged(gram))
    white = torch.linalg.solve_triangular(root, wanted.conj().T, upper=False).conj().T
    mean = torch.linalg.solve_triangular(root, group.mean[:, None], upper=False)[:, 0]
    size = float(mean.abs().square().sum())
    along = mean / max(size**0.5, 1e-300)
    coefficient = white @ along
    y = torch.linalg.solve(_ridged(p1), white - torch.outer(coefficient, along.conj()))
    y = y + torch.outer(torch.linalg.solve(_ridged(p1 - size * p2, p1), coefficient), along.conj())
    return torch.linalg.solve_triangular(root.conj().T, y.conj().T, upper=True).conj().T


def _ridged(matrix: Tensor, like: Tensor | None = None) -> Tensor:
    like = matrix if like is None else like
    size = float(like.diagonal().real.mean())
    return matrix + max(RIDGE * size, 1e-300) * torch.eye(len(matrix), dtype=matrix.dtype)


def _loss(group: _Group, down: Tensor, up: list[Tensor]) -> float:
    total = 0.0
    for at, (_, place) in enumerate(group.heads):
        pick, a = _selector(group, place), up[at].conj().T
        cross = a @ _error_form(group, down, pick, at)
        kept = a @ _error_form(group, down, down, at) @ a.conj().T
        rest = _error_form(group, pick, pick, at) - cross - cross.conj().T + kept
        total += float(group.weight[at] * (group.q[at] @ rest).diagonal().sum().real)
    return max(total, 0.0)


def _gauged(facts: Facts, merge: KeyMerge) -> KeyMerge:
    """Every pair of z (every plain dim) as long as it is in the group's heads on average; queries take the inverse."""
    k = facts.k.of(merge.members).second
    z = torch.einsum("tij,tjuk,ulk->il", merge.down, k, merge.down).diagonal()
    t = torch.arange(len(merge.members))
    there = k[t, :, t].diagonal(dim1=-2, dim2=-1).mean(0)
    scale = torch.ones_like(z)
    pairs = _pairs(facts)
    for part in [*(() if pairs is None else pairs), *_plain(facts)[:, None]]:
        now, wanted = float(z[part].sum()), float(there[part].sum())
        scale[part] = (wanted / now) ** 0.5 if now > 1e-200 and wanted > 1e-200 else 1.0
    up = {head: a / scale[:, None] for head, a in merge.up.items()}
    return KeyMerge(merge.members, merge.down * scale[:, None], up, merge.loss)


def key_energy(facts: Facts) -> float:
    """What `closed_loss` would be if all keys were lost."""
    total = 0.0
    for i in range(facts.site.k.heads):
        if (pairs := _pairs(facts)) is not None:
            total += float(_pair_gram(facts, (i,), pairs)[0].real.sum())
        if len(plain := _plain(facts)):
            total += float(_plain_gram(facts, (i,), facts.k.of((i,)).centred, plain)[0].diagonal().sum())
    return total
