"""Block-sparse attention on a CPU: only what the schedule visits is computed, so that a sparse mask costs less time.

A piece is a tile of queries and the runs of keys that it reads. Each run is attended to by itself, and the results are
merged by their logarithms of sums. The query heads of a kv head become rows over the same keys, which are never copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codegen.options import Options
from codegen.pieces import Piece, Run, Shape, pieces
from rewrite.mask import Mask

MOST = 1024
"""Keys of a run where its scores are held."""
Part = tuple[Tensor, Tensor]
"""(o, lse) of some of the keys: (b, g, rows, dv) and (b, g, rows)."""


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: Options) -> Part:
    """(o, lse) as codegen/options.py has them."""
    kernel = _fused if options.softcap is None and k.shape[-1] == v.shape[-1] else _products
    o, lse = q.new_zeros(*q.shape[:-1], v.shape[-1]), torch.full(q.shape[:-1], -torch.inf, dtype=_exact(q))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    for work in _works(q, k, mask, options, None if kernel is _fused else MOST):
        rows = work.queries(q)
        parts = [kernel(rows, work.keys(k, run), work.keys(v, run), work.added(run), options) for run in work.runs]
        o_piece, lse_piece = _merged(parts)
        work.put(o, o_piece)
        work.put(lse[..., None], lse_piece[..., None])
    if options.sinks is not None:
        _sink(o, lse, options, k.shape[2])
    return o, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Mask,
    options: Options,
    bias_grad: bool = False,
) -> dict[str, Tensor]:
    """Gradients "q", "k" and "v", "sinks" where there are some, and "bias" where it is asked for.

    Probabilities are computed again, piece after piece, so that sums have one order.
    """
    exact = _exact(q)
    do = grad.to(exact)
    delta = (do * o).sum(-1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    full = [x.to(exact) for x in (q, k, v)]
    sums = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in full]
    dbias = torch.zeros(options.bias.shape, dtype=exact) if bias_grad and options.bias is not None else None
    for work in _works(q, k, mask, options, MOST):
        _back(work, full, (do, lse[..., None], delta[..., None]), sums, dbias)
    found = {name: x.to(q.dtype) for name, x in zip("qkv", sums, strict=True)}
    if dbias is not None and options.bias is not None:
        found["bias"] = dbias.to(options.bias.dtype)
    if options.sinks is not None:
        share = torch.exp(options.sinks.to(exact)[:, None] - lse)
        found["sinks"] = -(share * delta).sum((0, 2)).to(options.sinks.dtype)
    return found


@dataclass(frozen=True)
class _Work:
    """A piece in terms of tensors. Rows of a kv head are (head, query), the queries of the first head first."""

    piece: Piece
    mask: Mask
    options: Options
    group: int
    dtype: torch.dtype

    @property
    def runs(self) -> tuple[Run, ...]:
        """What the queries read."""
        return self.piece.runs

    @property
    def folded(self) -> int:
        """Query heads that become rows."""
        return min(self.group, self.piece.heads[1] - self.piece.heads[0])

    @property
    def stacked(self) -> bool:
        """Several tiles of one row: tensors are (g, tiles, rows, c), so that what a head reads again stays near."""
        return self.piece.count > 1

    def _part(self, x: Tensor) -> Tensor:
        """(b, h, queries, c), (h, tiles, queries, c) in a stack: a view of x (b, h, t, c)."""
        piece, (first, last) = self.piece, self.piece.queries
        part = x[slice(*piece.rows), slice(*piece.heads), first : first + piece.count * (last - first)]
        return part[0].unflatten(1, (piece.count, -1)) if self.stacked else part

    def queries(self, x: Tensor) -> Tensor:
        """(b, g, rows, c) of the piece from x (b, h, t, c)."""
        return self._fold(self._part(x))

    def put(self, x: Tensor, value: Tensor) -> None:
        """Sets what `queries` gives."""
        part = self._part(x)
        if self.stacked and self.folded > 1:
            value = value.unflatten(2, (self.folded, -1)).transpose(1, 2)
        part.copy_(value.reshape(part.shape))

    def _fold(self, x: Tensor) -> Tensor:
        """Heads of a kv head to rows."""
        if self.folded == 1:
            return x
        if self.stacked:
            return x.unflatten(0, (-1, self.folded)).transpose(1, 2).flatten(2, 3)
        return x.unflatten(1, (-1, self.folded)).flatten(2, 3)

    def keys(self, x: Tensor, run: Run) -> Tensor:
        """(b, g, keys, c) of a run, a view of x (b, g, s, c)."""
        piece, (first, last) = self.piece, self.piece.heads
        of = slice(first // self.group, (last - 1) // self.group + 1)
        if not self.stacked:
            return x[slice(*piece.rows), of, run.first : run.last]
        part = x[piece.rows[0], of, run.first : run.last + (piece.count - 1) * run.step]
        if run.step == 0:
            return part[:, None].expand(-1, piece.count, -1, -1)
        return part.unfold(1, run.last - run.first, run.step).transpose(2, 3)

    def added(self, run: Run) -> Tensor | None:
        """What is added to scores, -inf where nothing is read: (b or 1, g or 1, rows, keys), None where it is 0."""
        bias, slopes = self.options.bias, self.options.slopes
        if bias is None and slopes is None and not run.masked:
            return None
        queries, heads = (b - a for a, b in (self.piece.queries, self.piece.heads))
        hung = self.mask.per_head or slopes is not None
        x = torch.zeros(self.piece.count, heads if hung else 1, queries, run.last - run.first, dtype=self.dtype)
        if slopes is not None:
            at_q, at_k = self._positions(run, run.first, run.last)
            back = torch.from_numpy(at_q - at_k).to(self.dtype)
            x -= slopes[slice(*self.piece.heads), None, None].to(self.dtype) * back
        if bias is not None:
            x = x + torch.cat([biased(bias, self.piece, run, i) for i in range(self.piece.count)])
        for first, last in run.masked:
            part = x[..., first - run.first : last - run.first]
            part.masked_fill_(~self._keep(run, first, last), -torch.inf)
        x = x.transpose(0, 1) if self.stacked else x
        return self._fold(x) if hung or x.shape[0 if self.stacked else 1] > 1 else x.repeat(1, 1, self.folded, 1)

    def _positions(self, run: Run, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries (b, 1, t, 1) and keys (b, 1, 1, s) of every tile of the stack."""
        tile = np.arange(self.piece.count)[:, None, None, None]
        queries = np.arange(*self.piece.queries) + self.piece.offset
        return queries[:, None] + tile * len(queries), np.arange(first, last) + tile * run.step

    def _keep(self, run: Run, first: int, last: int) -> Tensor:
        """(b, h or 1, t, s): the pairs of the piece with some keys that are allowed."""
        heads = np.arange(*self.piece.heads)[:, None, None] if self.mask.per_head else 0
        at = self._positions(run, first, last)
        return torch.from_numpy(self.mask.holds(*at, heads, self.piece.rows[0], self.piece.offset))


