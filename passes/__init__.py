"""The changes. `TARGETS` is the table of contents; `PIPELINE` is the order in which passes run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from rewrite.heads import Heads, Latents, Rewritten, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from passes.moments import SiteBatch
    from rewrite.mask import Mask
    from rewrite.site import Site

__all__ = ["PIPELINE", "Curve", "Heads", "Latents", "Rewritten", "Spreading", "Stats", "Target", "Weights"]

PIPELINE = ("capture", "canonicalise", "find", "plan", "calibrate", "convert", "lower", "emit", "check")


T = TypeVar("T")


class Stats(Protocol):
    """What calibration offers a target about one site; moments are streamed sums in float64, position by position."""

    @property
    def tokens(self) -> int:
        """How many tokens were seen."""
        ...

    @property
    def moments(self) -> Mapping[str, Tensor]:
        """The statistics that the target declares in `needs` (passes/moments.py names them)."""
        ...

    def attend(self, weights: Weights, kv_of: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch, on the converted model's own activations: the heads' outputs z (tokens, heads, dim) of the
        attention with `weights`, and the original attention's output y (tokens, outputs) on the same input."""
        ...

    def latent(self, latents: Latents) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for a site that caches a latent."""
        ...

    def masked(self, mask: Mask) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for a site that reads fewer keys with its original weights."""
        ...

    def batches(self) -> Iterator[SiteBatch]:
        """What the site's original weights see on the same activations, batch by batch."""
        ...

    def share(self, items: Sequence[T], work: Callable[[T], Sequence[Any]]) -> Iterator[Sequence[Any]]:
        """What `work` makes of every item, tensors and numbers, in order: shared out where several processes run, so
        that `work` may ask for nothing but what `alone` gives."""
        ...

    @property
    def alone(self) -> Stats:
        """The same, shared out with nobody: for what one process does while others do something else."""
        ...


class Target(Protocol):
    """What the user asks for, and the pass that does it: a frozen dataclass."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def for_site(self, index: int, total: int) -> Target:
        """The target of the `index`-th of `total` sites, where settings were given per layer."""
        ...

    def refuse(self, site: Site) -> str | None:
        """Why this site must stay as it is, with numbers and what would work, or None."""
        ...

    def after(self, site: Site) -> Site:
        """The site's new shape, from shapes alone: `plan` needs no weights."""
        ...

    def rewrite(self, site: Site, weights: Weights, stats: Stats | None) -> Rewritten:
        """The mathematics, one site at a time; `stats` None means weights only."""
        ...

    def lossless(self, site: Site) -> Target:
        """The setting at which nothing is lost."""
        ...


@dataclass(frozen=True, eq=False)
class Curve:
    """What one site loses by its size, and one conversion by which sites can be compared."""

    errors: Mapping[int, float]
    """Size -> squared error of the attention's output relative to the output's energy."""
    size: int
    example: Rewritten
    """The site at that size."""


@runtime_checkable
class Spreading(Target, Protocol):
    """A target that can leave each site's size open, so that one total is spread over the sites by measured error."""

    def share(self, site: Site) -> int | None:
        """What the site adds to the total (numbers per token, pairs), None where its size is settled."""
        ...

    def alike(self) -> str:
        """Why all sites have one size though a total was given; "" where nothing holds them to it."""
        ...

    def told(self, total: int) -> str:
        """The total of all sites in words."""
        ...

    def curve(self, site: Site, weights: Weights, stats: Stats) -> Curve:
        """What the site loses at a few sizes around its share."""
        ...

    def sized(self, site: Site, size: int) -> Target:
        """The target at one size."""
        ...
