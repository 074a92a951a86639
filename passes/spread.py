"""Who gets how much of one total: sites measured one by one in the model as it is, before any of them changes.

Within a site errors of the attention's output compare; between sites they do not, as later layers pass on more of one
and less of another. So each site is converted alone at one size, the model is run to its end, and what its predictions
lose there (Kullback-Leibler divergence) gives the weight of the site's errors at all sizes. Moments come from tokens
other than those that judge: what a latent loses on tokens that made it says little about new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from passes import Curve, Spreading, Stats, Target
from passes.calibrate import Batch, Stream, statistics
from passes.disk import Disk
from passes.knapsack import between, spread
from passes.region import Machine, Slice
from passes.trial import inner
from rewrite.layout import expanded, gather
from rewrite.ranks import ALONE, Ranks, Values
from rewrite.site import Site, Tensors

STEPS = 16
"""Sizes are this part of the least share apart."""


def open_shares(sites: Sequence[Site], targets: Mapping[str, Target]) -> dict[str, int]:
    """Site -> what it gets if all get the same, of the sites that leave their size open; none where it is one."""
    shares: dict[str, int] = {}
    for site in sites:
        target = targets.get(site.name)
        share = target.share(site) if isinstance(target, Spreading) and target.refuse(site) is None else None
        if share is not None:
            shares[site.name] = share
    return shares if len(shares) > 1 else {}


def settled(sites: Sequence[Site], targets: Mapping[str, Target], sizes: Mapping[str, int]) -> dict[str, Target]:
    """The targets at these sizes; others as they are."""
    made = dict(targets)
    for site in sites:
        target = targets.get(site.name)
        if site.name in sizes and isinstance(target, Spreading):
            made[site.name] = target.sized(site, sizes[site.name])
    return made


def words(sites: Sequence[Site], targets: Mapping[str, Target], *, alike: bool = False) -> str:
    """How a total comes to the sites, in a sentence for the plan; `alike`: the format has one size for all."""
    shares = open_shares(sites, targets)
    fit = [t for s in sites if (t := targets.get(s.name)) is not None and t.refuse(s) is None]
    reasons = {t.alike() for t in fit if isinstance(t, Spreading)} - {""}
    if shares and alike:
        reasons = {"a stock class has one rank for all layers"}
    if reasons:
        return f"the same for every site: {min(reasons)}; ranks by layer lose less and need the model's own form"
    if not shares:
        return ""
    open_ = next(t for n, t in targets.items() if n in shares and isinstance(t, Spreading))
    total = open_.told(sum(shares.values()))
    return (
        f"{total}, spread over {len(shares)} sites by what each loses on calibration text; without it all get the same"
    )


def spread_targets(
    machine: Machine,
    slices: Sequence[Slice],
    targets: Mapping[str, Target],
    batches: Sequence[Batch],
    tensors: Tensors,
    tell: Callable[[str], None],
    disk: Disk | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Target]:
    """The targets at the sizes that together lose least and are no more than their shares are."""
    shares = open_shares([part.site for part in slices], targets)
    end = _end(machine, slices)
    if not shares or end is None:
        return dict(targets)
    errors: dict[str, dict[int, float]] = {}
    probe = _Probe(Stream(machine, batches, [*slices, end], tensors, disk, ranks), end, tensors)
    for part in slices:
        target = targets[part.site.name]
        if part.site.name in shares and isinstance(target, Spreading):
            tell(part.site.name)
            errors[part.site.name] = probe.errors(part, target)
        probe.stream.leave(part, {})
    step = max(1, min(shares.values()) // STEPS)
    sizes = spread({name: between(e, step) for name, e in errors.items()}, sum(shares.values()))
    return settled([part.site for part in slices], targets, sizes)


class _Probe:
    """The original model on the calibration, and what its first batch loses where one site is another."""

    def __init__(self, stream: Stream, end: Slice, tensors: Tensors) -> None:
        self.stream, self.end, self.tensors = stream, end, tensors
        # gigabytes of a large vocabulary, which only the process that runs the first batch needs
        self.predicted = self._predicted(stream.fork(slice(1))) if stream.ranks.first else None

    def errors(self, part: Slice, target: Spreading) -> dict[int, float]:
        """Size -> what the model's predictions lose, in nats per token and to first order."""
        self.stream.reach(part)
        curve = target.curve(part.site, gather(part.site, self.tensors), self._stats(part, target.needs))
        known = curve.errors[curve.size]
        weight = self._lost(part, curve) / known if known > 0 else 0.0
        return {size: weight * error for size, error in curve.errors.items()}

    def _stats(self, part: Slice, needs: frozenset[str]) -> Stats:
        """Trials on the first batch, moments of the others; where there are no others of the first too."""
        others = slice(1, None) if len(self.stream.envs) > 1 else slice(None)
        fitting = statistics(self.stream.fork(others), part, needs, self.tensors)
        judging = statistics(self.stream.fork(slice(1)), part, frozenset(), self.tensors)
        share = judging.tokens / max(fitting.tokens, 1)
        return replace(judging, moments={name: share * value for name, value in fitting.moments.items()})

    def _lost(self, part: Slice, curve: Curve) -> float:
        (found,) = self.stream.ranks.share([curve], lambda c: self._measured(part, c))
        return found[0]

    def _measured(self, part: Slice, curve: Curve) -> Values:
        fork, made = self.stream.fork(slice(1)), curve.example
        edits = expanded(part.site, made.weights, made.site.kv_of, self.tensors)
        fork.leave(part, edits, inner(made))
        before, after = self.predicted, self._predicted(fork)
        lost = 0.0 if before is None else float((before.exp() * (before - after)).sum(-1).double().mean())
        return (max(lost, 0.0),)

    def _predicted(self, stream: Stream) -> Tensor:
        """(tokens, vocabulary) log probabilities of the stream's one batch."""
        stream.run_to(self.end)
        scores, keep = stream.envs[0][self.end.out].float().log_softmax(-1), stream.keep[0]
        rows = scores.flatten(0, -2)
        return rows[keep.reshape(-1)] if keep is not None and keep.numel() == len(rows) else rows


def _end(machine: Machine, slices: Sequence[Slice]) -> Slice | None:
    """The model's first output of floating numbers by token, as a place where a stream stops."""
    out = next(n for n in machine.nodes if n.op == "output")
    values = [(n, n.meta.get("val")) for n in out.all_input_nodes]
    found = [n for n, v in values if isinstance(v, Tensor) and v.dim() > 2 and v.is_floating_point()]
    return Slice(slices[0].site, (), (found[0],), {}, found[0], found[0]) if found and slices else None
