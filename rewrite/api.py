"""The user's door: plan, convert, check. `convert` reads like the pipeline that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes import Target
from passes.assign import assign, barred, suited, uncached
from passes.convert import Change, convert_sites
from passes.emit import How, forecast, require
from passes.emit import emit as emit_forms
from passes.find import Found, find
from passes.gqa import GQA
from passes.mla import MLA
from passes.plan import Plan, make_plan, no_attention, require_space
from passes.sizes import describe
from passes.sparse import BlockSparse
from passes.spread import open_shares, settled, words
from passes.stream import Job, limit_of, require_job, stream, streams, too_large
from passes.tune import Tuning
from rewrite.calibration import Batch, Windows, batches
from rewrite.capture import capture
from rewrite.compare import check as compare
from rewrite.errors import BadUsage
from rewrite.folder import draft, joined, refuse_output
from rewrite.opened import Opened, open_folder, open_model
from rewrite.program import Program
from rewrite.ranks import here, together
from rewrite.report import Calibration, Checked, Report
from rewrite.save import finish, made_by, refuse_saving, save, save_config
from rewrite.site import Site
from rewrite.spell import spell

TARGETS: tuple[type[Any], ...] = (GQA, MLA, BlockSparse)
"""Every target that can be asked for, by the command line too."""

Inputs = tuple[Any, ...] | dict[str, Any] | None
Tell = Callable[[str, int, int], None]


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
    step = _Step(target=_one(target), inputs=inputs, only=only, skip=tuple(skip))
    found = find(program.static)
    planned = step.plan(model, program, found, context)
    return planned.emitted(forecast(program.module, step.pairs(program, found)), {})


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
    Under torchrun sites are shared out, and all processes but the first get None.
    Raises where no site can be converted; a failed check is told by the report, and names the folder `out.failed`.
    """
    asked = _one(target)
    if asked is None:
        raise BadUsage("usage", "no target was given", "name one: GQA(kv_heads)")
    if tune and calibration is None:
        raise BadUsage("usage", f"tuning takes {tune} steps on the calibration, and none was given", "give calibration")
    source = Path(model) if isinstance(model, (str, Path)) else None
    if out is not None and here().first:
        refuse_output(Path(out), source)
    tell, limit = progress or _silent, limit_of(memory)
    streamed = out is not None and source is not None and streams(source, limit, memory, calibration)
    opened = open_folder(source) if streamed and source is not None else open_model(model)
    if out is not None:
        refuse_saving(opened.working)
    windows = Windows(length or opened.context, samples)
    asked = _at_length(asked, windows.length) or asked
    tuning = Tuning(tune, seed) if tune else None
    folder = None if out is None else Path(out)
    step = _Step(asked, inputs, only, tuple(skip), opened, calibration, windows, folder, tuning, emit)
    if streamed and folder is not None:
        checking = _Checking(check, text, inputs, max_loss, seed)
        return _stream(step, opened, folder, limit, tell, checking, resume=resume)
    done = step.run(opened.working, tell)
    made: Any = opened.as_given(done.model)
    checked = _check(opened, made, text, inputs, max_loss, seed, tell, step.lossless(done)) if check else None
    used = None if done.used is None else opened.calibration(step.calibration, done.used)
    errors = {n: c.error for n, c in done.changes.items()}
    notes = [note for c in done.changes.values() for note in c.rewritten.notes]
    made.rewrite_report = step.report(done.plan, used, errors, notes, checked, seed)
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
    step: _Step, opened: Opened, out: Path, limit: int, tell: Tell, checking: _Checking, *, resume: bool
) -> Written | None:
    """The pipeline from folder to folder: nothing that is as large as the model is held."""
    program = capture(opened.working, step.inputs, dynamic=step.calibration is not None)
    found = find(program.static)
    planned = step.plan(opened.working, program, found)
    require(planned)
    data = step.batches(program)
    used = None if data is None else opened.calibration(step.calibration, data)
    targets = step.targets(program, found)
    job = Job(program, found, targets, planned, step.how, opened, limit, data, step.tuning)
    require_job(job, out)
    with together() as ranks:
        key = step.key(checking.seed, used)
        with draft(out, opened.folder, key=key, restart=not resume) if ranks.first else joined(out) as work:
            ranks.meet()
            made = stream(job, work, tell, ranks)
            if made is None:
                return None
            save_config(made.large.model, made.types, work)
            checked, notes = _check_written(opened, work.path, checking, limit, tell)
            report = step.report(made.plan, used, made.errors, [*made.notes, *notes], checked, checking.seed)
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
    return _check(original, made, text, inputs, max_loss, seed, progress or _silent, None)


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


def _silent(_name: str, _done: int, _total: int) -> None:
    return


@dataclass(frozen=True, eq=False)
class _Done:
    """What one step made, and of which sites."""

    model: nn.Module
    plan: Plan
    changes: Mapping[str, Change]
    used: Sequence[Batch] | None
    program: Program
    found: Found


