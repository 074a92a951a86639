"""What a kv head loses by reading fewer keys, measured on calibration text, and who gets how many.

Heads are measured one by one: what leaves the attention is a sum over heads, and their errors are all but orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from passes.knapsack import frontier
from passes.masked import parts, table
from passes.moments import SiteBatch
from passes.sparse_shape import cost, own_window, static_mask
from rewrite.heads import Weights
from rewrite.site import Site

MEASURED = 2
"""Batches on which candidates are measured."""
STEPS = (16, 12, 8, 6, 4, 3, 2)
"""Windows are these parts of 32 of the context, and halves of the smallest ..."""
LEAST = 4
"""... down to so many tokens."""


def windows(tokens: int, most: int | None) -> tuple[int, ...]:
    """Windows to try for a text of so many tokens, the narrowest first; none as wide as what the site itself reads."""
    found = {tokens * part // 32 for part in STEPS}
    width = tokens // 32
    while width >= LEAST:
        found.add(width)
        width //= 2
    return tuple(sorted(w for w in found if w >= LEAST and (most is None or w < most) and w < tokens))


@dataclass(frozen=True, eq=False)
class Losses:
    """By kv head and window (None: all): squared error of the attention's output relative to the output's energy, and
    the share of attention that is not read."""

    errors: tuple[Mapping[int | None, float], ...]
    hidden: tuple[Mapping[int | None, float], ...]


def losses(site: Site, weights: Weights, batches: Iterable[SiteBatch], sinks: int, tokens: int) -> Losses:
    """Measure every window at every kv head."""
    tried = windows(tokens, own_window(site))
    g, of = site.k.heads, torch.tensor(site.kv_of)
    wrong = {w: torch.zeros(g, dtype=torch.float64) for w in tried}
    hidden = {w: torch.zeros(g, dtype=torch.float64) for w in tried}
    metric = [_metric(weights.out[:, of == i]) for i in range(g)]
    energy = count = 0.0
    for batch in islice(batches, MEASURED):
        for part in parts(batch, torch.float32):
            z = part.p @ part.v
            y = torch.einsum("bhtd,ohd->bto", z.double(), weights.out)
            y = y if weights.out_bias is None else y + weights.out_bias
            energy += float(y.square().sum())
            count += z.shape[0] * z.shape[2]
            for w in tried:
                keep = table(static_mask(site, w, sinks), part.at, part.p.shape[-1], 1)
                made, away = part.outputs(keep)
                lost, away = made.sub_(z), away.double().sum((0, 2, 3))
                for i in range(g):
                    rows = lost[:, of == i].transpose(1, 2).flatten(2).flatten(0, 1)
                    wrong[w][i] += float((rows.T @ rows).double().mul_(metric[i]).sum())
                    hidden[w][i] += float(away[of == i].mean())
    errors = tuple({None: 0.0} | {w: float(wrong[w][i]) / max(energy, 1e-300) for w in tried} for i in range(g))
    shares = tuple({None: 0.0} | {w: float(hidden[w][i]) / max(count, 1.0) for w in tried} for i in range(g))
    return Losses(errors, shares)


def _metric(out: Tensor) -> Tensor:
    """(heads * dim, heads * dim): what an error of some heads' outputs is in the attention's output."""
    flat = out.flatten(1)
    return flat.T @ flat


@dataclass(frozen=True, eq=False)
class Shares:
    """Windows of all kv heads for totals of pairs: total -> (error, windows), less error with more pairs."""

    by_total: Mapping[int, tuple[float, tuple[int | None, ...]]]
    full: int

    def within(self, total: int) -> tuple[float, tuple[int | None, ...]]:
        """The best that needs no more pairs; the least of all where even that is more."""
        fits = [n for n in self.by_total if n <= total]
        return self.by_total[max(fits, default=min(self.by_total))]


def shared_out(site: Site, found: Losses, sinks: int, tokens: int) -> Shares:
    """The exact answer for every total at once."""
    costs = {w: cost(site, tokens, sinks, w) for w in found.errors[0]}
    of_cost = {n: w for w, n in sorted(costs.items(), key=lambda item: (item[0] is None, item[0] or 0))}
    errors = {str(i): {n: e[w] for n, w in of_cost.items()} for i, e in enumerate(found.errors)}
    full = costs[None] * site.k.heads
    least = min(of_cost) * site.k.heads
    states = frontier(errors, full - least)
    made = {used + least: (error, tuple(of_cost[n] for n in chosen)) for used, (error, chosen) in states.items()}
    return Shares(made, full)
