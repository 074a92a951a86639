"""Multi-head latent attention: one small vector per token in place of the keys and values of all heads.

before: k_i, v_i for every kv head          after: a latent c and a few turned channels r, read by all heads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from passes.mla_absorb import Absorber, Setting
from passes.mla_basis import keys_values
from passes.mla_exact import exact
from passes.mla_influence import influence, mixed
from passes.mla_polish import affordable, polish
from passes.mla_refuse import refuse_even, refuse_site, refuse_size
from passes.mla_scene import Scene, error, measure, scenes
from passes.mla_search import ALONE, Trials, enough, search, search_factor, settings
from passes.mla_shape import Shape, budget, even_split, lossless, split
from passes.mla_source import Known, known
from passes.refit import refit
from rewrite.heads import Latents, Rewritten, Weights
from rewrite.site import Latent, Site

if TYPE_CHECKING:
    from passes import Stats

Form = Literal["absorbed", "rebuilt"]
POLISH_TOKENS = 16384
"""Calibration tokens whose keys and values a polish sees."""
POLISH_EVERY = 3
"""One query of so many is looked at: neighbours in a text tell much the same, and the keys are all there."""
CHOOSING = 2
"""Steps after which the better of two splits is known."""
TRIAL_TOKENS = 4096
"""Calibration tokens on which settings are measured."""


@dataclass(frozen=True)
class MLA:
    """A latent cache. One of `rank` (with `rope_dim`, numbers per token), `cache` (a share of the source's numbers;
    calibration splits it) and `keep` (a share of what the output hangs on) says how small; each may be one per site.

    `form`: "absorbed" reads the latent as it is, so that decoding runs in it; "rebuilt" expands keys at every step and
    turns them, which loses less and computes more. `even` keeps one turned channel of each of evenly spaced
    frequencies, as serving engines turn them (docs/serving.md); it loses more than the channels worth most.
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
        return replace(self, **own) if own else self

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
        seen = known(site, weights, None if stats is None else stats.moments, 0 if stats is None else stats.tokens)
        shape = self._shape(site)
        notes: list[str] = []
        if shape == lossless(site, self._rebuilt) and self.keep is None:
            latents, made = exact(site, weights, self._rebuilt, seen.second)
        else:
            latents, made, notes = self._lossy(seen, weights, stats, shape)
        form = self._form(Shape(latents.rank, latents.rope_dim))
        return Rewritten(replace(site, form=form), made, tuple(range(site.heads)), tuple(notes), latents)

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

    def _lossy(
        self, seen: Known, weights: Weights, stats: Stats | None, shape: Shape
    ) -> tuple[Latents, Weights, list[str]]:
        site = seen.site
        seen = replace(seen, centred=seen.centred and not (self._rebuilt and site.k.rope is not None))
        absorber = Absorber(seen, torch.ones(site.heads, dtype=torch.float64), self.even)
        if self.keep is not None:
            shape = enough(absorber, self.keep, self._rebuilt)
            if shape == lossless(site, self._rebuilt):
                return (*exact(site, weights, self._rebuilt, seen.second), [])
        if stats is None:
            latents = self._alone(absorber, shape)
            return latents, shifted(seen, weights, latents), ["weights only: distances and errors are not measured"]
        stage = [*scenes(stats, weights, TRIAL_TOKENS)]
        felt = influence(stage, seen)
        seen = replace(seen, score_cost=felt.score_cost, mix=mixed(seen, felt.within))
        absorber = Absorber(seen, felt.value_share, self.even)
        setting = self._searched(absorber, weights, stage, shape)
        latents = self._made(absorber, setting, shape)
        made = shifted(seen, weights, latents)
        if not self.refit:
            return latents, made, []
        if self.polish and not self._rebuilt:
            latents, made = self._polished(absorber, weights, stats, setting, shape)
        made, note = refit(made, measure(scenes(stats, weights), latents, made))
        return latents, made, [f"{site.name}: {note}"] if note and not self.polish else []

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
        if not affordable(stage, starts[0], self.polish):
            return starts[0], shifted(absorber.known, weights, starts[0])
        first = min(self.polish, CHOOSING) if len(starts) > 1 else self.polish
        tried = [polish(stage, s, shifted(absorber.known, weights, s), first) for s in starts]
        best = min(tried, key=lambda p: p.error)
        if first < self.polish:
            best = polish(stage, best.latents, best.weights, self.polish - first)
        return best.latents, best.weights

    def _alone(self, absorber: Absorber, shape: Shape) -> Latents:
        if self._rebuilt:
            return absorber.rebuilt(ALONE, shape.rank)
        return absorber.latents(settings(absorber, shape.total, ALONE, self._fixed(shape)), shape.total)

    def _searched(self, absorber: Absorber, weights: Weights, stage: Sequence[Scene], shape: Shape) -> Setting:
        """The setting with the least measured error."""

        def lost(setting: Setting) -> float:
            latents = self._made(absorber, setting, shape)
            return error(stage, latents, shifted(absorber.known, weights, latents))

        if self._rebuilt:
            return search_factor(Trials(lost), lambda factor: Setting(factor, False, 0))
        return search(absorber, shape.total, self._fixed(shape), lost)

    def _made(self, absorber: Absorber, setting: Setting, shape: Shape) -> Latents:
        if self._rebuilt:
            return absorber.rebuilt(setting.factor, shape.rank)
        return absorber.latents(setting, shape.total)

    def _fixed(self, shape: Shape) -> int | None:
        """How many channels turn, where that was asked for."""
        return shape.rope_dim if self.rank is not None or self.even else None


def shifted(seen: Known, weights: Weights, latents: Latents) -> Weights:
    """The output's bias with the mean of the values that the latent does not give back."""
    if weights.out_bias is None or not seen.centred:
        return weights
    site = seen.site
    _, mean = keys_values(site, seen.basis, seen.mean)
    mean = mean.reshape(site.v.heads, site.v.dim)[list(site.kv_of)]
    lost = mean - latents.up_v @ (latents.down @ seen.mean)
    return replace(weights, out_bias=weights.out_bias + torch.einsum("ohd,hd->o", weights.out, lost))


def _each(value: float | tuple[float, ...] | None) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)
