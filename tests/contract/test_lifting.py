"""Laws of the finder: a wrong description never passes validation, and what cannot be described is refused in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from passes.find.law import Law
from passes.find.lift import Description
from passes.find.roots import NotLifted
from passes.find.validate import validate
from rewrite.site import Affine, Operand, Rope, Site, Softcap
from tests.contract import lifted as z

MIDDLES: dict[str, tuple[z.Middle, int]] = {
    f.__name__: (f, kv)
    for f, kv in (
        (z.plain, z.H),
        (z.fused, z.H),
        (z.rotated, z.H),
        (z.normed, z.H),
        (z.grouped, 2),
        (z.capped, z.H),
        (z.alibi, z.H),
        (z.relative, z.H),
        (z.sunk, z.H),
        (z.windowed, z.H),
    )
}
Change = Callable[[Site], Site]


def check(told: Description, site: Site, law: Law | None = None) -> None:
    with torch.no_grad():
        validate(told.setting, site, law or told.law, told.factor)


@pytest.mark.parametrize("name", MIDDLES)
def test_the_right_description_passes(name: str) -> None:
    told = z.described(*MIDDLES[name])
    check(told, told.site)


def swapped(o: Operand) -> Operand:
    rows = o.rows.copy()
    rows[0, [0, 1]] = rows[0, [1, 0]]
    return replace(o, rows=rows)


def rolled(o: Operand) -> Operand:
    return replace(o, rows=np.roll(o.rows, 1, axis=0))


def with_rope(site: Site, change: Callable[[Rope], Rope], only_q: bool = False) -> Site:
    assert site.q.rope is not None
    assert site.k.rope is not None
    q = replace(site.q, rope=change(site.q.rope))
    return replace(site, q=q) if only_q else replace(site, q=q, k=replace(site.k, rope=change(site.k.rope)))


def slower(rope: Rope) -> Rope:
    """A base one percent off."""
    steps = np.arange(len(rope.frequencies)) / len(rope.frequencies)
    return replace(rope, frequencies=rope.frequencies * 1.01**-steps)


def repaired(rope: Rope) -> Rope:
    """Neighbours paired instead of halves."""
    return replace(rope, pairs=np.arange(rope.width).reshape(-1, 2))


def frozen(rope: Rope) -> Rope:
    """The slowest pair stands still."""
    return replace(rope, frequencies=np.where(rope.frequencies == rope.frequencies.min(), 0.0, rope.frequencies))


def heavier(values: Affine) -> Affine:
    assert values.factor is not None
    return replace(values, factor=values.factor * 1.001)


WRONG: dict[str, tuple[str, Change]] = {
    "q rows swapped": ("plain", lambda s: replace(s, q=swapped(s.q))),
    "k rows swapped": ("plain", lambda s: replace(s, k=swapped(s.k))),
    "v rows swapped": ("plain", lambda s: replace(s, v=swapped(s.v))),
    "k heads permuted": ("plain", lambda s: replace(s, k=rolled(s.k))),
    "v heads permuted": ("fused", lambda s: replace(s, v=rolled(s.v))),
    "kv map": ("grouped", lambda s: replace(s, kv_of=(0, 1, 0, 1))),
    "scale 0.1 % off": ("plain", lambda s: replace(s, scale=tuple(x * 1.001 for x in s.scale))),
    "base 1 % off": ("rotated", lambda s: with_rope(s, slower)),
    "turned backwards": ("rotated", lambda s: with_rope(s, lambda r: replace(r, frequencies=-r.frequencies))),
    "start on one side": ("rotated", lambda s: with_rope(s, lambda r: replace(r, start=r.start + 0.1), True)),
    "other pairing": ("rotated", lambda s: with_rope(s, repaired)),
    "slowest pair frozen": ("rotated", lambda s: with_rope(s, frozen)),
    "no rope": ("rotated", lambda s: replace(s, q=replace(s.q, rope=None), k=replace(s.k, rope=None))),
    "no norm": ("normed", lambda s: replace(s, q=replace(s.q, norm=None))),
    "other norm": ("normed", lambda s: replace(s, q=replace(s.q, norm=replace(s.q.norm, kind="layer")))),
    "norm over the row": ("normed", lambda s: replace(s, q=replace(s.q, norm=replace(s.q.norm, over="row")))),
    "gain 0.1 % off": ("normed", lambda s: replace(s, q=replace(s.q, gain=heavier(s.q.gain)))),
    "eps ten times": ("normed", lambda s: replace(s, k=replace(s.k, norm=replace(s.k.norm, eps=1e-2)))),
    "no eps": ("normed", lambda s: replace(s, k=replace(s.k, norm=replace(s.k.norm, eps=0.0)))),
    "no cap": ("capped", lambda s: replace(s, mods=())),
    "cap 1 % off": ("capped", lambda s: replace(s, mods=(Softcap(5.05),))),
    "no sink": ("sunk", lambda s: replace(s, mods=())),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_description_is_caught(what: str) -> None:
    middle, change = WRONG[what]
    told = z.described(*MIDDLES[middle])
    with pytest.raises(NotLifted, match="does not reproduce"):
        check(told, change(told.site))


def test_a_wrong_bias_or_mask_is_caught() -> None:
    told = z.described(z.alibi)
    with pytest.raises(NotLifted, match="does not reproduce"):
        check(told, told.site, replace(told.law, bias=None))
    keep = told.law.keep.clone()
    keep[0, 0, 5, 2] = False
    with pytest.raises(NotLifted, match="does not reproduce"):
        check(told, told.site, replace(told.law, keep=keep))


def l1_norm(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return z.plain(m, q / q.abs().sum(-1, keepdim=True), k, v)


def gated(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return z.plain(m, q * q.sigmoid(), k, v)


def shifted(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return z.plain(m, q, k + k.roll(1, 2), v)


def rolled_k(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return z.plain(m, q, k.roll(1, 2), v)


def rolled_kv(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return z.plain(m, q, k.roll(1, 2), v.roll(1, 2))


def mixed(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hadamard = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(z.D)] for i in range(z.D)])
    return z.plain(m, q @ hadamard, k, v)


def per_head(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = torch.cat([z.turn(q[:, h : h + 1], 10.0 * (h + 1)) for h in range(z.H)], 1)
    return z.plain(m, q, z.turn(k), v)


def xpos(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = torch.linspace(0.5, 0.9, z.D // 2).repeat(2) ** torch.arange(z.T)[:, None]
    return z.plain(m, z.turn(q) * decay, z.turn(k) / decay, v)


def squared(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s * s.abs()).softmax(-1) @ v


def talking(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhts,hg->bgts", q @ k.mT, m.table[:, : z.H])
    return s.softmax(-1) @ v


def two_products(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + v @ q.mT).softmax(-1) @ v


def positional(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return z.plain(m, q, k + torch.linspace(0, 1, z.T)[:, None], v)


def channels(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.mT @ k).softmax(-1) @ v.mT).mT


REFUSED: dict[z.Middle, str] = {
    l1_norm: "a column of q mixes 8 projection rows|not linear",
    gated: "q is not linear, and not one norm",
    shifted: "k mixes tokens",
    rolled_k: "keys and values read different tokens",
    rolled_kv: "tokens are reordered",
    mixed: "a column of q mixes 8 projection rows",
    per_head: "heads of q rotate by different angles",
    xpos: "not as a rotation with fixed gains",
    squared: "a nonlinearity that is not a soft cap",
    talking: "heads are mixed between the first product and the softmax",
    two_products: "a sum over 2 products",
    positional: "depends on the position is added to k",
    channels: "attention over channels",
}


@pytest.mark.parametrize("middle", REFUSED, ids=lambda f: f.__name__)
def test_what_cannot_be_described_is_refused_in_words(middle: z.Middle) -> None:
    found = z.lifted(middle)
    assert not found.sites
    (refused,) = found.refused
    assert re.search(REFUSED[middle], refused.refusal.reason), refused.refusal.reason
    assert re.fullmatch(r"\w+\.py:\d+", refused.refusal.where)
    assert refused.refusal.reason[0].islower() or refused.refusal.reason[0] in "qkv"
