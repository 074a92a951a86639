"""What acts on the scores: scale, soft cap, bias, mask and sinks, read off constant scores 0, 1 and 1000."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from passes.canonicalise import Graph
from passes.find.core import Core
from passes.find.draw import Draw
from passes.find.gains import affine
from passes.find.leads import Leads
from passes.find.roots import NotLifted
from passes.find.scores import MASKED
from rewrite.mask import Mask, listed, recognise
from rewrite.site import Affine, Bias, Mod, Sink, Softcap

BIG = 1e12
"""A score at which any soft cap is at its cap."""
ABSORBED = -1e30
"""Adding a score to less than this changes nothing, in any float dtype."""


@dataclass(frozen=True, eq=False)
class Law:
    """Everything per block and head: scale (h,), cap, bias and keep (block, h, t, s), sinks (block, h, t, n)."""

    scale: Tensor
    cap: float | None
    bias: Tensor | None
    keep: Tensor
    sinks: Tensor | None


@dataclass(frozen=True, eq=False)
class Asked:
    """The scores stage with values for what it hangs on, in blocks and heads."""

    core: Core
    at: Leads

    def __call__(self, value: float | Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Softmax input (block, h, t, s) of constant scores, or of scores (lead, queries, keys)."""
        shape = self.core.scores.shape()
        scores = value if isinstance(value, Tensor) else torch.full(shape, value, dtype=torch.float64)
        x, sinks = self.core.scores(scores, given)
        return self._blocked(x), None if sinks is None else self._blocked(sinks)

    def _blocked(self, x: Tensor) -> Tensor:
        # a row of scores is a row of q
        return x.reshape(-1, x.shape[-1])[self.at.q_rows][self.at.blocks]


def law(asked: Asked, given: Sequence[Tensor]) -> Law:
    """Probe the scores for given parameters and inputs."""
    node = asked.core.anchor.node
    zero, sinks = asked(0.0, given)
    one, thousand = (asked(s, given)[0] for s in (1.0, MASKED))
    best = zero.amax(-1, keepdim=True)
    keep = (zero >= best - MASKED) & (zero > ABSORBED)
    if (keep & (thousand == zero)).any():
        raise NotLifted("some scores are replaced by a constant that is not masked", node)
    bias = torch.where(keep, zero, 0.0)
    slope = _per_head(one - zero, keep, node)
    cap = None
    expected = zero + MASKED * slope[:, None, None]
    if not torch.allclose(thousand[keep], expected[keep], 1e-9, 1e-9):
        top = asked(BIG, given)[0] - zero
        cap = float(f"{float(top[keep].median()):.9g}")
        slope = cap * torch.atanh((slope / cap).clamp(-0.999999, 0.999999))
    found = Law(slope, cap, bias if bool((bias != 0).any()) else None, keep, sinks)
    _check(asked, given, found, zero)
    return found


def _per_head(slope: Tensor, keep: Tensor, node: object) -> Tensor:
    """(h,): one slope for each head over blocks and pairs."""
    seen = torch.where(keep, slope, torch.nan)
    heads = seen.transpose(0, 1).flatten(1).nanmedian(1).values
    away = (seen - heads[:, None, None]).abs().nan_to_num(0.0)
    if away.max() > 1e-9 * heads.abs().max() or bool(heads.isnan().any()):
        raise NotLifted("the scale differs from pair to pair: it is computed from the input", node)  # type: ignore[arg-type]
    return heads


def _check(asked: Asked, given: Sequence[Tensor], found: Law, zero: Tensor) -> None:
    """Random scores must obey the law."""
    generator = torch.Generator().manual_seed(41)
    raw = torch.randn(asked.core.scores.shape(), dtype=torch.float64, generator=generator) * 3
    value = asked(raw, given)[0]
    scores = raw.reshape(-1, raw.shape[-1])[asked.at.q_rows][asked.at.blocks] * found.scale[:, None, None]
    if found.cap is not None:
        scores = found.cap * torch.tanh(scores / found.cap)
    if not torch.allclose((value - zero)[found.keep], scores[found.keep], 1e-7, 1e-7):
        raise NotLifted("the scores pass a nonlinearity that is not a soft cap", asked.core.anchor.node)


def scale_of(found: Law) -> tuple[float, ...]:
    """One value where the heads agree."""
    values = [float(f"{x:.12g}") for x in found.scale.tolist()]
    alike = max(values) - min(values) <= 1e-9 * max(abs(x) for x in values)
    return (values[0],) if alike else tuple(values)


def mods(graph: Graph, asked: Asked, found: Law, draw: Draw, changes: bool) -> tuple[Mod, ...]:
    """Cap, bias and sinks in the order in which they act. `changes`: the bias moves with the inputs."""
    out: list[Mod] = []
    if found.cap is not None:
        out.append(Softcap(found.cap))
    if found.bias is not None:
        out.append(_bias(graph, asked, found, draw, changes))
    if found.sinks is not None:
        out.extend(Sink(_sink(graph, asked, draw, i)) for i in range(found.sinks.shape[-1]))
    return tuple(out)


def _bias(graph: Graph, asked: Asked, found: Law, draw: Draw, changes: bool) -> Bias:
    assert found.bias is not None
    if changes:
        return Bias("input")
    leaves = asked.core.scores.leaves
    if any(leaf in graph.parameters and not draw.is_kept(leaf) for leaf in leaves):
        other = law(asked, draw.change(1)(leaves))
        if other.bias is None or not torch.equal(other.bias, found.bias):
            return Bias("parameters")
    return Bias("constant", _slopes(found.bias, found.keep))


def _slopes(bias: Tensor, keep: Tensor) -> tuple[float, ...] | None:
    """ALiBi: along the keys of every query the bias grows by one slope a head."""
    both = keep[..., 1:] & keep[..., :-1]
    step = torch.where(both, bias[..., 1:] - bias[..., :-1], torch.nan)
    heads = step.transpose(0, 1).flatten(1).nanmedian(1).values
    away = (step - heads[:, None, None]).abs().nan_to_num(0.0)
    if heads.isnan().any() or away.max() > 1e-6 * heads.abs().max():
        return None
    return tuple(float(f"{x:.9g}") for x in heads.tolist())


def _sink(graph: Graph, asked: Asked, draw: Draw, i: int) -> Affine:
    """The logit of each head, linked to its parameter."""
    leaves = asked.core.scores.leaves
    fixed = {j: draw.one(leaf) for j, leaf in enumerate(leaves) if leaf not in graph.parameters}
    free = [leaf for leaf in leaves if leaf in graph.parameters]

    def values(weights: Sequence[Tensor]) -> Tensor:
        given = iter(weights)
        full = [fixed[j] if j in fixed else next(given) for j in range(len(leaves))]
        sinks = asked(0.0, full)[1]
        assert sinks is not None
        logits = sinks[0, :, 0, i]
        if not torch.equal(sinks[..., i], logits[:, None].expand_as(sinks[..., i])):
            raise NotLifted("a sink logit changes from token to token", asked.core.anchor.node)
        return logits

    return affine(graph, "sink logit", values, free, draw)


def mask(found: Law, on_input: bool) -> Mask:
    """The predicate. Hanging on an input it is a hint, and a predicate of the keys alone is left out of it."""
    keep = found.keep.numpy()
    flat = keep.reshape(-1, *keep.shape[2:])
    alike = bool((flat == flat[:1]).all())
    # tables that differ from block to block are an operand, whatever they hang on
    union = np.asarray(flat.any(0), dtype=np.bool_)
    named = recognise(union) or listed(union)
    return named if alike and not on_input else named.with_origin("input")
