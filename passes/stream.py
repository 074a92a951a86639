"""A conversion that never holds the model: sites one by one from the files, the output shard by shard.

    files --one site--> rewrite --> journal        (resumable; spread over processes)
    files, journal --one tensor--> shards          (resumable)

What a site takes is read when its turn comes and let go of after it; everything else is copied in bounded pieces. That
the forms in which sites are written compute what they should is seen on the model cut short (rewrite/short.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from torch import Tensor, dtype
from transformers import PreTrainedModel

from passes import Target
from passes.convert import Progress, convert_alone, convert_sites
from passes.disk import Disk
from passes.emit import How
from passes.emit_large import emit_large
from passes.find import Found, find
from passes.plan import BASE_MEMORY, Plan
from passes.saved import SavedChanges
from passes.spread import open_shares
from passes.tune import Tuning
from rewrite.calibration import Batch
from rewrite.capture import capture
from rewrite.checkpoint import Checkpoint, open_checkpoint, require_checkpoint, require_floats
from rewrite.emit.large import Large, touched
from rewrite.errors import BadUsage, OutOfSpace, Refused
from rewrite.folder import Draft, free_line, partial_of
from rewrite.journal import Journal
from rewrite.machine import anonymous, this_machine
from rewrite.opened import Opened
from rewrite.program import Program
from rewrite.progress import silent
from rewrite.ranks import Ranks, here
from rewrite.shards import Source, lay_out, write_shards
from rewrite.short import aliases, fill, in_float, kinds, shortened
from rewrite.site import Factored, Latent, Output, Site
from rewrite.table import size
from rewrite.weights import type_of

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SITE = 12
"""Bytes for every number of a site's matrices, while it is rewritten or written: as measured at the width of Llama 3
8B, float64 matrices beside the ones that they were made from and the places of their numbers."""
ROOM = 4
"""This part of the limit is for weights that are kept while batches are calibrated one after the other."""
WAITING = 8
"""Bytes on disk at most for every number of a converted site, until the output is written."""
SHORT = 16
"""Bytes for every number of the model cut short, as measured at the width of Llama 3 8B: itself, its copies in another
form, and what runs hold."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """What was written into the draft."""

    large: Large
    plan: Plan
    errors: Mapping[str, float | None]
    notes: tuple[str, ...]
    hashes: Mapping[str, str]
    types: Mapping[str, dtype]
    """Tensor -> its type in the files."""


@dataclass(frozen=True, eq=False)
class Job:
    """One conversion from folder to folder: the captured model (on meta), its sites and their targets."""

    program: Program
    found: Found
    targets: Mapping[str, Target]
    plan: Plan
    how: How
    opened: Opened
    limit: int
    """Bytes of anonymous memory at most."""
    batches: Sequence[Batch] | None = None
    """The calibration; from the weights alone where there is none."""
    tuning: Tuning | None = None

    @property
    def sites(self) -> list[Site]:
        """The sites that change."""
        return [s for s in self.found.sites if s.name in self.targets]

    @property
    def model(self) -> PreTrainedModel:
        """The model, on meta."""
        if not isinstance(self.program.module, PreTrainedModel):
            raise Refused("stream", f"{type(self.program.module).__name__} is no PreTrainedModel")
        return self.program.module

    def held(self) -> Checkpoint:
        """The source's files."""
        return require_checkpoint(self.opened.folder) if self.opened.folder is not None else _no_folder()


def _no_folder() -> Checkpoint:
    raise Refused("stream", "only a folder can be converted piece by piece", "save the model first")


def stream(job: Job, work: Draft, tell: Progress, ranks: Ranks) -> Streamed | None:
    """Convert what is not converted yet, then write what is not written yet; None where another process writes."""
    held = job.held()
    changes = SavedChanges(Journal(work.journal), {s.name: s for s in job.sites})
    _convert(job, held, changes, work, tell, ranks)
    ranks.meet()
    if not ranks.first:
        return None
    planned, errors, notes = _summed(job.plan, changes)
    large, planned = emit_large(job.program, _short(job, held), changes, planned, job.how, held)
    layout = lay_out(large, job.model, held)
    hashes = write_shards(work.path, layout, Source(large, layout, held), changes.journal, tell)
    return Streamed(large, planned, errors, notes, hashes, {s.name: type_of(s.dtype) for s in layout.specs})