def biased(bias: Tensor, piece: Piece, run: Run, tile: int = 0) -> Tensor:
    """The part of a bias that belongs to a tile of a piece and to a run; sizes of 1 stay. A view."""
    x = bias.reshape(*(1,) * (4 - bias.ndim), *bias.shape)
    first, last = piece.queries
    later, run = tile * (last - first), run.moved(tile * run.step)
    at = (piece.rows, piece.heads, (first + later, last + later), (run.first, run.last))
    return x[tuple(slice(*span) if size > 1 else slice(None) for span, size in zip(at, x.shape, strict=True))]


def _works(q: Tensor, k: Tensor, mask: Mask, options: Options, most: int | None) -> Iterator[_Work]:
    group = q.shape[1] // k.shape[1]
    spans = tuple(options.spans(q.shape[0], q.shape[2], k.shape[2]))
    for piece in pieces(mask, Shape(spans, q.shape[1], group), most):
        yield _Work(piece, mask, options, group, _exact(q))


def _exact(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _fused(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, options: Options) -> Part:
    """One run by torch's own kernel."""
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added, scale=options.scale)
    if added is not None:
        # the kernel gives 0 where a row has no keys
        lse = torch.where(added.amax(-1) == -torch.inf, -torch.inf, lse)
    return o, lse


