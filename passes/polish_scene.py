"""Attention of merged heads on calibration tokens, and its derivative in the merged heads' maps.

u' = T ũ, ũ what the source's projections give, whitened; q and k are normed, gained and turned from u'. The scores of
the original give mask and additive biases back: log p - f(original score) is what was added to them, up to a number
per query that softmax ignores. Nothing here needs to know how the model spells its mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes import Stats
from passes.gqa_build import Parts
from passes.moments import SiteBatch, windowed
from rewrite.heads import Weights
from rewrite.site import Affine, Norm, Operand, Rope, Sink, Site, Softcap

REAL = torch.float32
EVERY = 2
"""One query of so many is looked at: neighbours in a text tell much the same, and the keys are all there."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Some windows of calibration, in the new order of the heads."""

    site: Site
    q: Tensor
    """(b, h, t, d) whitened; t counts the queries that are looked at"""
    k: Tensor
    """(b, groups, s, group size * d) whitened"""
    v: Tensor
    added: Tensor
    """(b, h, t, s) mask and biases of the scores; -inf where nothing is seen"""
    sink: Tensor | None
    """(b, h, t, 1) the logit of what attention leaves out"""
    out: Tensor
    """(b, t, outputs) of the original"""
    at: Tensor
    """(t,) positions of the queries"""
    kv_of: tuple[int, ...]
    scale: Tensor
    """(h, 1, 1)"""
    fits: Tensor
    """(b, t) 1 where a token fits, else 0"""
    judges: Tensor


@dataclass(frozen=True, eq=False)
class Maps:
    """The unknowns, on whitened rows: q (h, d, d), k and v (groups, d, group size * d)."""

    q: Tensor
    k: Tensor
    v: Tensor

    def of(self, parts: Sequence[Tensor]) -> Maps:
        """Other maps, from the three."""
        return Maps(*parts)

    def plus(self, step: Maps, size: float = 1.0) -> Maps:
        """This and `size` times a step."""
        return Maps(self.q + size * step.q, self.k + size * step.k, self.v + size * step.v)

    def dot(self, other: Maps) -> float:
        """Inner product."""
        return sum(float((a * b).sum()) for a, b in zip(self.parts, other.parts, strict=True))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three."""
        return self.q, self.k, self.v


@dataclass(frozen=True, eq=False)
class Whitening:
    """Roots L of E[u uᵀ] = L Lᵀ per head (q) and group (k, v): ũ = L⁻¹ u, T̃ = T L."""

    q: Tensor
    k: Tensor
    v: Tensor

    def enter(self, parts: Parts) -> Maps:
        """The maps on whitened rows."""
        return Maps(parts.q @ self.q, _joined(parts.k) @ self.k, _joined(parts.v) @ self.v)

    def leave(self, maps: Maps, like: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """The maps on plain rows."""
        n, t, d = like.k.shape[:3]
        k, v = (
            torch.linalg.solve(r.transpose(1, 2), m.transpose(1, 2)) for r, m in ((self.k, maps.k), (self.v, maps.v))
        )
        e = like.v.shape[-1]
        q = torch.linalg.solve(self.q.transpose(1, 2), maps.q.transpose(1, 2)).transpose(1, 2)
        return q, k.reshape(n, t, d, d).transpose(2, 3), v.reshape(n, t, e, e).transpose(2, 3)


def _joined(maps: Tensor) -> Tensor:
    return maps.transpose(1, 2).flatten(2)


def rows_of(batch: SiteBatch, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the projections as the maps read them: (b, h, t, d), (b, groups, s, size*d) twice."""
    groups = torch.tensor(parts.groups)

    def heads(which: str, operand: Operand) -> Tensor:
        return batch.u[which][..., torch.from_numpy(operand.rows)].transpose(1, 2)

    def grouped(x: Tensor) -> Tensor:
        return x[:, groups].transpose(2, 3).flatten(3)

    site = batch.site
    return heads("q", site.q)[:, list(parts.order.query)], grouped(heads("k", site.k)), grouped(heads("v", site.v))


def _taken(stats: Stats, limit: int) -> Iterator[tuple[SiteBatch, int]]:
    """The batches with how many windows of each are used: some of every one, about `limit` tokens."""
    share, tokens = min(1.0, limit / max(stats.tokens, 1)), 0
    for whole in stats.batches():
        batch = windowed(whole)
        take = max(1, round(batch.q.shape[0] * share))
        yield batch, take
        tokens += take * batch.q.shape[2]
        if tokens >= limit:
            return


def whiten(stats: Stats, parts: Parts, limit: int) -> Whitening:
    """The roots of the second moments of what the maps read, on about `limit` tokens."""
    sums: list[Tensor] = []
    tokens = 0
    for batch, take in _taken(stats, limit):
        rows = [r[:take].double() for r in rows_of(batch, parts)]
        terms = [torch.einsum("bnsi,bnsj->nij", r, r) for r in rows]
        sums = [a + b for a, b in zip(sums, terms, strict=True)] if sums else terms
        tokens += take * batch.q.shape[2]
    q, k, v = (_root(s / tokens) for s in sums)
    return Whitening(q, k, v)


def _root(gram: Tensor) -> Tensor:
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    return torch.linalg.cholesky((gram + gram.transpose(1, 2)) / 2 + 1e-6 * size[:, None, None] * eye)


def scenes(stats: Stats, parts: Parts, white: Whitening, source: Weights, limit: int) -> Iterator[Scene]:
    """The calibration, one scene a batch; one token of four judges and does not fit."""
    seen = 0
    for batch, take in _taken(stats, limit):
        yield _scene(batch, take, parts, white, source, seen)
        seen += take


