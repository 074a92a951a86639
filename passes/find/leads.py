"""Heads and blocks: which lead rows of the core are the heads of one block, and which positions a block reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passes.find.core import Core
from passes.find.roots import NotLifted


@dataclass(frozen=True, eq=False)
class Leads:
    """One lead a query head and block (l). Rows are flat in the canonical axes of their side.

    q_rows, out_rows (l, t); k_of, v_of (l,); positions: q_at (l, t), k_at, v_at (l, s); blocks (block, head) of leads.
    """

    q_rows: Tensor
    out_rows: Tensor
    k_of: Tensor
    v_of: Tensor
    q_at: Tensor
    k_at: Tensor
    v_at: Tensor
    blocks: Tensor

    def q(self, value: Tensor) -> Tensor:
        """(lead, token, d) of the core as (l, t, d)."""
        return value.reshape(-1, value.shape[-1])[self.q_rows]

    def k(self, value: Tensor) -> Tensor:
        """Of k."""
        return value[self.k_of]

    def v(self, value: Tensor) -> Tensor:
        """Of v."""
        return value[self.v_of]

    def out(self, value: Tensor) -> Tensor:
        """Of the result."""
        return value.reshape(-1, value.shape[-1])[self.out_rows]


def leads(core: Core, at_q: Tensor, at_k: Tensor, at_v: Tensor) -> Leads:
    """From the positions of the operands; leads that read the same positions are the heads of one block."""
    groups, tokens = at_q.shape
    rows = torch.arange(groups * tokens).reshape(groups, tokens)
    out_rows, of = core.out_rows, torch.arange(groups)
    again = _repeats(at_q)
    if again > 1:
        # several heads stand along the token axis: sort them apart, keeping their order at each position
        order = torch.stack([torch.argsort(row, stable=True) for row in at_q]).reshape(groups, -1, again)
        order = order.transpose(1, 2).reshape(groups * again, -1)
        of = of.repeat_interleave(again)
        rows, out_rows, at_q = (x[of].gather(1, order) for x in (rows, out_rows, at_q))
    v_of = core.v_of[of]
    at_k, at_v = at_k[of], at_v[v_of]
    if at_k.shape != at_v.shape or (at_k != at_v).any():
        raise NotLifted("keys and values read different tokens", core.v.node)
    return Leads(rows, out_rows, of, v_of, at_q, at_k, at_v, _blocks(core, at_q, at_k))


def _repeats(at_q: Tensor) -> int:
    """How often each position stands in a row of q, if alike for all."""
    counts = {int(n) for row in at_q for n in torch.unique(row, return_counts=True)[1]}
    return counts.pop() if len(counts) == 1 else 1


def _blocks(core: Core, at_q: Tensor, at_k: Tensor) -> Tensor:
    """(block, head) -> lead."""
    keys = torch.cat([at_q, at_k], dim=1)
    _, inverse = torch.unique(keys, dim=0, return_inverse=True)
    members: dict[int, list[int]] = {}
    for lead, block in enumerate(inverse.tolist()):
        members.setdefault(block, []).append(lead)
    sizes = {len(x) for x in members.values()}
    if len(sizes) > 1:
        raise NotLifted(f"blocks of tokens have different numbers of heads: {sorted(sizes)}", core.q.node)
    return torch.tensor(list(members.values()))