@dataclass(frozen=True, eq=False)
class _Step:
    """One target on one model: capture, find, plan, calibrate, convert, emit."""

    target: Target | None
    inputs: Inputs
    only: str = "*"
    skip: tuple[str, ...] = ()
    opened: Opened | None = None
    calibration: Any = None
    windows: Windows | None = None
    out: Path | None = None
    tuning: Tuning | None = None
    how: How = "auto"

    def run(self, module: nn.Module, tell: Tell) -> _Done:
        """The pipeline, once."""
        program = capture(module, self.inputs)
        found = find(program.static)
        planned = self.plan(module, program, found)
        require(planned)
        if self.out is not None:
            require_space(planned, self.out)
        data = self.batches(program)
        changes = convert_sites(program, found, self.targets(program, found), data, tell, self.tuning)
        planned = planned.found({name: change.rewritten.site for name, change in changes.items()})
        made, planned = emit_forms(program, changes, planned, self.how)
        return _Done(made, planned, changes, data, program, found)

    def targets(self, program: Program, found: Found) -> dict[str, Target]:
        """The target of every site that can have it."""
        shared, chosen = barred(found), self.assigned(program, found)
        sites = {s.name: s for s in found.sites}
        fit = {n: t for n, t in chosen.items() if n not in shared and t.refuse(sites[n]) is None}
        # a stock class has one rank for all layers
        return settled(found.sites, fit, open_shares(found.sites, fit)) if self.how == "stock" else fit

    def assigned(self, program: Program, found: Found) -> dict[str, Target]:
        """The target of every chosen site."""
        if self.target is None:
            return {}
        return suited(assign(found, self.target, self.only, self.skip), uncached(program, found))

    def pairs(self, program: Program, found: Found) -> dict[str, tuple[Site, Site]]:
        """Every site that can have the target, and its new shape."""
        targets = self.targets(program, found)
        return {s.name: (s, targets[s.name].after(s)) for s in found.sites if s.name in targets}

    def plan(self, model: Any, program: Program, found: Found, context: int = 32_768) -> Plan:
        """What would be done, site by site."""
        label = self.opened.folder if self.opened is not None and self.opened.folder is not None else model
        if not found.sites:
            raise no_attention(describe(label, program.module), len(program.static.graph.nodes), found)
        chosen = self.assigned(program, found)
        spelled = (spell(self.target),) if self.target is not None else ()
        why = barred(found)
        sizes = words(found.sites, {n: t for n, t in chosen.items() if n not in why}, alike=self.how == "stock")
        return make_plan(label, program, found, chosen, spelled=spelled, barred=why, context=context, sizes=sizes)

    def batches(self, program: Program) -> list[Batch] | None:
        """The calibration for this model's inputs; at the traced size where the model takes no other."""
        if self.calibration is None or self.windows is None or self.opened is None:
            return None
        names = [str(n) for n in program.static.graph_signature.user_inputs if isinstance(n, str)]
        example = dict(zip(names, [*program.args, *program.kwargs.values()], strict=False))
        windows = self.windows
        if program.dynamic is None:
            rows, tokens = next(a.shape[:2] for a in example.values() if isinstance(a, torch.Tensor) and a.dim() > 1)
            windows = Windows(tokens, windows.samples, rows)
        return batches(self.calibration, example, windows, self.opened.tokenizer)

    def key(self, seed: int, used: Calibration | None) -> str:
        """What a conversion hangs on, line by line: one that differs is another conversion."""
        lines = {
            "model": "" if self.opened is None else self.opened.fingerprint,
            "target": "" if self.target is None else spell(self.target),
            "only": self.only,
            "skip": " ".join(self.skip),
            "emit": self.how,
            "text": "" if used is None else f"{used.sha256}, {used.samples} windows of {used.length}",
            "tune": "" if self.tuning is None else str(self.tuning.steps),
            "seed": str(seed),
            "with": " ".join(f"{name} {version}" for name, version in made_by()),
        }
        return "".join(f"{name:8} {value}\n" for name, value in lines.items())

    def report(
        self,
        planned: Plan,
        used: Calibration | None,
        errors: Mapping[str, float | None],
        notes: Sequence[str],
        checked: Checked | None,
        seed: int,
    ) -> Report:
        """What was done."""
        if self.opened is None:
            raise ValueError("a report is of a model that was opened")
        return Report(
            version=1,
            model=self.opened.label,
            architecture=type(self.opened.working).__name__,
            fingerprint=self.opened.fingerprint,
            target=() if self.target is None else (spell(self.target),),
            tune=0 if self.tuning is None else self.tuning.steps,
            only=self.only,
            skip=self.skip,
            seed=seed,
            calibration=used,
            sites=planned.measured(errors),
            checked=checked,
            notes=(*((planned.sizes,) if planned.sizes else ()), *dict.fromkeys(notes)),
            made_by=made_by(),
        )

    def lossless(self, done: _Done) -> Callable[[], nn.Module]:
        """The same sites at the setting that must be exact, through the same emission."""

        def make() -> nn.Module:
            exact = {n: t.lossless(done.changes[n].site) for n, t in self.targets(done.program, done.found).items()}
            same = convert_sites(done.program, done.found, exact, None, _silent)
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