def _scene(batch: SiteBatch, take: int, parts: Parts, white: Whitening, source: Weights, seen: int) -> Scene:
    site, order, kv = batch.site, list(parts.order.query), list(batch.site.kv_of)
    at = torch.arange(0, batch.q.shape[2], EVERY)
    p = batch.p()[:take, :, at, : batch.k.shape[2]].double()
    q, k, v = batch.q[:take, :, at], batch.k[:take], batch.v[:take]
    scale = torch.tensor(site.scale, dtype=torch.float64).expand(site.heads)[:, None, None]
    scale = scale * _factor(site.q.after) * _factor(site.k.after)
    score = turned(q, site.q.rope, at) @ turned(k, site.k.rope)[:, kv].transpose(-1, -2) * scale
    added = p.clamp(min=1e-300).log() - capped(site, score)[0]
    left = (
        (1 - p.sum(-1, keepdim=True)).clamp(min=1e-300).log() if any(isinstance(m, Sink) for m in site.mods) else None
    )
    y = torch.einsum("bhtd,ohd->bto", p @ v[:, kv], source.out)
    qs, ks, vs = (
        torch.linalg.solve_triangular(root, r[:take].double().transpose(-1, -2), upper=False).transpose(-1, -2).to(REAL)
        for r, root in zip(rows_of(batch, parts), (white.q, white.k, white.v), strict=True)
    )
    fits, judges = _split(batch, take, seen)
    return Scene(
        site,
        qs[:, :, at],
        ks,
        vs,
        added=added.masked_fill(p <= 0, -torch.inf)[:, order].to(REAL),
        sink=None if left is None else left[:, order].to(REAL),
        out=y if source.out_bias is None else y + source.out_bias,
        at=at.double(),
        kv_of=parts.order.kv_of,
        scale=scale[order].to(REAL),
        fits=fits[:, at],
        judges=judges[:, at],
    )


def _split(batch: SiteBatch, take: int, seen: int) -> tuple[Tensor, Tensor]:
    """Every fourth window judges; a single long window gives its last quarter."""
    b, _, t, _ = batch.q.shape
    keep = torch.ones(b, t, dtype=torch.float64)
    if batch.keep is not None and batch.keep.shape == keep.shape:
        keep = batch.keep.double()
    judges = torch.zeros(take, t, dtype=torch.float64)
    if b == 1:
        judges[:, t - t // 4 :] = 1
    else:
        judges[[i for i in range(take) if (seen + i) % 4 == 3]] = 1
    return keep[:take] * (1 - judges), keep[:take] * judges


def _factor(after: Affine | None) -> float:
    return 1.0 if after is None else float(after.constant.reshape(-1)[0])


def capped(site: Site, score: Tensor) -> tuple[Tensor, Tensor | float]:
    """The score behind a softcap, and its derivative."""
    for mod in site.mods:
        if isinstance(mod, Softcap):
            bent = torch.tanh(score / mod.cap)
            return mod.cap * bent, 1 - bent.square()
    return score, 1.0


def turned(x: Tensor, rope: Rope | None, at: Tensor | None = None, back: bool = False) -> Tensor:
    """x (..., tokens, d) turned by the rope at positions `at`, or 0, 1, ...; `back` turns the other way."""
    if rope is None:
        return x
    at = torch.arange(x.shape[-2]) if at is None else at
    angle = at.double()[:, None] * torch.from_numpy(rope.frequencies) + torch.from_numpy(rope.start)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype) * (-1 if back else 1)
    a, b = (torch.from_numpy(rope.pairs[:, i]).long() for i in (0, 1))
    out = x.clone()
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., b] * cos + x[..., a] * sin
    return out


@dataclass(frozen=True, eq=False)
class Normed:
    """A norm at one point: the value, and what its derivative needs (it is its own transpose up to the order)."""

    norm: Norm | None
    value: Tensor
    over: Tensor | None

    def push(self, change: Tensor) -> Tensor:
        """Derivative times a change of the norm's input."""
        return self._tangent(self._centred(change)) if self.norm is not None else change

    def pull(self, slope: Tensor) -> Tensor:
        """Transposed derivative times a slope of the norm's output."""
        return self._centred(self._tangent(slope)) if self.norm is not None else slope

    def _dims(self) -> tuple[int, ...]:
        return (1, 3) if self.norm is not None and self.norm.over == "row" else (3,)

    def _centred(self, x: Tensor) -> Tensor:
        layer = self.norm is not None and self.norm.kind == "layer"
        return x - x.mean(self._dims(), keepdim=True) if layer else x

    def _tangent(self, x: Tensor) -> Tensor:
        if self.norm is None or self.over is None:
            return x
        along = (self.value * x).sum(self._dims(), keepdim=True)
        if self.norm.kind != "l2":
            along = along / (x.shape[1] * x.shape[3] if self.norm.over == "row" else x.shape[3])
        return (x - self.value * along) * self.over


def normed(norm: Norm | None, u: Tensor) -> Normed:
    """Norm of (b, heads, tokens, dim)."""
    if norm is None:
        return Normed(None, u, None)
    dims = (1, 3) if norm.over == "row" else (3,)
    centred = u - u.mean(dims, keepdim=True) if norm.kind == "layer" else u
    square = centred.square()
    size = square.sum(dims, keepdim=True) if norm.kind == "l2" else square.mean(dims, keepdim=True)
    over = (size + norm.eps).rsqrt()
    return Normed(norm, centred * over, over)
