"""The user's door: plan, convert, check. `convert` reads like the pipeline that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from passes import Target
from passes.asked import Asked, Inputs
from passes.convert import convert_sites
from passes.emit import How, forecast, require
from passes.emit import emit as emit_forms
from passes.find import Found, find
from passes.gqa import GQA
from passes.mla import MLA
from passes.plan import Plan, require_space
from passes.sparse import BlockSparse
from passes.stream import Job, limit_of, require_job, stream, streams, too_large
from passes.tune import Tuning
from rewrite.calibration import Batch, Windows, batches
from rewrite.capture import capture
from rewrite.compare import check as compare
from rewrite.errors import BadUsage
from rewrite.folder import draft, joined, refuse_output
from rewrite.heads import Change
from rewrite.opened import Opened, open_folder, open_model
from rewrite.program import Program
from rewrite.progress import Tell, silent
from rewrite.ranks import here, together
from rewrite.report import Checked, Report
from rewrite.save import finish, refuse_saving, save, save_config
from rewrite.spell import spell

TARGETS: tuple[type[Any], ...] = (GQA, MLA, BlockSparse)
"""Every target that can be asked for, by the command line too."""


def plan(
    model: nn.Module | str | Path,
    target: Target | Sequence[Target] = (),
    *,
    inputs: Inputs = None,
    only: str = "*",
    skip: Sequence[str] = (),
    context: int = 32_768,
) -> Plan:
    """Every attention of a model, and what `target` would make of it. Of a folder the config alone is needed.

    `inputs` (a tuple of positional, a dict of keyword arguments) are asked for only by a module without a config.
    `only` and `skip` are globs on site names; `context` is the tokens for which the cache is stated.
    """
    program = capture(model, inputs, dynamic=False)
    asked = Asked(target=_one(target), inputs=inputs, only=only, skip=tuple(skip))
    found = find(program.static)
    planned = asked.plan(model, program, found, context)
    return planned.emitted(forecast(program.module, asked.pairs(program, found)), {})


def convert(
    model: nn.Module | str | Path,
    target: Target | Sequence[Target],
    *,
    calibration: Any = None,
    text: Any = None,
    samples: int = 128,
    length: int | None = None,
    inputs: Inputs = None,
    only: str = "*",
    skip: Sequence[str] = (),
    out: str | Path | None = None,
    max_loss: float | None = None,
    check: bool = True,
    tune: int = 0,
    emit: How = "auto",
    memory: str | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: Tell | None = None,
) -> Any:
    """A new model with the attention rewritten, and `.rewrite_report` on it; `model` is not touched.

    `calibration`: texts, a file's Path, token tensors or dictionaries of inputs; without it the weights alone decide.
    At most `samples` windows of `length` tokens (the model's context, 2048 at most) are used. `text` is what the loss
    is measured on; without it the outputs on example inputs are compared. `out` is a new folder, whole or absent.
    `tune` steps of Adam follow at every site, on its own output (0: none). `emit` chooses how a latent is written: as a
    class of the library that engines load ("stock"), in the model's own class ("own"), or whichever fits ("auto").
    `memory` ("4GB") is the most that a conversion from folder to folder may hold, 80 % of what is free where it is not
    given. Where the model does not fit it goes site by site and shard by shard, and gives a `Written`; so it does from
    weights alone where `memory` is given. What an earlier such run has finished is taken up, unless `resume` is False.
    Under torchrun sites are shared out, or with calibration its batches, and all processes but the first get None.
    Raises where no site can be converted; a failed check is told by the report, and names the folder `out.failed`.
    """
    wanted = _one(target)
    if wanted is None:
        raise BadUsage("usage", "no target was given", "name one: GQA(kv_heads)")
    if tune and calibration is None:
        raise BadUsage("usage", f"tuning takes {tune} steps on the calibration, and none was given", "give calibration")
    source = Path(model) if isinstance(model, (str, Path)) else None
    if out is not None and here().first:
        refuse_output(Path(out), source)
    tell, limit = progress or silent, limit_of(memory)
    streamed = out is not None and source is not None and streams(source, limit, memory, calibration)
    opened = open_folder(source) if streamed and source is not None else open_model(model)
    if out is not None:
        refuse_saving(opened.working)
    windows = Windows(length or opened.context, samples)
    wanted = _at_length(wanted, windows.length) or wanted
    tuning = Tuning(tune, seed) if tune else None
    folder = None if out is None else Path(out)
    asked = Asked(wanted, inputs, only, tuple(skip), opened, calibration, windows, folder, tuning, emit)
    if streamed and folder is not None:
        checking = _Checking(check, text, inputs, max_loss, seed)
        return _stream(asked, opened, folder, limit, tell, checking, resume=resume)
    done = _run(asked, opened.working, tell)
    made: Any = opened.as_given(done.model)
    checked = _check(opened, made, text, inputs, max_loss, seed, tell, _lossless(asked, done)) if check else None
    used = None if done.used is None else opened.calibration(asked.calibration, done.used)
    errors = {n: c.error for n, c in done.changes.items()}
    notes = [note for c in done.changes.values() for note in c.rewritten.notes]
    made.rewrite_report = asked.report(done.plan, used, errors, notes, checked, seed)
    if out is not None:
        _, made.rewrite_report = save(made, opened, made.rewrite_report, Path(out))
    return made


@dataclass(frozen=True)
class Written:
    """A converted model on disk, which was never held: its folder, and the report that lies in it."""

    folder: Path
    rewrite_report: Report


@dataclass(frozen=True)
class _Checking:
    """How the result is measured, where it is."""

    wanted: bool
    text: Any
    inputs: Inputs
    max_loss: float | None
    seed: int


def _stream(
    asked: Asked, opened: Opened, out: Path, limit: int, tell: Tell, checking: _Checking, *, resume: bool
) -> Written | None:
    """The pipeline from folder to folder: nothing that is as large as the model is held."""
    program = capture(opened.working, asked.inputs, dynamic=asked.calibration is not None)
    found = find(program.static)
    planned = asked.plan(opened.working, program, found)
    require(planned)
    data = asked.batches(program)
    used = None if data is None else opened.calibration(asked.calibration, data)
    targets = asked.targets(program, found)
    job = Job(program, found, targets, planned, asked.how, opened, limit, data, asked.tuning)
    require_job(job, out)
    with together() as ranks:
        key = asked.key(checking.seed, used)
        with draft(out, opened.folder, key=key, restart=not resume) if ranks.first else joined(out) as work:
            ranks.meet()
            made = stream(job, work, tell, ranks)
            if made is None:
                return None
            save_config(made.large.model, made.types, work)
            checked, notes = _check_written(opened, work.path, checking, limit, tell)
            report = asked.report(made.plan, used, made.errors, [*made.notes, *notes], checked, checking.seed)
            return Written(*finish(work, opened, report, made.hashes))


def _check_written(
    opened: Opened, made: Path, checking: _Checking, limit: int, tell: Tell
) -> tuple[Checked | None, list[str]]:
    """What the files say when they are loaded, where both models fit; and why they were not."""
    if not checking.wanted:
        return None, []
    if too_large(opened.label, limit):
        return None, ["not checked: both models together take more memory than was allowed"]
    c, new = checking, open_model(made, trust_remote_code=True).working
    return _check(open_model(opened.label), new, c.text, c.inputs, c.max_loss, c.seed, tell, None), []


def check(
    out: nn.Module | str | Path,
    against: nn.Module | str | Path,
    *,
    text: Any = None,
    inputs: Inputs = None,
    max_loss: float | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Tell | None = None,
) -> Checked:
    """Measure a converted model against the one that it was made from; figures as in `Checked`."""
    original = open_model(against)
    made = open_model(out, trust_remote_code=trust_remote_code).working
    return _check(original, made, text, inputs, max_loss, seed, progress or silent, None)


def _one(target: Target | Sequence[Target]) -> Target | None:
    """The target asked for. A change of a changed model is a conversion of its own: it has its own calibration,
    check and form, and most forms can be changed no further."""
    targets = tuple(target) if isinstance(target, Sequence) else (target,)
    if len(targets) > 1:
        words = ", ".join(spell(t) for t in targets)
        raise BadUsage(
            "usage",
            f"one conversion makes one change, {len(targets)} were asked for: {words}",
            f"give the last alone: {spell(targets[-1])}",
        )
    return targets[0] if targets else None


def _at_length(target: Target | None, tokens: int) -> Target | None:
    """A share of pairs is one of texts of some length."""
    return target.at_length(tokens) if isinstance(target, BlockSparse) else target


@dataclass(frozen=True, eq=False)
class _Done:
    """What one step made, and of which sites."""

    model: nn.Module
    plan: Plan
    changes: Mapping[str, Change]
    used: Sequence[Batch] | None
    program: Program
    found: Found


def _run(asked: Asked, module: nn.Module, tell: Tell) -> _Done:
    """The pipeline, once."""
    # the dynamic graph is what calibration runs and what a plain module becomes; it takes longer than all else here
    moving = asked.calibration is not None or not isinstance(module, PreTrainedModel)
    program = capture(module, asked.inputs, dynamic=moving)
    found = find(program.static)
    planned = asked.plan(module, program, found)
    require(planned)
    if asked.out is not None:
        require_space(planned, asked.out)
    data = asked.batches(program)
    changes = convert_sites(program, found, asked.targets(program, found), data, tell, asked.tuning)
    planned = planned.found({name: change.rewritten.site for name, change in changes.items()})
    made, planned = emit_forms(program, changes, planned, asked.how)
    return _Done(made, planned, changes, data, program, found)


def _lossless(asked: Asked, done: _Done) -> Callable[[], nn.Module]:
    """The same sites at the setting that must be exact, through the same emission."""

    def make() -> nn.Module:
        exact = {n: t.lossless(done.changes[n].site) for n, t in asked.targets(done.program, done.found).items()}
        same = convert_sites(done.program, done.found, exact, None, silent)
        return emit_forms(done.program, same, done.plan, "own")[0]

    return make


def _check(
    opened: Opened,
    made: nn.Module,
    text: Any,
    inputs: Inputs,
    max_loss: float | None,
    seed: int,
    tell: Tell,
    lossless: Callable[[], nn.Module] | None,
) -> Checked:
    """Both models rounded to the source's type, as they are saved, and run in float32."""
    windows: list[torch.Tensor] = []
    if text is not None:
        cut = Windows(opened.context, samples=1_000_000)
        windows = [b["input_ids"] for b in batches(text, {"input_ids": 0}, cut, opened.tokenizer)]
        example = None
    else:
        program = capture(opened.working, inputs, dynamic=False)
        example = program.args or program.kwargs
    return compare(
        opened.working,
        opened.widened(made),
        windows=windows,
        example=example,
        max_loss=max_loss,
        lossless=lossless,
        seed=seed,
        progress=tell,
    )
