"""From merges of keys and values to a site's new weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.gqa_keys import KeyMerge, pair_energy
from passes.gqa_source import Facts, Gram
from passes.gqa_values import ValueMerge, carries_mean
from rewrite.heads import Heads, Weights
from rewrite.site import Affine, Operand, Site


@dataclass(frozen=True, eq=False)
class Order:
    """Where heads stand: new query head j is head `query[j]` of the source and reads kv head `kv_of[j]`."""

    query: tuple[int, ...]
    kv_of: tuple[int, ...]


def contiguous(site: Site) -> bool:
    """Query heads that share a kv head stand side by side, in the order of the kv heads."""
    each = site.heads // site.k.heads
    return site.kv_of == tuple(j // each for j in range(site.heads))


def order_of(site: Site, groups: Sequence[tuple[int, ...]]) -> Order:
    """Queries sorted by group where they may move, else left in place."""
    group_of = {i: n for n, members in enumerate(groups) for i in members}
    query = list(range(site.heads))
    if movable(site):
        query.sort(key=lambda j: (group_of[site.kv_of[j]], site.kv_of[j], j))
    return Order(tuple(query), tuple(group_of[site.kv_of[j]] for j in query))


def movable(site: Site) -> bool:
    """Query heads may be exchanged: nothing but weights that can be rewritten tells them apart."""
    q = site.q
    return site.heads_alike and contiguous(site) and all(a is None or alike(a) for a in (q.gain, q.shift, q.after))


def alike(values: Affine) -> bool:
    """The same for all heads, or a weight of its own for every head."""
    arrays = (values.constant, values.factor)
    if any(a is not None and not bool((a == a[:1]).all()) for a in arrays):
        return False
    return values.index is None or same(values) or own(values)


def same(values: Affine) -> bool:
    """The same numbers for all heads."""
    arrays = (values.constant, values.factor, values.index)
    return all(a is None or bool((a == a[:1]).all()) for a in arrays)


def own(values: Affine) -> bool:
    """Every head and dim has a number of its own in the checkpoint."""
    return values.index is not None and len(set(values.index.reshape(-1).tolist())) == values.index.size


@dataclass(frozen=True, eq=False)
class Parts:
    """New weights as maps of the source's rows: u' = q u for every query head (in the new order), and the sum over
    the group's heads of k[n, i] u_i, v[n, i] u_i, u what the source's projections give."""

    groups: tuple[tuple[int, ...], ...]
    order: Order
    q: Tensor
    """(h, d, d)"""
    k: Tensor
    """(groups, t, d, d)"""
    v: Tensor
    gains: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    out_bias: Tensor | None

    def weights(self, source: Weights) -> Weights:
        """The weights that these maps make of the source's."""
        pick = list(self.order.query)
        q = Heads(
            self.q @ source.q.weight[pick],
            None if source.q.bias is None else torch.einsum("hij,hj->hi", self.q, source.q.bias[pick]),
            self.gains[0],
        )
        k, v = self._merged(source.k, self.k, self.gains[1]), self._merged(source.v, self.v, self.gains[2])
        return Weights(q, k, v, self.out, self.out_bias)

    def _merged(self, source: Heads, maps: Tensor, gain: Tensor) -> Heads:
        pick = torch.tensor(self.groups)
        bias = None if source.bias is None else torch.einsum("ntij,ntj->ni", maps, source.bias[pick])
        return Heads(torch.einsum("ntij,ntjx->nix", maps, source.weight[pick]), bias, gain)


def build(facts: Facts, source: Weights, keys: Sequence[KeyMerge], values: Sequence[ValueMerge], order: Order) -> Parts:
    """The new weights; norms and their gains stay where they are (the merged head is divided by its own length)."""
    site = facts.site
    up = {head: a for merge in keys for head, a in merge.up.items()}
    picked = list(order.query)
    q, q_gain = _queries(facts, source.q, torch.stack([up[j] for j in range(site.heads)]))
    k, k_gain = _merged(site.k, source.k, facts.k, facts.k_inverse, keys)
    v, v_gain = _merged(site.v, source.v, facts.v, facts.v_inverse, values)
    outs = {head: source.out[:, head] @ b for merge in values for head, b in merge.up.items()}
    out = torch.stack([outs[j] for j in range(site.heads)], 1)
    bias = source.out_bias
    if bias is not None and carries_mean(site, source):
        mean = _mean(facts.v, values)
        of = {head: n for n, merge in enumerate(values) for head in merge.up}
        before = torch.einsum("ohd,hd->o", source.out, facts.v.mean[list(site.kv_of)])
        bias = bias + before - torch.einsum("ohd,hd->o", out, mean[[of[j] for j in range(site.heads)]])
    groups = tuple(merge.members for merge in keys)
    return Parts(groups, order, q[picked], k, v, (q_gain[picked], k_gain, v_gain), out[:, picked], bias)


