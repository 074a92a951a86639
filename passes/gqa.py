"""Grouped-query attention: fewer kv heads than the model has, each standing in for a group of them.

before: k_i, v_i for every kv head          after: one k, v a group; W_q, W_o take what the group's heads differ by
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import numpy as np
import torch

from passes.gqa_build import Parts, build, contiguous, movable, order_of
from passes.gqa_groups import Grouping, cheapest, neighbours
from passes.gqa_keys import KeyMerge, closed_loss, key_energy, merge_keys
from passes.gqa_pool import pooled_keys, pooled_values
from passes.gqa_refuse import refuse_site
from passes.gqa_source import Facts, facts
from passes.gqa_values import ValueMerge, carries_mean, merge_values, value_energy
from passes.polish import polish, polishes
from passes.refit import measure, refit, refitted_error
from rewrite.heads import Rewritten, Weights
from rewrite.site import Affine, Grouped, Operand, Site

if TYPE_CHECKING:
    from passes import Stats

T = TypeVar("T")
Method = Literal["default", "mean", "aligned"]
VALUE_SHARE = 0.2
"""Weight of the values' loss beside the keys' when groups are chosen; each relative to its total."""
CANDIDATES = 8
"""Groupings whose output error is measured."""
TRIALS = 1
"""Batches on which candidates are measured."""
EVEN: tuple[float | None, ...] = (None, 0.0, 0.1, 0.5)
"""Shares of evenly attended distances that are tried; None is a uniform phase for every rotating pair."""


@dataclass(frozen=True)
class GQA:
    """Fewer kv heads. `kv_heads` may be one number per site. Methods: "default" merges heads so that scores and
    outputs change least; "mean" and "aligned" are the published poolings. `refit` solves the output projection anew
    on the calibration; `polish` is the most Gauss-Newton steps on the attention's own output error, 0 for none."""

    name: ClassVar[str] = "gqa"
    needs: ClassVar[frozenset[str]] = frozenset({"q_gram", "k_gram", "v_gram", "k_inverse", "v_inverse", "phases"})

    kv_heads: int | tuple[int, ...]
    method: Method = "default"
    refit: bool = True
    polish: int = 5

    def __post_init__(self) -> None:
        counts = self.kv_heads if isinstance(self.kv_heads, tuple) else (self.kv_heads,)
        if not counts or any(n < 1 for n in counts):
            raise ValueError(f"kv_heads must be at least 1, got {self.kv_heads}")
        if self.method not in ("default", "mean", "aligned"):
            raise ValueError(f"method must be default, mean or aligned, got {self.method}")

    def for_site(self, index: int, total: int) -> GQA:
        """The target of the `index`-th of `total` sites."""
        if not isinstance(self.kv_heads, tuple):
            return self
        if len(self.kv_heads) != total:
            raise ValueError(
                f"kv_heads gives {len(self.kv_heads)} numbers for {total} sites; give one number, or {total}"
            )
        return replace(self, kv_heads=self.kv_heads[index])

    def refuse(self, site: Site) -> str | None:
        """Why this site must stay as it is."""
        if isinstance(self.kv_heads, tuple):
            return f"kv_heads gives {len(self.kv_heads)} numbers, and this site was not told which is its own"
        return refuse_site(site, self.kv_heads)

    def after(self, site: Site) -> Site:
        """The site with fewer kv heads; new head n has the rows of the first old head of the n-th neighbours."""
        groups = self._groups(site)
        size = site.k.heads // groups
        first = np.arange(groups) * size
        return replace(
            site,
            k=_fewer(site.k, first),
            v=_fewer(site.v, first),
            kv_of=tuple(i // size for i in site.kv_of),
            form=Grouped(groups) if groups < site.heads else site.form,
        )

    def rewrite(self, site: Site, weights: Weights, stats: Stats | None) -> Rewritten:
        """Merge the heads; `stats` None means weights only."""
        groups = self._groups(site)
        if groups == site.k.heads:
            return Rewritten(self.after(site), weights, tuple(range(site.heads)))
        known = facts(site, weights, None if stats is None else stats.moments)
        if self.method != "default":
            parts = _pooled(known, weights, groups, self.method == "aligned")
        elif stats is None:
            parts = _merged(known, weights, _splits(known, weights, groups, 1)[0], 0.0)
        else:
            parts = _searched(known, weights, groups, stats)
            if self._polished(site):
                parts = polish(site, weights, parts, stats, self.polish)
        made, order = parts.weights(weights), parts.order
        notes: list[str] = []
        if stats is None:
            notes.append("weights only: groups and distances are not measured, the output projection is not refitted")
        elif self.refit:
            made, note = refit(made, measure(stats, made, order.kv_of))
            notes += [f"{site.name}: {note}"] if note and not self._polished(site) else []
        return Rewritten(replace(self.after(site), kv_of=order.kv_of), made, order.query, tuple(notes))

    def lossless(self, site: Site) -> GQA:
        """As many kv heads as there are."""
        return GQA(site.kv_heads)

    def _polished(self, site: Site) -> bool:
        return self.method == "default" and self.refit and self.polish > 0 and polishes(site)

    def _groups(self, site: Site) -> int:
        if isinstance(self.kv_heads, tuple):
            raise ValueError(f"{site.name}: kv_heads is given per site; take the site's own target with for_site")
        reason = self.refuse(site)
        if reason is not None:
            raise ValueError(f"{site.name}: {reason}")
        return self.kv_heads


def _merged(known: Facts, weights: Weights, split: Grouping, even: float | None) -> Parts:
    keys = [merge_keys(known, g, even) for g in split]
    centred = carries_mean(known.site, weights)
    values = [merge_values(known, g, centred) for g in split]
    return build(known, weights, keys, values, order_of(known.site, split))


def _splits(known: Facts, weights: Weights, groups: int, most: int) -> tuple[Grouping, ...]:
    """Candidate groupings. Where query heads must stay in place and stand in order, only neighbours keep the order."""
    site = known.site
    if contiguous(site) and not movable(site):
        return (neighbours(site.k.heads, groups),)
    centred = carries_mean(site, weights)
    key_total, value_total = key_energy(known), value_energy(known, centred)

    def cost(group: tuple[int, ...]) -> float:
        keys = closed_loss(known, group) / max(key_total, 1e-300)
        return keys + VALUE_SHARE * merge_values(known, group, centred).loss / max(value_total, 1e-300)

    return cheapest(site.k.heads, groups, cost, most)


def _searched(known: Facts, weights: Weights, groups: int, stats: Stats) -> Parts:
    """The grouping, then the phase moments, with the least output error measured on part of the calibration."""

    alone = stats.alone

    def error(split: Grouping, even: float | None) -> float:
        parts = _merged(known, weights, split, even)
        made = parts.weights(weights)
        return refitted_error(made, measure(alone, made, parts.order.kv_of, TRIALS))

    def least(tried: Sequence[T], lost: Callable[[T], float]) -> T:
        errors = [found[0] for found in stats.share(tried, lambda one: (lost(one),))]
        return tried[errors.index(min(errors))]

    splits = _splits(known, weights, groups, CANDIDATES)
    split = splits[0] if len(splits) == 1 else least(splits, lambda s: error(s, EVEN[1]))
    even = least(EVEN, lambda e: error(split, e)) if known.site.k.rope is not None else None
    return _merged(known, weights, split, even)


def _pooled(known: Facts, weights: Weights, groups: int, aligned: bool) -> Parts:
    """Neighbours, as published. Mean pooling takes the weights as they are, whatever a norm makes of them."""
    split = neighbours(known.site.k.heads, groups)
    if not aligned:
        known = replace(known, k_inverse=torch.ones_like(known.k_inverse), v_inverse=torch.ones_like(known.v_inverse))
    keys: list[KeyMerge] = [pooled_keys(known, g, aligned) for g in split]
    values: list[ValueMerge] = [pooled_values(known, g, aligned) for g in split]
    return build(known, weights, keys, values, order_of(known.site, split))


def _fewer(operand: Operand, heads: np.ndarray) -> Operand:
    """The operand of some of its heads, with the rows of just those left in the projection."""
    (root,) = operand.roots
    rows = operand.rows[heads]
    flat = rows.reshape(-1)
    kept = replace(root, starts=root.starts[flat], bias_at=None if root.bias_at is None else root.bias_at[flat])
    return replace(
        operand,
        roots=(kept,),
        rows=np.arange(rows.size, dtype=np.int64).reshape(rows.shape),
        gain=_some(operand.gain, heads),
        shift=None if operand.shift is None else _some(operand.shift, heads),
        after=None if operand.after is None else _some(operand.after, heads),
    )


def _some(values: Affine, heads: np.ndarray) -> Affine:
    def pick(a: np.ndarray | None) -> np.ndarray | None:
        return None if a is None else (a[heads] if len(a) > 1 else a)

    return Affine(
        values.constant[heads] if len(values.constant) > 1 else values.constant,
        pick(values.factor),
        values.tensor,
        pick(values.index),
    )
