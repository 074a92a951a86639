"""Calibration as one streamed pass: batches walk through the graph from site to site, each converted on the way.

Values at a site are those that the converted model has there, so a later site can make up for an earlier one. What
is held between two sites is what crosses the cut (the residual stream, tables, masks), never a whole forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from passes import Weights
from passes.disk import Disk, Reading
from passes.masked import masked_outputs
from passes.mla_basis import back, basis
from passes.moments import NEEDS, SiteBatch
from passes.region import Env, Machine, Slice, entered, entering, run_slice
from passes.seen import site_batch
from passes.trial import heads_outputs
from rewrite.errors import BadUsage
from rewrite.heads import Latents
from rewrite.layout import expanded, gather
from rewrite.mask import Mask
from rewrite.ranks import ALONE, Ranks, Values
from rewrite.shared import shared
from rewrite.site import Site, Tensors

Batch = Mapping[str, Tensor]
T = TypeVar("T")
KEPT_NUMBERS = 1 << 27
"""Outputs of one site (tokens x width) that are held for its trials: half a gigabyte in float32."""


class Stream:
    """Calibration batches on their way through the graph; `slices` in the order in which they will be asked for.

    Of several processes each runs its own batches; of the others it holds what the slice that was reached reads."""

    def __init__(
        self,
        machine: Machine,
        batches: Sequence[Batch],
        slices: Sequence[Slice],
        tensors: Tensors,
        disk: Disk | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.machine = machine
        self.disk = disk
        self.ranks = ranks
        self.owner = [at % ranks.count for at in range(len(batches))]
        self.changed: list[Node] = []
        self.tensors = tensors
        self.at = 0
        self.envs = [_first(machine, batch) for batch in batches]
        self.keep = [_kept(batch) for batch in batches]
        self.pins = Counter(n for s in slices for n in s.boundary)
        place = machine.place
        self.last = {n: max((place[u] for u in n.users), default=-1) for n in machine.nodes}
        self.backs: dict[str, Tensor | None] = {}

    def seen(self, part: Slice, at: int) -> SiteBatch:
        """What a site's original weights see on batch `at`."""
        site = part.site
        if site.name not in self.backs:
            # of a site whose heads share numbers the way back to them costs an inverse, the same for every batch
            self.backs[site.name] = None if shared(site) is None else back(basis(site, gather(site, self.tensors)))
        return site_batch(self.machine, part, self.envs[at], self.keep[at], self.tensors, self.backs[site.name])

    def reach(self, part: Slice) -> None:
        """Run every batch until all that the slice reads is known, to every process."""
        self.run_to(part)
        for env, owner in zip(self.envs, self.owner, strict=True):
            env.update(zip(part.boundary, self.ranks.sent(owner, self._known(env, owner, part)), strict=True))
            self._spill(env)

    def _known(self, env: Env, owner: int, part: Slice) -> Values:
        return [env[node] for node in part.boundary] if owner == self.ranks.rank else ()

    @property
    def own(self) -> list[int]:
        """Places of the batches that this process runs."""
        return [at for at, owner in enumerate(self.owner) if owner == self.ranks.rank]

    def run_to(self, part: Slice) -> None:
        """As `reach`, but what the slice reads is known where its batch is run."""
        stop = max((self.machine.place[n] for n in part.boundary), default=-1) + 1
        for at in self.own:
            self._run(self.envs[at], self.at, stop)
        self.at = max(self.at, stop)
        if isinstance(self.machine.state, Reading):
            for node in [n for n in self.changed if self.last[n] < self.at]:
                self.machine.state.forget(node)

    def leave(self, part: Slice, new: Mapping[str, Tensor], inner: Callable[[SiteBatch], Tensor] | None = None) -> None:
        """Make `new` the slice's tensors from here on; what was already computed with the old ones is redone.

        `inner` computes the heads' outputs (tokens, heads, dim) where the slice's own nodes cannot with any tensors.
        """
        given: dict[int, Env] = {at: {} if inner is None else self._entry(part, at, inner) for at in self.own}
        for name, value in new.items():
            for place in self.machine.of_tensor.get(name, ()):
                self.machine.state[place] = value.to(self.machine.state[place].dtype)
                self.changed.append(place)
        self.pins -= Counter(part.boundary)
        done = [n for n in part.nodes if self.machine.place[n] < self.at]
        for at, env in enumerate(self.envs):
            if at not in given:
                env.clear()
                continue
            known = given[at]
            local = run_slice(self.machine, part, env, {}, done[-1], known) if done else {}
            env.update({n: local[n] for n in done if n in env})
            env.update(known)
            for node in [n for n in env if self._dead(n, self.at)]:
                del env[node]
            self._spill(env)

    def _spill(self, env: Env) -> None:
        """What waits goes to disk, where there is one for it."""
        if self.disk is not None:
            env.update({node: self.disk.spilled(value) for node, value in env.items()})

    def fork(self, batches: slice) -> Stream:
        """A stream that goes on from here with some of the batches; what it does leaves this one as it is."""
        made = copy(self)
        made.machine = copy(self.machine)
        made.machine.state = self.machine.state.copy()
        made.changed = list(self.changed)
        made.envs = [dict(env) for env in self.envs[batches]]
        made.keep, made.owner = self.keep[batches], self.owner[batches]
        made.pins = Counter(self.pins)
        return made

    def _entry(self, part: Slice, batch: int, inner: Callable[[SiteBatch], Tensor]) -> Env:
        """What the output projection reads, by `inner`, in the layout that the graph has it in."""
        local = run_slice(self.machine, part, self.envs[batch], {}, part.entry)
        return {part.entry: entered(part, local[part.entry], inner(self.seen(part, batch)))}

    def _dead(self, node: Node, at: int) -> bool:
        return self.last[node] < at and not self.pins[node]

    def _run(self, env: Env, start: int, stop: int) -> None:
        machine = self.machine

        def look(node: Node) -> object:
            return env[node] if node in env else machine.state[node]

        with torch.no_grad():
            for i in range(start, stop):
                node = machine.nodes[i]
                if machine.runs(node) and node not in env:
                    env[node] = machine.step(node, look)
                for read in node.all_input_nodes:
                    if read in env and self._dead(read, i + 1):
                        del env[read]
        self._spill(env)