def _convert(job: Job, held: Checkpoint, changes: SavedChanges, work: Draft, tell: Progress, ranks: Ranks) -> None:
    if not job.batches:
        convert_alone(ranks.mine(job.sites), job.targets, in_float(held), changes, tell)
        return
    read, names = in_float(held), aliases(job.model)

    def any_name(name: str) -> Tensor:
        return read(next(n for n in (name, *names[name]) if held.entry(n) is not None))

    disk = Disk(any_name, job.limit // ROOM, work.journal, changes)
    told = tell if ranks.first else silent
    convert_sites(job.program, job.found, job.targets, job.batches, told, job.tuning, disk=disk, ranks=ranks)


def _summed(planned: Plan, changes: SavedChanges) -> tuple[Plan, dict[str, float | None], tuple[str, ...]]:
    """The plan with the shapes that sites came to, their errors and their notes, read one by one."""
    sites: dict[str, Site] = {}
    errors: dict[str, float | None] = {}
    notes: dict[str, None] = {}
    for name, change in changes.items():
        sites[name], errors[name] = change.rewritten.site, change.error
        notes |= dict.fromkeys(change.rewritten.notes)
    return planned.found(sites), errors, tuple(notes)


def _near(job: Job) -> set[str]:
    """Tensors that the model cut short must hold: those of a site of every kind, and of one of every kind that stays
    as it is, as a form for all sites is none for some."""
    stay = [s for s in job.found.sites if s.name not in job.targets]
    first = {name for some in (job.sites, stay) for name in kinds(some).values()}
    return {t for s in job.found.sites if s.name in first for t in touched(s)}


def _short(job: Job, held: Checkpoint) -> Program:
    """The model cut short, captured; its sites must be those of the full one."""
    model = shortened(job.model, _near(job))
    program = capture(model, dynamic=False)
    whole = {s.name: s.proof.region for s in job.sites}
    for site in find(program.static).sites:
        if whole.get(site.name, site.proof.region) != site.proof.region:
            raise Refused(
                "stream",
                f"{site.name} is another attention where the model has fewer layers",
                "leave --memory away, where the model fits into memory",
            )
    fill(model, held)
    return program


def limit_of(memory: str | None) -> int:
    """Bytes that "4GB" means; by default 80 % of what is free."""
    if memory is None:
        return int(0.8 * this_machine(Path.cwd()).memory)
    number = memory.upper().removesuffix("B").strip()
    scale = UNITS.get(number[-1:], 1)
    digits = number[:-1].strip() if number[-1:] in UNITS else number
    if not digits.replace(".", "", 1).isdecimal() or float(digits) <= 0:
        raise BadUsage("usage", f"'{memory}' is no amount of memory", "write it as 4GB, or 500MB")
    return int(float(digits) * scale)


def streams(folder: Path, limit: int, memory: str | None, calibration: Any) -> bool:
    """Whether a conversion from folder to folder goes piece by piece: the model does not fit, several processes share
    the work, or it was asked for."""
    return too_large(folder, limit) or here().count > 1 or (calibration is None and memory is not None)


def too_large(folder: str | Path, limit: int) -> bool:
    """Whether a conversion in memory, with the model and its copy in float32, needs more than the limit."""
    return _in_memory(folder) > limit


def _in_memory(folder: str | Path) -> int:
    held = open_checkpoint(Path(folder))
    return BASE_MEMORY + 8 * (0 if held is None else held.parameters)


def require_job(job: Job, out: Path) -> None:
    """Raise where the conversion cannot be made piece by piece, before anything is written."""
    require_forms(job)
    require_named(job)
    require_memory(job)
    require_disk(job, out)


def require_forms(job: Job) -> None:
    """Raise where what sites become is not written piece by piece yet."""
    forms = {s.name: job.targets[s.name].after(s).form for s in job.sites}
    factored, latent = ([n for n, f in forms.items() if isinstance(f, kind)] for kind in (Factored, Latent))
    if factored and latent:
        raise Refused(
            "stream",
            f"{factored[0]} gets low-rank projections and {latent[0]} a latent cache: both in one model are not yet "
            "written piece by piece",
            "leave --memory away, where the model fits into memory: reattn plan says how much it needs",
            f"or convert one kind alone: --skip {factored[0]}",
        )


def require_disk(job: Job, out: Path) -> None:
    """Raise where the output and the converted sites that wait for it do not fit; what an earlier run left counts."""
    needed = job.plan.weights.after + WAITING * sum(_numbers(s) for s in job.sites)
    there = sum(p.stat().st_size for p in partial_of(out).rglob("*") if p.is_file())
    free = this_machine(out.absolute().parent).disk
    if needed > free + there:
        raise OutOfSpace(
            "disk",
            f"the result and what waits for it need {size(needed)}, {free_line(out)}",
        )


def require_named(job: Job) -> None:
    """Raise where the files name or shape what a site needs otherwise than the model does."""
    held = job.held()
    shapes = {n: tuple(t.shape) for n, t in job.model.state_dict().items()}
    require_floats(held, [n for n, p in job.model.named_parameters() if p.is_floating_point()])
    for site in job.sites:
        for name in sorted(touched(site)):
            wanted = shapes[name]
            if held.shape(name) != wanted:
                have = f"is {list(held.shape(name) or ())}" if held.entry(name) else "is missing"
                raise Refused(
                    "no-weights",
                    f"{held.folder} does not fill the model: {name} {list(wanted)} {have}",
                    "download the checkpoint again, or save the model anew",
                )


def require_memory(job: Job) -> None:
    """Raise where the largest step needs more than the limit."""
    largest = max(job.sites, key=_numbers)
    short = shortened(job.model, _near(job))
    steps = {
        f"largest site: {largest.name}": SITE * _numbers(largest),
        "its first layers, run to prove the form": SHORT * sum(p.numel() for p in short.parameters()),
    }
    if job.batches:
        steps[f"calibration of {largest.name}"] = _calibrating(job, largest)
    step = max(steps, key=lambda name: steps[name])
    needed, free = anonymous() + steps[step], this_machine(Path.cwd()).memory
    if needed > job.limit:
        raise OutOfSpace(
            "memory",
            f"needs {size(needed)}, the limit is {size(job.limit)} ({step}: {size(steps[step])})",
            f"--memory {ceil(needed / 1e8) / 10:g}GB" if needed <= free else "a larger machine is needed",
        )


def _numbers(site: Site) -> int:
    """Numbers in the matrices of a site."""
    roots = [r for o in (site.q, site.k, site.v) for r in o.roots]
    roots += [site.out.root] if isinstance(site.out, Output) else []
    return sum(r.rows * r.columns for r in roots)


def _calibrating(job: Job, site: Site) -> int:
    """Bytes, about: a site's matrices, what one batch shows of it in float64, the weights that are held, and where
    one total is shared out what the model predicts on one batch."""
    rows, tokens = max(next(iter(b.values())).shape[:2] for b in job.batches or ())
    widths = site.q.heads * (site.q.dim + site.v.dim) + site.k.heads * (site.k.dim + site.v.dim)
    seen = 8 * (4 * rows * tokens * widths + site.heads * tokens * min(tokens, 2048) * rows)
    shared = open_shares(job.sites, job.targets)
    config: Any = job.model.config.get_text_config()
    predicted = 12 * rows * tokens * int(getattr(config, "vocab_size", 0) or 0) if shared else 0
    return job.limit // ROOM + max(SITE * _numbers(site) + seen, predicted)
