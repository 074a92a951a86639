"""From the regions of q, k and v to three `Operand`s, and the map from query heads to kv heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from passes.find.anchor import Scan
from passes.find.decode import decode, rope
from passes.find.draw import Draw
from passes.find.gains import Weighed, affine
from passes.find.leads import Leads
from passes.find.matrix import LARGE, Matrix, Probe, matrix
from passes.find.region import Stretch, random
from passes.find.roots import NotLifted
from rewrite.site import Affine, FloatArray, Norm, Operand


@dataclass(frozen=True, eq=False)
class Lifted:
    """One operand over its distinct heads, and which of them each query head of a block reads."""

    operand: Operand
    head_of: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Triple:
    """q, k and v with the kv heads put together."""

    q: Operand
    k: Operand
    v: Operand
    kv_of: tuple[int, ...]


def triple(scan: Scan, regions: Sequence[Stretch], at: Leads, draw: Draw) -> Triple:
    """Lift the three operands on the first block; validation holds the other blocks to them."""
    block = at.blocks[0]
    takes: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda value: at.q(value)[block], at.q_at[block[0]]),
        (lambda value: at.k(value)[block], at.k_at[block[0]]),
        (lambda value: at.v(value)[block], at.v_at[block[0]]),
    ]
    q, k, v = (_lift(scan, region, take, where, draw) for region, (take, where) in zip(regions, takes, strict=True))
    pairs = list(dict.fromkeys(zip(k.head_of, v.head_of, strict=True)))
    kv_of = tuple(pairs.index(pair) for pair in zip(k.head_of, v.head_of, strict=True))
    return Triple(
        heads_of(q.operand, q.head_of),
        heads_of(k.operand, [pair[0] for pair in pairs]),
        heads_of(v.operand, [pair[1] for pair in pairs]),
        kv_of,
    )


def heads_of(operand: Operand, heads: Sequence[int]) -> Operand:
    """The operand with these of its heads, in this order."""
    at = np.asarray(heads, dtype=np.int64)
    if np.array_equal(at, np.arange(operand.heads)):
        return operand

    def taken(values: Affine | None) -> Affine | None:
        if values is None:
            return None
        factor = None if values.factor is None else values.factor[at]
        index = None if values.index is None else values.index[at]
        return Affine(values.constant[at], factor, values.tensor, index)

    gain = taken(operand.gain)
    assert gain is not None
    return Operand(
        operand.roots,
        operand.rows[at],
        gain,
        operand.norm,
        taken(operand.shift),
        operand.rope,
        taken(operand.after),
        operand.token_gain,
    )


def _lift(scan: Scan, region: Stretch, take: Callable[[Tensor], Tensor], where: Tensor, draw: Draw) -> Lifted:
    leaves = [leaf for leaf in region.leaves if not draw.is_kept(leaf)]
    kept = {leaf: draw.one(leaf) for leaf in region.leaves if leaf not in leaves}

    def full(weights: Sequence[Tensor]) -> list[Tensor]:
        given = dict(zip(leaves, weights, strict=True))
        return [kept[leaf] if leaf in kept else given[leaf] for leaf in region.leaves]

    weights = draw(leaves)
    heads = take(region.run(random(region, 1.0, 31), full(weights)))
    first, head_of = _distinct(heads)

    def run(u: Tensor, given: Sequence[Tensor]) -> Tensor:
        return take(region.run(u, full(given)))[first]

    probe = Probe(region.letter, lambda u: run(u, weights), where, region.positions, region.rows)
    found = matrix(probe)
    turn = decode(found, region.letter)
    weighed = Weighed(region.letter, run, random(region, 1.0 if found.kind is None else LARGE, 32), where, found, turn)
    gain = affine(scan.graph, f"gain of {region.letter}", weighed.gain, leaves, draw)
    shift = _shift(scan, weighed, leaves, draw)
    norm = _norm(weighed, weights)
    ones = Affine(np.ones(gain.constant.shape))
    if norm is not None and norm.kind == "rms" and gain.tensor is None:
        norm, gain = _as_l2(norm, gain, found)
    token = turn.token
    operand = Operand(
        roots=tuple(part for root in region.roots for part in root.parts),
        rows=turn.rows.numpy().astype(np.int64),
        gain=ones if weighed.gain_is_after else gain,
        norm=norm,
        shift=shift,
        rope=rope(turn),
        after=gain if weighed.gain_is_after else None,
        token_gain=None if bool((token == 1).all()) else token.numpy(),
    )
    return Lifted(operand, tuple(head_of))


def _distinct(heads: Tensor) -> tuple[Tensor, list[int]]:
    """The first of each kind of head, and for each head its kind: repeated kv heads are equal on any input."""
    flat = heads.reshape(len(heads), -1)
    kinds: list[int] = []
    head_of: list[int] = []
    for row in flat:
        match = [i for i, kind in enumerate(kinds) if torch.equal(flat[kind], row)]
        head_of.append(match[0] if match else len(kinds))
        if not match:
            kinds.append(len(head_of) - 1)
    return torch.tensor(kinds), head_of


def _shift(scan: Scan, weighed: Weighed, leaves: Sequence[object], draw: Draw) -> Affine | None:
    """The added vector, None where there is none."""
    shift = affine(scan.graph, f"vector added to {weighed.letter}", weighed.shift, leaves, draw)  # type: ignore[arg-type]
    nothing = shift.tensor is None and not np.any(shift.constant)
    return None if nothing else shift


def _norm(weighed: Weighed, weights: Sequence[Tensor]) -> Norm | None:
    """Kind, group and eps; the group is one head, or all rows of the operand."""
    found = weighed.matrix
    if found.kind is None or found.group is None:
        return None
    rows, letter = weighed.turn.rows, weighed.letter
    members = [set(torch.nonzero(group).reshape(-1).tolist()) for group in found.group]
    eps = weighed.eps(weights)
    if all(group == set(row) for group, row in zip(members, rows.tolist(), strict=True)):
        return Norm(found.kind, "head", eps)
    if all(group == set(rows.reshape(-1).tolist()) for group in members):
        return Norm(found.kind, "row", eps)
    raise NotLifted(f"a norm over {len(members[0])} rows of {letter}, which are neither one head nor all of them")


def _as_l2(norm: Norm, gain: Affine, found: Matrix) -> tuple[Norm, Affine]:
    """An rms norm with gain 1/sqrt(N) is an l2 norm."""
    assert found.group is not None
    count = int(found.group[0].sum())
    root: FloatArray = gain.constant * np.sqrt(count)
    if not np.allclose(root, 1.0, rtol=1e-7) or count == 1:
        return norm, gain
    return Norm("l2", norm.over, norm.eps * count), Affine(np.ones(root.shape))


__all__ = ["Lifted", "Triple", "heads_of", "triple"]
