"""Block-sparse attention: a mask that leaves fewer pairs of query and key, given, or found head by head by measurement.

before: every query reads what the model's mask shows          after: what a mask of its own shows of that
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar

from passes import Curve
from passes.refit import measured, refit
from passes.sparse_measure import Losses, Shares, losses, shared_out
from passes.sparse_refuse import refuse_mask, refuse_site, within
from passes.sparse_shape import LEVELS, changed, cost, mixture, own_window, static_mask, widest
from rewrite.heads import Rewritten, Weights
from rewrite.mask import Mask
from rewrite.site import Site, Sparse

if TYPE_CHECKING:
    from passes import Stats

SIZES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75)
"""Of its share of pairs, what a site is measured at."""
CONTEXT = 2048
"""Tokens of the text on which pairs are counted, where neither the target nor a calibration says how many."""


@dataclass(frozen=True)
class BlockSparse:
    """Fewer keys for every query. One of three:

    `mask`     a mask of rewrite.mask, for all sites: `causal & (window(1024) | sink(64))`
    `window`   the first `sink` keys and the last `window`, in all heads
    `density`  this share of the pairs that the sites read now, in texts of `context` tokens (those of the calibration):
               every kv head gets the whole context or a window, by what it and its layer lose on calibration text;
               with `uniform` or without calibration all get the same window

    `refit` solves the output projection anew on the calibration.
    """

    name: ClassVar[str] = "sparse"
    needs: ClassVar[frozenset[str]] = frozenset()

    mask: Mask | None = None
    window: int | None = None
    sink: int = 4
    density: float | None = None
    uniform: bool = False
    context: int | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        given = [n for n in ("mask", "window", "density") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of mask, window and density, got {', '.join(given) or 'none'}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, a token's own key, got {self.window}")
        if self.sink < 0:
            raise ValueError(f"sink must be 0 or more, got {self.sink}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be more than 0 and at most 1, got {self.density}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context must be at least 1, got {self.context}")

    def for_site(self, index: int, total: int) -> BlockSparse:
        """The target of the `index`-th of `total` sites: the same for all."""
        return self

    def at_length(self, tokens: int) -> BlockSparse:
        """With pairs counted in texts of so many tokens, where it does not say otherwise."""
        return replace(self, context=tokens) if self.density is not None and self.context is None else self

    def refuse(self, site: Site) -> str | None:
        """Why this site must stay as it is."""
        reason = refuse_site(site)
        if reason is not None or self.density is not None:
            return reason
        return refuse_mask(site, self._given(site))

    def after(self, site: Site) -> Site:
        """The site with another mask; of a density the mask is for calibration to find."""
        if self.density is not None:
            return replace(site, form=Sparse(site.kv_heads, (), self.density))
        return changed(site, within(site, self._given(site)))

    def rewrite(self, site: Site, weights: Weights, stats: Stats | None) -> Rewritten:
        """Find the mask where it is not given, and refit the output; `stats` None means weights only."""
        reason = self.refuse(site)
        if reason is not None:
            raise ValueError(f"{site.name}: {reason}")
        notes: list[str] = []
        if self.density is None:
            new = self.after(site)
        elif stats is None or self.uniform:
            width = widest(site, self._tokens, self._sinks(site), self.density)
            new = self._mixed(site, (width,) * site.k.heads)
            if stats is None:
                notes.append("weights only: all heads get the same window, as none is measured")
        else:
            found, shares = self._measured(site, weights, stats)
            _, chosen = shares.within(self._total(site))
            new = self._mixed(site, chosen)
            notes.append(f"{site.name}: {_told(found, chosen)}")
        return self._refitted(new, weights, stats, notes)

    def share(self, site: Site) -> int | None:
        """Pairs, where heads of all sites may share one density."""
        open_ = self.density is not None and not self.uniform and self.density < 1
        return self._total(site) if open_ else None

    def alike(self) -> str:
        """Where all get the same, that was asked for."""
        return ""

    def told(self, total: int) -> str:
        """The sites' total in words."""
        where = "" if self.context is None else f" of {self.context:,} tokens"
        return f"{100 * (self.density or 1):.3g} % of the pairs of query and key{where}, by kv head"

    def curve(self, site: Site, weights: Weights, stats: Stats) -> Curve:
        """What is lost at shares of the pairs around the site's own."""
        _, shares = self._measured(site, weights, stats)
        share = self._total(site)
        sizes = {min(round(share * part), shares.full) for part in SIZES}
        errors = {n: shares.within(n)[0] for n in sorted(sizes) if n >= min(shares.by_total)}
        size = max((n for n in errors if n <= share), default=min(errors))
        new = self._mixed(site, shares.within(size)[1])
        return Curve(errors | {shares.full: 0.0}, size, Rewritten(new, weights, tuple(range(site.heads))))

    def sized(self, site: Site, size: int) -> BlockSparse:
        """The target at so many pairs."""
        own = {f.name: getattr(self, f.name) for f in fields(BlockSparse)}
        return Budgeted(**own, pairs=size)

    def lossless(self, site: Site) -> BlockSparse:
        """The mask that the site has."""
        return BlockSparse(site.mask)

    @property
    def _tokens(self) -> int:
        return self.context or CONTEXT

    def _given(self, site: Site) -> Mask:
        if self.mask is not None:
            return self.mask
        return within(site, static_mask(site, self.window or 1, self.sink))

    def _sinks(self, site: Site) -> int:
        """A site that reads the last keys alone shows no first ones."""
        return self.sink if own_window(site) is None else 0

    def _total(self, site: Site) -> int:
        whole = cost(site, self._tokens, self._sinks(site), None) * site.k.heads
        return max(1, round((self.density or 1.0) * whole))

    def _mixed(self, site: Site, windows: tuple[int | None, ...]) -> Site:
        if all(w is None for w in windows):
            return changed(site, site.mask)
        sinks = self._sinks(site)
        return changed(site, mixture(site, [sinks if w is not None else 0 for w in windows], windows))

    def _measured(self, site: Site, weights: Weights, stats: Stats) -> tuple[Losses, Shares]:
        sinks = self._sinks(site)
        found = losses(site, weights, stats.batches(), sinks, self._tokens)
        return found, shared_out(site, found, sinks, self._tokens)

    def _refitted(self, new: Site, weights: Weights, stats: Stats | None, notes: list[str]) -> Rewritten:
        order = tuple(range(new.heads))
        if stats is None or not self.refit:
            return Rewritten(new, weights, order, tuple(notes))
        made, note = refit(weights, measured(stats.masked(new.mask), weights.out_bias is not None))
        return Rewritten(new, made, order, (*notes, *([f"{new.name}: {note}"] if note else [])))


@dataclass(frozen=True)
class Budgeted(BlockSparse):
    """A density whose sites have been told how many pairs each may keep, in parts of a head's context."""

    pairs: int = LEVELS

    def share(self, site: Site) -> int | None:
        """Settled."""
        return None

    def _total(self, site: Site) -> int:
        return self.pairs


def _told(found: Losses, chosen: tuple[int | None, ...]) -> str:
    """What the heads got, and how much of their attention they keep."""
    whole = sum(w is None for w in chosen)
    kept = 1 - sum(h[w] for h, w in zip(found.hidden, chosen, strict=True)) / len(chosen)
    words = "/".join("all" if w is None else str(w) for w in chosen)
    return f"windows {words}: {whole} of {len(chosen)} kv heads read all; {100 * kept:.1f} % of attention is kept"
