"""How many numbers a latent has, from a site's shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from passes.gqa_source import shift_invariant
from passes.mla_source import plain_dims
from rewrite.modules import caches_raw, raw_keys
from rewrite.shared import shared
from rewrite.site import Operand, Output, Sink, Site

TURNING_PART = 3
"""One of so many cached numbers turns where nothing else says how many."""


SIZES = (1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3, 4)
"""Parts of an even share at which a site is measured before a total is spread."""


@dataclass(frozen=True)
class Shape:
    """Numbers cached per token: as they are, and turned."""

    rank: int
    rope_dim: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.rank + self.rope_dim


def features(site: Site) -> int:
    """Keys and values of a token in the source, or the numbers that they share."""
    few = shared(site)
    if few is not None:
        return few.width
    return site.k.heads * site.k.dim + site.v.heads * site.v.dim


def turning(site: Site) -> int:
    """How many of them the rope turns."""
    if shared(site) is not None and site.k.rope is not None:
        return site.k.rope.width
    return 0 if site.k.rope is None else site.k.heads * site.k.rope.width


def linear(operand: Operand) -> bool:
    """What the projection gives is used as it is, but for a factor."""
    return operand.norm is None and operand.shift is None


def constants_are_free(site: Site) -> bool:
    """A constant in keys that do not turn changes no probability; one in the values moves into the output's bias."""
    biased = isinstance(site.out, Output) and site.out.root.bias is not None
    return shift_invariant(site) and biased and not any(isinstance(m, Sink) for m in site.mods)


def inputs(site: Site, rebuilt: bool) -> int | None:
    """How many numbers of a token keys and values come from, None where they are no linear function of them. Where
    they share fewer numbers, what does not turn is all the rest."""
    if shared(site) is not None:
        return None
    still, raw = rebuilt or bool(len(plain_dims(site))), rebuilt and caches_raw(site)
    operands = [*((raw_keys(site.k) if raw else site.k,) if still else ()), site.v]
    if not all(linear(o) for o in operands):
        return None
    sources = {o.roots[0].source: o.roots[0].columns for o in operands}
    biased = any(o.roots[0].bias is not None for o in operands)
    kept = biased and (not constants_are_free(site) or (rebuilt and (raw or site.k.rope is not None)))
    return sum(sources.values()) + kept


def lossless(site: Site, rebuilt: bool) -> Shape:
    """The least shape at which nothing can be lost, whatever the weights."""
    turned = 0 if rebuilt else turning(site)
    rest, given = features(site) - turned, inputs(site, rebuilt)
    return Shape(rest if given is None else min(rest, given), turned)


def split(site: Site, total: int, rebuilt: bool) -> Shape:
    """The shape of a budget where nothing was measured: all of it a latent, or a part of it turned."""
    full = lossless(site, rebuilt)
    if total >= full.total:
        return full
    turned = min(full.rope_dim, total // TURNING_PART // 2 * 2)
    return Shape(total - turned, turned)


def even_split(site: Site, total: int) -> Shape:
    """The shape of a budget with one turned channel of each of evenly spaced frequencies."""
    pairs = 0 if site.k.rope is None else len(site.k.rope.pairs)
    counts = [n for n in range(1, pairs + 1) if pairs % n == 0 and 2 * n <= max(2, total // TURNING_PART)]
    turned = 2 * max(counts, default=0)
    return Shape(min(total - turned, lossless(site, False).rank), turned)


def budget(site: Site, cache: float) -> int:
    """Numbers per token that a share of the source's cache is."""
    return int(cache * features(site) + 1e-9)


def sizes(share: int, full: int) -> list[int]:
    """Sizes around an even share, none larger than `full`, at which nothing is lost."""
    return sorted({min(full, max(2, round(share * part))) for part in SIZES})
