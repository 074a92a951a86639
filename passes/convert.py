"""Convert: one site after the other, in the order in which the model runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from passes import Stats, Target
from passes.calibrate import Batch, Stream, statistics
from passes.disk import Disk
from passes.find import Found
from passes.refit import output_error
from passes.region import Machine, Slice, slice_of, twins
from passes.spread import open_shares, spread_targets
from passes.trial import inner
from passes.tune import Tuning, tune
from rewrite.heads import Change, Rewritten
from rewrite.layout import expanded, gather
from rewrite.program import Program
from rewrite.ranks import ALONE, Ranks
from rewrite.site import Site, Sparse, Tensors
from rewrite.threads import one_thread

Progress = Callable[[str, int, int], None]
"""Told the site's name, how many are done and how many there are."""


@dataclass
class _Counted:
    """Tells one step of `total` after the other."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, name: str) -> None:
        self.progress(name, self.done, self.total)
        self.done += 1


def named_tensors(module: nn.Module) -> Tensors:
    """The module's parameters and buffers by state-dict name, tied ones under each of their names."""
    table: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    table |= dict(module.named_buffers(remove_duplicate=False))
    return table.__getitem__


def convert_sites(
    program: Program,
    found: Found,
    targets: Mapping[str, Target],
    batches: Sequence[Batch] | None,
    progress: Progress,
    tuning: Tuning | None = None,
    measure: bool = True,
    disk: Disk | None = None,
    ranks: Ranks = ALONE,
) -> Mapping[str, Change]:
    """Rewrite every site that `targets` names. Without batches from the weights alone; with them layer after layer,
    each on the activations that the sites converted before it leave behind. `tuning` needs batches. With a `disk` the
    program's parameters may lie on meta, and sites that were converted before are taken from there; several
    `ranks` need one, as what the first of them makes of a site is what all go on with."""
    tensors: Tensors = named_tensors(program.module) if disk is None else disk.read
    picked = [(s, r) for s, r in zip(found.sites, found.regions, strict=True) if s.name in targets]
    changes: MutableMapping[str, Change] = {} if disk is None else disk.changes
    if not batches:
        convert_alone([site for site, _ in picked], targets, tensors, changes, progress)
        return changes
    (finished,) = ranks.share([None], lambda _: [site.name in changes for site, _ in picked])
    if all(finished):
        return changes
    running = program.dynamic or program.static
    machine = Machine(running, program.module, disk)
    twin = twins(program.static.graph, running.graph)
    slices = sorted((slice_of(machine, s, r, twin) for s, r in picked), key=lambda p: machine.place[p.out])
    sites = [part.site for part in slices]
    total = len(slices) + len(open_shares(sites, targets))
    tell = _Counted(progress, total)
    targets = spread_targets(machine, slices, targets, batches, tensors, tell, disk, ranks)
    done = {site.name for (site, _), known in zip(picked, finished, strict=True) if known}
    stream = Stream(machine, batches, slices, tensors, disk, ranks)
    for part in slices:
        name = part.site.name
        stream.reach(part)
        if name not in done:
            tell(name)
            change = _convert_on(stream, part, targets[name], tensors, tuning, measure)
            if ranks.first:
                changes[name] = change
            ranks.meet()
        made = changes[name].rewritten
        stream.leave(part, expanded(part.site, made.weights, made.site.kv_of, tensors), inner(made))
    return changes if disk is not None else {s.name: changes[s.name] for s, _ in picked}


def convert_alone(
    sites: Sequence[Site],
    targets: Mapping[str, Target],
    tensors: Tensors,
    changes: MutableMapping[str, Change],
    progress: Progress,
) -> None:
    """Rewrite sites from their weights alone, one after the other, and put what is made into `changes`; a site that
    is there already is not made again."""
    for done, site in enumerate(sites):
        if site.name not in changes:
            progress(site.name, done, len(sites))
            # alone means that another number of threads, or a run shared by processes, gives the same bytes
            with one_thread():
                made = _rewrite(site, targets[site.name], tensors, None)
            changes[site.name] = Change(site, made, None)


def _rewrite(site: Site, target: Target, tensors: Tensors, stats: Stats | None) -> Rewritten:
    return target.rewrite(site, gather(site, tensors), stats)


def _convert_on(
    stream: Stream, part: Slice, target: Target, tensors: Tensors, tuning: Tuning | None, measure: bool
) -> Change:
    stats = statistics(stream, part, target.needs, tensors)
    rewritten = _rewrite(part.site, target, tensors, stats)
    if tuning is not None and rewritten.site is not part.site:
        rewritten = tune(rewritten, part.site, gather(part.site, tensors), stats, tuning)
    latents, kv_of, sparse = rewritten.latents, rewritten.site.kv_of, isinstance(rewritten.site.form, Sparse)
    error = None
    if measure:
        attend = stats.masked(rewritten.site.mask) if sparse else stats.attend(rewritten.weights, kv_of)
        trials = attend if latents is None else stats.latent(latents)
        error = output_error(trials, rewritten.weights)
    return Change(part.site, rewritten, error)