def _mean(gram: Gram, merges: Sequence[KeyMerge] | Sequence[ValueMerge]) -> Tensor:
    return torch.stack([torch.einsum("tij,tj->i", m.down, gram.mean[list(m.members)]) for m in merges])


def _queries(facts: Facts, heads: Heads, up: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and gains of q' = A q behind gain and norm: Γ'⁻¹ A Γ. Where the norm spans all heads and every head has
    its own gain, the gain takes the change of size, so that one head's change does not scale the others."""
    gain = heads.gain
    if facts.site.q.norm is not None and facts.site.q.norm.over == "row" and own(facts.site.q.gain):
        gain = gain * _growth(facts, gain, up)
    return _over(gain)[..., None] * up * heads.gain[:, None, :] @ _centring(facts.site.q), gain


def _growth(facts: Facts, gain: Tensor, up: Tensor) -> Tensor:
    """(h, d) by how much A lengthens every pair of the normed query."""
    over = _over(gain)
    before = over[:, :, None] * facts.q * over[:, None, :]
    after = over[:, :, None] * (up @ facts.q @ up.transpose(1, 2)) * over[:, None, :]
    rope = facts.site.k.rope
    ratio = (_positive(after.diagonal(dim1=1, dim2=2)) / _positive(before.diagonal(dim1=1, dim2=2))).sqrt()
    if rope is not None:
        pairs = torch.from_numpy(rope.pairs).long()
        both = (_positive(pair_energy(after, pairs)) / _positive(pair_energy(before, pairs))).sqrt()
        ratio[:, pairs[:, 0]] = both
        ratio[:, pairs[:, 1]] = both
    return ratio


def _centring(operand: Operand) -> Tensor:
    """What a layer norm takes away first must not come back in another direction through a map: (d, d)."""
    eye = torch.eye(operand.dim, dtype=torch.float64)
    centred = operand.norm is not None and operand.norm.kind == "layer" and operand.norm.over == "head"
    return eye - 1 / operand.dim if centred else eye


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=1e-300)


def _over(gain: Tensor) -> Tensor:
    """1 / gain; a gain of zero hides its row, whatever stands there."""
    return torch.where(gain == 0, torch.zeros_like(gain), 1 / torch.where(gain == 0, torch.ones_like(gain), gain))


def _merged(
    operand: Operand, heads: Heads, gram: Gram, inverse: Tensor, merges: Sequence[KeyMerge] | Sequence[ValueMerge]
) -> tuple[Tensor, Tensor]:
    """Maps Γ'⁻¹ down_i Γ_i E[1/ρ_i] and gains: the mean of what the norm did stands in for the norm, which then
    makes up the length of every token anew."""
    gains: list[Tensor] = []
    maps: list[Tensor] = []
    for merge in merges:
        pick = list(merge.members)
        gain = heads.gain[pick]
        new = gain[0] if bool((gain == gain[:1]).all()) else gain.square().mean(0).sqrt() * gain[0].sign()
        factor = gain * (inverse[pick] / inverse[pick].mean())[:, None]
        gains.append(new)
        maps.append(_over(new)[None, :, None] * merge.down * factor[:, None, :] @ _centring(operand))
    gain = torch.stack(gains)
    if operand.norm is not None and operand.norm.over == "row" and own(operand.gain):
        gain = gain * _row_growth(operand, heads, gram, merges, gain)
    return torch.stack(maps), gain


def _row_growth(
    operand: Operand, heads: Heads, gram: Gram, merges: Sequence[KeyMerge] | Sequence[ValueMerge], gain: Tensor
) -> float:
    """By how much a norm over all heads grows when it spans the merged ones instead: the gain takes it back."""
    old = gram.second.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1) * _over(heads.gain).square()
    new = [
        torch.einsum("tij,tjuk,uik->i", m.down, gram.of(m.members).second, m.down) * _over(gain[n]).square()
        for n, m in enumerate(merges)
    ]
    energy = torch.stack(new)
    l2 = operand.norm is not None and operand.norm.kind == "l2"
    before, after = (old.sum(), energy.sum()) if l2 else (old.mean(), energy.mean())
    return float((after / before.clamp(min=1e-300)).sqrt())