def _first(machine: Machine, batch: Batch) -> Env:
    """The graph's inputs by name; one that the batch lacks must be read by nobody."""
    env: Env = {}
    for node in machine.inputs:
        if node.name in batch:
            env[node] = batch[node.name]
        elif any(machine.runs(u) for u in node.users):
            raise BadUsage(
                "calibration",
                f"the calibration gives no '{node.name}', which the model reads",
                f"given: {', '.join(sorted(batch)) or 'nothing'}",
                f"give dictionaries with '{node.name}' as calibration",
            )
    return env


def _kept(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


@dataclass(frozen=True, eq=False)
class SiteStats:
    """`Stats` of one site: its moments, and trial runs of the site on the stream's own activations."""

    stream: Stream
    part: Slice
    tensors: Callable[[str], Tensor]
    tokens: int
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)

    def share(self, items: Sequence[T], work: Callable[[T], Values]) -> Iterator[Values]:
        """What `work` makes of every item, in order, shared out over the processes."""
        return self.stream.ranks.share(items, work)

    @property
    def alone(self) -> SiteStats:
        """The same without the other processes."""
        stream = copy(self.stream)
        stream.ranks = ALONE
        return replace(self, stream=stream)

    def attend(self, weights: Weights, kv_of: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch: heads' outputs (tokens, heads, dim) with `weights`, original output (tokens, outputs)."""
        new = expanded(self.part.site, weights, kv_of, self.tensors)
        return self._trials(lambda at: self._enter(self.stream.envs[at], new))

    def latent(self, latents: Latents) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch, as `attend`, with a latent in place of keys and values."""
        return self._trials(lambda at: heads_outputs(latents, self.stream.seen(self.part, at)))

    def masked(self, mask: Mask) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch, as `attend`, with the original's weights and fewer keys."""
        return self._trials(lambda at: masked_outputs(mask, self.stream.seen(self.part, at)))

    def _trials(self, heads: Callable[[int], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        def rows(at: int) -> Values:
            keep = self.stream.keep[at]
            return _counted(heads(at), keep), _counted(self._original(at), keep)

        return ((z, y) for z, y in self.share(range(len(self.stream.envs)), rows))

    def batches(self) -> Iterator[SiteBatch]:
        """What the original weights see, batch by batch."""
        for at in range(len(self.stream.envs)):
            yield self.stream.seen(self.part, at)

    def _original(self, at: int) -> Tensor:
        """Trials come by the dozen, so what the original gives is kept where it is small."""
        if at not in self.kept:
            y = _out_map(self.part.site, self.tensors)(self._enter(self.stream.envs[at], {}))
            if y.numel() * len(self.stream.envs) > KEPT_NUMBERS:
                return y
            self.kept[at] = y.float()
        # rounded from the first time on, for another number of processes asks for other batches first
        return self.kept[at].double()

    def _enter(self, env: Env, new: Mapping[str, Tensor]) -> Tensor:
        local = run_slice(self.stream.machine, self.part, env, new, self.part.entry)
        return entering(self.part, local).double()


def _counted(rows: Tensor, keep: Tensor | None) -> Tensor:
    return rows[keep.reshape(-1)] if keep is not None and keep.numel() == len(rows) else rows


def _out_map(site: Site, tensors: Callable[[str], Tensor]) -> Callable[[Tensor], Tensor]:
    weights = gather(site, tensors)

    def apply(z: Tensor) -> Tensor:
        y = torch.einsum("nhd,ohd->no", z, weights.out)
        return y if weights.out_bias is None else y + weights.out_bias

    return apply


def statistics(stream: Stream, part: Slice, needs: frozenset[str], tensors: Callable[[str], Tensor]) -> SiteStats:
    """Collect what a target declares in `needs` at one site; the stream must have reached it."""
    names, tokens = sorted(needs), 0
    sums: dict[str, Tensor] = {}

    def terms(at: int) -> Values:
        batch, keep = stream.seen(part, at), stream.keep[at]
        counted = batch.q.shape[0] * batch.q.shape[2] if keep is None else int(keep.sum())
        return counted, *(NEEDS[name](batch) for name in names)

    for counted, *found in stream.ranks.share(range(len(stream.envs)), terms):
        tokens += counted
        sums = {n: sums[n] + x if n in sums else x for n, x in zip(names, found, strict=True)}
    return SiteStats(stream, part, tensors, tokens, sums)
