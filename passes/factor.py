"""MLA where nothing is cached (an encoder, a plain module): keys and values from few numbers of a token, which saves
parameters and work.

before: k = W_k x, v = W_v x          after: c = down x, k = up_k c, v = up_v c, or one such product each
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from passes.factor_known import rows_known
from passes.factor_shape import Sides, refuse_rank, refuse_rows, share_rank, sides
from passes.factor_solve import Solver, exact
from passes.mla import MLA
from passes.mla_refuse import refuse_site
from passes.mla_scene import TRIAL_TOKENS, scenes
from passes.mla_search import ALONE
from passes.refit import measure, output_error, refit
from rewrite.heads import Factors, Rewritten, Weights
from rewrite.shared import shared
from rewrite.site import Factored, Site

if TYPE_CHECKING:
    from passes import Stats

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the keys' errors against the values', of which measuring chooses."""
WIDE = 1024
"""Rows of both projections beyond which fewer are tried."""
WIDE_FACTORS = (0.3, 3.0)


@dataclass(frozen=True)
class LowRank:
    """What `asked` means for a site that caches nothing.

    `rank` is that of one latent for keys and values; `cache` says it as a share of the rows of both projections, `keep`
    as a share of what the output hangs on. Two latents, or one beside a projection that stays as it is, are taken where
    they hold no more numbers and lose less. `form` is no matter: keys are always expanded.
    """

    name: ClassVar[str] = "mla"
    needs: ClassVar[frozenset[str]] = MLA.needs

    asked: MLA
    full: bool = False
    """Whatever it costs, nothing is lost."""

    def for_site(self, index: int, total: int) -> LowRank:
        """The target of the `index`-th of `total` sites."""
        return replace(self, asked=self.asked.for_site(index, total))

    def refuse(self, site: Site) -> str | None:
        """Why this site must stay as it is."""
        few = shared(site)
        if few is not None:
            return f"its keys and values are of low rank already: {few.rank} and {len(few.dims)} shared numbers"
        reason = refuse_site(site, True) or refuse_rows(site)
        if reason is not None or self.full:
            return reason
        if isinstance(self.asked.rope_dim, int) and self.asked.rope_dim:
            return f"rope_dim is {self.asked.rope_dim}, and nothing is cached that could be turned; leave it out"
        rank, most = self._rank(site), sides(site).most
        if rank is None:
            return None if most >= sides(site).least else refuse_rank(site, 1)
        if rank < 1:
            return f"{self.asked.cache:g} of the {sides(site).k.rows + sides(site).v.rows} rows is no number at all"
        return refuse_rank(site, rank)

    def after(self, site: Site) -> Site:
        """The site with one latent, where calibration may choose two of the same size; of `keep` it is the largest that
        can be needed."""
        have = sides(site)
        ranks = have.full if self.full else have.even(self._rank(site) or have.most)
        return _formed(site, ranks)

    def rewrite(self, site: Site, weights: Weights, stats: Stats | None) -> Rewritten:
        """Projections of low rank; `stats` None means weights only."""
        reason = self.refuse(site)
        if reason is not None:
            raise ValueError(f"{site.name}: {reason}")
        have = sides(site)
        if self.full:
            return _rewritten(site, *exact(weights, have))
        stage = [] if stats is None else [*scenes(stats, weights, TRIAL_TOKENS)]
        solver = Solver(rows_known(site, weights, stats, stage), weights, have)
        rank = self._rank(site) or self._enough(solver, have)
        if rank is None:
            why = f"keep={self.asked.keep:g} needs more than rank {have.most}, beyond which nothing is saved"
            return Rewritten(site, weights, tuple(range(site.heads)), (f"{site.name}: {why}",))
        if stats is None:
            way = min(solver.ways(ALONE, rank), key=lambda w: solver.best(w, rank)[1])
            return _rewritten(site, *solver.made(way, rank), "weights only: distances and errors are not measured")
        return self._measured(solver, rank, stats)

    def lossless(self, site: Site) -> LowRank:
        """All that there is."""
        return replace(self, full=True)

    def _rank(self, site: Site) -> int | None:
        """None where that hangs on the weights."""
        if isinstance(self.asked.rank, int):
            return self.asked.rank
        return share_rank(site, self.asked.cache) if isinstance(self.asked.cache, float | int) else None

    def _enough(self, solver: Solver, have: Sides) -> int | None:
        """The least rank that keeps what is to be kept, None where it saves nothing."""
        wanted = (1 - (self.asked.keep or 1.0)) * solver.nothing(ALONE)
        low, high = have.least, have.most
        if solver.lost(ALONE, high) > wanted:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if solver.lost(ALONE, middle) > wanted else (low, middle)
        return low

    def _measured(self, solver: Solver, rank: int, stats: Stats) -> Rewritten:
        """The way with the least measured error, and the output projection solved anew."""
        site = solver.rows.site
        wide = site.k.rows.size + site.v.rows.size > WIDE
        tried: dict[tuple[object, ...], tuple[float, Factors, Weights]] = {}
        for factor in WIDE_FACTORS if wide else FACTORS:
            for way in solver.ways(factor, rank):
                ranks, _ = solver.best(way, rank)
                # two apart differ by their ranks alone
                key = ranks if way.apart else (way,)
                if key not in tried:
                    factors, made = solver.made(way, rank)
                    trials = _some(stats.attend(made, site.kv_of), TRIAL_TOKENS)
                    tried[key] = output_error(trials, made), factors, made
        _, factors, made = min(tried.values(), key=lambda t: t[0])
        if not self.asked.refit:
            return _rewritten(site, factors, made)
        made, note = refit(made, measure(stats, made, site.kv_of))
        return _rewritten(site, factors, made, *([f"{site.name}: {note}"] if note else []))


def _formed(site: Site, ranks: tuple[int | None, ...]) -> Site:
    return replace(site, form=Factored(site.k.heads, ranks))


def _rewritten(site: Site, factors: Factors, made: Weights, *notes: str) -> Rewritten:
    return Rewritten(_formed(site, factors.ranks), made, tuple(range(site.heads)), notes, factors=factors)


def _some(trials: Iterable[tuple[Tensor, Tensor]], tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    seen = 0
    for z, y in trials:
        yield z, y
        seen += len(y)
        if seen >= tokens:
            return
