"""What fewer pairs save, in words for the plan: arithmetic, and where no time is to be had."""

from __future__ import annotations

from collections.abc import Sequence

from passes.sparse_shape import pairs
from rewrite.emit.predicate import reach, tree
from rewrite.site import Site, Sparse

TILE = 128
"""Keys that a GPU kernel takes at once."""
DENSE = 0.6
"""The least part of the speed of the best dense kernels that generated ones are known to reach."""


def work(before: Sequence[Site], after: Sequence[Site], context: int) -> tuple[str, ...]:
    """Lines about the sites that read fewer pairs; none where there are no such sites."""
    both = [(old, new) for old, new in zip(before, after, strict=True) if isinstance(new.form, Sparse)]
    if not both:
        return ()
    old = sum(_operations(site, _pairs(site, context)) for site, _ in both)
    new = sum(_operations(site, _left(site, made, context)) for site, made in both)
    share = new / max(old, 1.0)
    what = f"attention reads {share:.3g} of its pairs at {context:,} tokens: {_flops(old)} → {_flops(new)} a text"
    some = ("which heads' caches drop tokens is known after calibration",) if any(_open(s) for _, s in both) else ()
    return (what, *some, *_slow([made for _, made in both], share))


def _slow(sites: Sequence[Site], share: float) -> list[str]:
    """Where sparse attention is no faster than dense."""
    lines: list[str] = []
    if share > DENSE:
        lines.append(f"no faster on a GPU: with more than {DENSE:g} of the pairs left a dense kernel is as fast")
    found = [reach(tree(s.mask, i)) for s in sites if not _open(s) for i in s.mask.heads(s.heads)]
    known = [x for x in found if x is not None]
    if known:
        longest = max(x.sink + x.window for x in known)
        lines.append(
            f"nothing is left out of texts up to {longest:,} tokens, and time is saved in much longer ones alone"
        )
    if any(x.window < TILE for x in known):
        lines.append(f"a GPU takes {TILE} keys at a time: windows below that cost as much as one of {TILE}")
    return lines


def _open(site: Site) -> bool:
    """Calibration is still to find the mask."""
    return isinstance(site.form, Sparse) and site.form.density is not None


def _pairs(site: Site, context: int) -> float:
    return pairs(site.mask, context, site.heads)


def _left(site: Site, made: Site, context: int) -> float:
    form = made.form
    share = form.density if isinstance(form, Sparse) else None
    return _pairs(made, context) if share is None else share * _pairs(site, context)


def _operations(site: Site, count: float) -> float:
    return 2.0 * count * site.heads * (site.q.dim + site.v.dim)


def _flops(count: float) -> str:
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"