def _products(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, options: Options) -> Part:
    """One run by two products, for what torch's kernel cannot do."""
    q, k, v = (x.to(_exact(x)) for x in (q, k, v))
    s = _scores(q, k, added, options)
    top = s.amax(-1, keepdim=True)
    p = s.sub_(top.masked_fill_(top == -torch.inf, 0)).exp_()
    total = p.sum(-1, keepdim=True)
    return (p @ v).div_(total.masked_fill(total == 0, 1)), (top + total.log()).squeeze(-1)


def _scores(q: Tensor, k: Tensor, added: Tensor | None, options: Options) -> Tensor:
    s = (q * options.scale) @ k.mT
    if options.softcap is not None:
        s = s.div_(options.softcap).tanh_().mul_(options.softcap)
    return s if added is None else s.add_(added)


def _merged(parts: list[Part]) -> Part:
    """(o, lse) of all the keys of a piece."""
    if len(parts) == 1:
        return parts[0]
    lse_parts = torch.stack([lse for _, lse in parts])
    lse = lse_parts.logsumexp(0)
    shares = (lse_parts - lse.masked_fill(lse == -torch.inf, 0)).exp_()[..., None]
    o = parts[0][0] * shares[0]
    for (part, _), share in zip(parts[1:], shares[1:], strict=True):
        o.addcmul_(part, share)
    return o, lse


def _sink(o: Tensor, lse: Tensor, options: Options, keys: int) -> None:
    """Sinks take their share of rows that are no padding, in place."""
    if options.sinks is None:
        return
    spans = options.spans(o.shape[0], o.shape[2], keys)
    for row, (queries, _) in enumerate(spans):
        before = lse[row, :, :queries]
        after = torch.logaddexp(before, options.sinks[:, None].to(before))
        o[row, :, :queries] *= (before - after).exp_()[..., None].to(o.dtype)
        lse[row, :, :queries] = after


def _back(
    work: _Work, qkv: list[Tensor], given: tuple[Tensor, Tensor, Tensor], grads: list[Tensor], dbias: Tensor | None
) -> None:
    """Adds what one piece gives to the gradients of q, k, v and of the bias."""
    q, do, lse, delta = (work.queries(x) for x in (qkv[0], *given))
    dq, scale, cap = torch.zeros_like(q), work.options.scale, work.options.softcap
    for run in work.runs:
        k, v, dk, dv = (work.keys(x, run) for x in (*qkv[1:], *grads[1:]))
        added = work.added(run)
        s = _scores(q, k, None, work.options)
        p = torch.exp((s if added is None else s + added) - lse)
        dv += p.mT @ do
        ds = (do @ v.mT).sub_(delta).mul_(p)
        if dbias is not None:
            _add_bias(dbias, ds, work, run)
        if cap is not None:
            ds *= 1 - (s / cap).square_()
        ds *= scale
        dq += ds @ k
        dk += ds.mT @ q
    work.put(grads[0], dq)


def _add_bias(dbias: Tensor, ds: Tensor, work: _Work, run: Run) -> None:
    """Adds gradients of scores (b, g, rows, s) to those of the bias, summed where it is broadcast."""
    piece = work.piece
    rows, heads, queries = (b - a for a, b in (piece.rows, piece.heads, piece.queries))
    part = biased(dbias, piece, run)
    part += ds.reshape(rows, heads, queries, run.last - run.first).sum_to_size(part.shape)
