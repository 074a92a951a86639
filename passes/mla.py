"""Multi-head latent attention: one small vector per token in place of the keys and values of all heads.

before: k_i, v_i for every kv head          after: a latent c and a few turned channels r, read by all heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from passes import Curve
from passes.mla_absorb import Absorber, Setting
from passes.mla_curve import absorbed_sizes, curve, rebuilt_sizes
from passes.mla_exact import exact
from passes.mla_influence import influence, mixed
from passes.mla_polish import WORK, polish, work
from passes.mla_rebuilt import UNMEASURED, cached_rows, rebuilder, search_way
from passes.mla_refuse import refuse_even, refuse_site, refuse_size
from passes.mla_scene import Scene, error, measure, refit_scenes, scenes, stage_of
from passes.mla_search import ALONE, enough, search, settings
from passes.mla_shape import Shape, budget, even_split, features, lossless, split
from passes.mla_source import Known, known, shifted
from passes.refit import refit
from rewrite.heads import Latents, Rewritten, Weights
from rewrite.modules import why_normed
from rewrite.ranks import Share
from rewrite.site import Latent, Site

if TYPE_CHECKING:
    from passes import Stats

Form = Literal["absorbed", "rebuilt"]
Made = tuple[Latents, Weights, list[str]]
WEIGHTS_ONLY = "weights only: distances and errors are not measured"
POLISH_TOKENS = 16384
"""Calibration tokens whose keys and values a polish sees."""
POLISH_EVERY = 3
"""One query of so many is looked at: neighbours in a text tell much the same, and the keys are all there."""
CHOOSING = 2
"""Steps after which the better of two splits is known."""


@dataclass(frozen=True)
class MLA:
    """A latent cache. One of `rank` (with `rope_dim`, numbers per token), `cache` (a share of the source's numbers;
    calibration splits it) and `keep` (a share of what the output hangs on) says how small; each may be one per site.

    `form`: "absorbed" reads the latent as it is, so that decoding runs in it; "rebuilt" expands keys at every step and
    turns them, which loses less and computes more. `even` keeps one turned channel of each of evenly spaced
    frequencies, as serving engines turn them (docs/serving.md); it loses more than the channels worth most.
    `spread`: with calibration, one `cache` for all sites is a total, of which each site gets what it gains most by, so
    that ranks differ; false gives all the same.
    Where nothing is cached (an encoder, a plain module) keys and values are projected through few numbers instead, to
    save parameters and work (passes/factor.py): `rank` is how many, `cache` their share of the rows of both
    projections, `keep` as above. All else of the attention is as it was; a size that saves nothing is refused.
    `refit` solves the output projection anew on the calibration; `polish` is the most Gauss-Newton steps on the
    attention's own output error, 0 for none.
    """

    name: ClassVar[str] = "mla"
    needs: ClassVar[frozenset[str]] = frozenset({"q_gram", "kv_gram", "turns"})

    rank: int | tuple[int, ...] | None = None
    rope_dim: int | tuple[int, ...] | None = None
    keep: float | None = None
    cache: float | tuple[float, ...] | None = None
    form: Form = "absorbed"
    even: bool = False
    refit: bool = True
    polish: int = 5
    spread: bool = True

    def __post_init__(self) -> None:
        given = [n for n in ("rank", "keep", "cache") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of rank, keep and cache, got {', '.join(given) or 'none'}")
        if any(r < 1 for r in _each(self.rank)):
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if any(d < 0 or d % 2 for d in _each(self.rope_dim)):
            raise ValueError(f"rope_dim must be even, as pairs turn, got {self.rope_dim}")
        for name, share in (("keep", self.keep), ("cache", self.cache)):
            if any(not 0 < s <= 1 for s in _each(share)):
                raise ValueError(f"{name} must be more than 0 and at most 1, got {share}")
        if self.even and (self.form == "rebuilt" or self.keep is not None):
            raise ValueError("even chooses channels of the absorbed form at a given rank or cache")
        if self.form not in ("absorbed", "rebuilt"):
            raise ValueError(f"form must be absorbed or rebuilt, got {self.form}")

    def for_site(self, index: int, total: int) -> MLA:
        """The target of the `index`-th of `total` sites."""
        own: dict[str, float] = {}
        for name in ("rank", "rope_dim", "cache"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                if len(value) != total:
                    raise ValueError(
                        f"{name} gives {len(value)} numbers for {total} sites; give one number, or {total}"
                    )
                own[name] = value[index]
        # numbers given site by site are not to be spread
        return replace(self, **own, spread=False) if own else self

    def refuse(self, site: Site) -> str | None:
        """Why this site must stay as it is."""
        for name in ("rank", "rope_dim", "cache"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                return f"{name} gives {len(value)} numbers, and this site was not told which is its own"
        reason = refuse_site(site, self._rebuilt)
        if reason is None and isinstance(self.rank, int):
            dim = self.rope_dim if isinstance(self.rope_dim, int) else None
            reason = refuse_size(site, self.rank, dim, self._rebuilt)
        if reason is None and self.even and isinstance(self.rank, int) and isinstance(self.rope_dim, int):
            reason = refuse_even(site, self.rope_dim)
        if reason is None and isinstance(self.cache, float | int) and budget(site, self.cache) < 2:
            reason = f"{self.cache:g} of its {site.cache_per_token} cached numbers is less than 2"
        return reason

    def after(self, site: Site) -> Site:
        """The site with a latent. Of `cache` the sum is what `rewrite` gives, and the split stands for the one that
        calibration chooses; of `keep` it is the most that can be needed."""
        return replace(site, form=self._form(self._shape(site)))

    def rewrite(self, site: Site, weights: Weights, stats: Stats | None) -> Rewritten:
        """Compress keys and values; `stats` None means weights only."""
        reason = self.refuse(site)
        if reason is not None:
            raise ValueError(f"{site.name}: {reason}")
        shape = self._shape(site)
        convert = self._expanding if self._rebuilt else self._absorbing
        latents, made, notes = convert(site, weights, stats, shape)
        form = self._form(Shape(latents.rank, latents.rope_dim))
        return Rewritten(replace(site, form=form), made, tuple(range(site.heads)), tuple(notes), latents)

    def share(self, site: Site) -> int | None:
        """Numbers per token, where the sites of one `cache` may differ."""
        if not self.spread or self.even or not isinstance(self.cache, float | int):
            return None
        share = budget(site, self.cache)
        return share if share < lossless(site, self._rebuilt).total else None

    def alike(self) -> str:
        """Evenly spaced channels are asked for by a class with one rank."""
        one = self.even and isinstance(self.cache, float | int)
        return "even=true is for a stock class, which has one rank for all layers" if one else ""

    def told(self, total: int) -> str:
        """The sites' total in words."""
        return f"{total} numbers a token in all"

    def curve(self, site: Site, weights: Weights, stats: Stats) -> Curve:
        """What the closed form loses: one search of settings, and other sizes near what it found."""
        share, full = budget(site, self.cache if isinstance(self.cache, float) else 1.0), lossless(site, self._rebuilt)
        stage = stage_of(stats, weights)
        if self._rebuilt:
            closed = rebuilt_sizes(rebuilder(site, weights, stats, stage))
            return curve(closed, weights, stage, share, full.total, self.refit, stats.share)
        absorber = self._measured(known(site, weights, stats.moments, stats.tokens), stage, full.total)
        return curve(absorbed_sizes(absorber, share), weights, stage, share, full.total, self.refit, stats.share)

    def sized(self, site: Site, size: int) -> MLA:
        """The target at one size."""
        return replace(self, cache=min(1.0, size / features(site)), spread=False)

    def lossless(self, site: Site) -> MLA:
        """All that there is."""
        return MLA(cache=1.0, form=self.form)

    @property
    def _rebuilt(self) -> bool:
        return self.form == "rebuilt"

    def _form(self, shape: Shape) -> Latent:
        return Latent(shape.rank, shape.rope_dim, self._rebuilt)

    def _shape(self, site: Site) -> Shape:
        if isinstance(self.rank, int):
            return Shape(self.rank, self.rope_dim if isinstance(self.rope_dim, int) else 0)
        if isinstance(self.cache, float | int) and self.even:
            return even_split(site, budget(site, self.cache))
        if isinstance(self.cache, float | int):
            return split(site, budget(site, self.cache), self._rebuilt)
        return lossless(site, self._rebuilt)

    def _expanding(self, site: Site, weights: Weights, stats: Stats | None, shape: Shape) -> Made:
        """Keys are expanded at every step."""
        full, reason = lossless(site, True).rank, why_normed(site) if site.k.norm is not None else None
        notes = [] if reason is None else [f"{site.name}: keys are cached behind their norm: {reason}"]
        if shape.rank == full and self.keep is None:
            return (*exact(site, weights, True, cached_rows(site, weights, stats).second), notes)
        stage = [] if stats is None else stage_of(stats, weights)
        closed = rebuilder(site, weights, stats, stage)
        rank = shape.rank if self.keep is None else closed.enough(self.keep, full)
        if rank == full:
            return (*exact(site, weights, True, closed.seen.second), notes)
        way = (
            UNMEASURED
            if stats is None
            else search_way(lambda w: _lost(stage, weights, closed.seen, closed.latents(w, rank), stats.share), site)
        )
        latents = closed.latents(way, rank)
        made = shifted(closed.seen, weights, latents)
        if stats is None:
            return latents, made, [*notes, WEIGHTS_ONLY]
        return self._refitted(site, latents, made, weights, stats, notes)

    def _absorbing(self, site: Site, weights: Weights, stats: Stats | None, shape: Shape) -> Made:
        """The latent is read as it is."""
        seen = known(site, weights, None if stats is None else stats.moments, 0 if stats is None else stats.tokens)
        most = shape.total if self.keep is None else None
        absorber = Absorber(seen, torch.ones(site.heads, dtype=torch.float64), self.even, most)
        shape = shape if self.keep is None else enough(absorber, self.keep)
        if shape == lossless(site, False):
            return (*exact(site, weights, False, seen.second), [])
        if stats is None:
            setting = settings(absorber, shape.total, ALONE, self._fixed(shape))
            latents = absorber.latents(setting, shape.total)
            return latents, shifted(seen, weights, latents), [WEIGHTS_ONLY]
        stage = stage_of(stats, weights)
        absorber = self._measured(seen, stage, shape.total)
        total = shape.total

        def lost(setting: Setting) -> float:
            return _lost(stage, weights, seen, absorber.latents(setting, total), stats.share)

        setting = search(absorber, total, self._fixed(shape), lost)
        latents = absorber.latents(setting, total)
        made = shifted(seen, weights, latents)
        notes: list[str] = []
        if self.refit and self.polish:
            notes = self._too_long(site, stage, latents, stats.tokens)
            if not notes:
                latents, made = self._polished(absorber, weights, stats, setting, shape)
        stage.clear()
        return self._refitted(site, latents, made, weights, stats, notes)

    def _refitted(
        self, site: Site, latents: Latents, made: Weights, source: Weights, stats: Stats, notes: list[str]
    ) -> Made:
        """With the output projection solved anew, where that is wanted."""
        if not self.refit:
            return latents, made, notes
        made, note = refit(made, measure(refit_scenes(stats, source, site), latents, made))
        return latents, made, [*notes, *([f"{site.name}: {note}"] if note and not self.polish else [])]

    def _too_long(self, site: Site, stage: Sequence[Scene], latents: Latents, tokens: int) -> list[str]:
        """Why there is no polish, where it would take longer than some minutes of one core."""
        asked = work(stage, latents, self.polish, min(tokens, POLISH_TOKENS), POLISH_EVERY)
        if asked <= WORK:
            return []
        return [f"{site.name}: no polish: {self.polish} steps take {asked:.2g} operations, and the most is {WORK:.2g}"]

    def _measured(self, seen: Known, stage: Sequence[Scene], numbers: int) -> Absorber:
        """The closed form with what errors cost on the stage."""
        felt = influence(stage, seen)
        seen = replace(seen, score_cost=felt.score_cost, mix=mixed(seen, felt.within))
        return Absorber(seen, felt.value_share, self.even, numbers)

    def _polished(
        self, absorber: Absorber, weights: Weights, stats: Stats, setting: Setting, shape: Shape
    ) -> tuple[Latents, Weights]:
        """The latent after a few steps on its maps, from the split that then loses least: a polished latent makes up
        for some of what does not turn, so that fewer channels may serve better than the closed form says."""
        settings = [setting]
        if self._fixed(shape) is None and setting.rope_dim >= 8:
            settings.append(replace(setting, rope_dim=setting.rope_dim * 3 // 8 * 2))
        starts = [absorber.latents(s, shape.total) for s in settings]
        stage = [*scenes(stats, weights, POLISH_TOKENS, every=POLISH_EVERY)]
        first = min(self.polish, CHOOSING) if len(starts) > 1 else self.polish
        tried = [polish(stage, s, shifted(absorber.known, weights, s), first, stats.share) for s in starts]
        best = min(tried, key=lambda p: p.error)
        if first < self.polish:
            best = polish(stage, best.latents, best.weights, self.polish - first, stats.share)
        return best.latents, best.weights

    def _fixed(self, shape: Shape) -> int | None:
        """How many channels turn, where that was asked for."""
        return shape.rope_dim if self.rank is not None or self.even else None


def _lost(stage: Sequence[Scene], weights: Weights, seen: Known, latents: Latents, share: Share) -> float:
    """The measured error of some latents, the output's bias as it then is."""
    return error(stage, latents, shifted(seen, weights, latents), share)


def _each(value: float | tuple[float, ...] | None) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)
