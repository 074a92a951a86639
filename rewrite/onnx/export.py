"""A model as an ONNX file: traced, checked by the specification's checker, run against torch, whole or absent."""

from __future__ import annotations

import copy
import io
import json
import logging
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import nn

from rewrite.errors import BadUsage, Refused
from rewrite.failure import describe
from rewrite.folder import Draft, draft, refuse_output
from rewrite.onnx import genai, graph, names
from rewrite.onnx.caches import Slot
from rewrite.onnx.stage import Stage, staged
from rewrite.onnx.tracing import Traced, decodes, decoding, plain
from rewrite.onnx.verify import Agreement, check_decoding, check_file, check_plain
from rewrite.opened import Opened, open_model
from rewrite.progress import Tell, silent
from rewrite.record import to_json
from rewrite.report import Report
from rewrite.save import copy_beside
from rewrite.table import size

Form = Literal["auto", "matmul", "attention", "shared", "contrib"]
FORMS = ("auto", "matmul", "attention", "shared", "contrib")
KINDS = {"float32": torch.float32, "float16": torch.float16}
INLINE = 1_500_000_000
"""Bytes of weights above which they lie in a file of their own; a message of protobuf ends at 2 GB."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far ONNX Runtime is from torch."""

    files: tuple[str, ...]
    bytes: int
    form: str
    opset: int
    operators: dict[str, int]
    cache: tuple[int, ...]
    """Numbers cached per token, layer by layer."""
    worst: float
    """Largest difference between ONNX Runtime and torch, relative to the largest number."""
    runs: int
    note: str = ""
    """What else loads the file, or why nothing else does."""

    def json(self) -> str:
        """As JSON."""
        return to_json(self)

    def text(self) -> str:
        """As a few lines."""
        most = sorted(self.operators.items(), key=lambda x: -x[1])
        lines = [
            "export   traced, checked, run in ONNX Runtime",
            f"agrees   largest difference to torch {self.worst:.0e}, over {self.runs} runs of different sizes",
            f"form     {self.form}, opset {self.opset}: " + ", ".join(f"{count} {name}" for name, count in most[:8]),
        ]
        if self.cache:
            lines.append(f"cache    {sum(self.cache)} numbers a token in {len(self.cache)} layers")
        if self.note:
            lines.append(f"note     {self.note}")
        return "\n".join([*lines, f"wrote    {', '.join(self.files)} ({size(self.bytes)})"])

    def __str__(self) -> str:
        return self.text()


def export_onnx(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    form: Form = "auto",
    inputs: Any = None,
    dtype: Literal["float32", "float16"] = "float32",
    trust_remote_code: bool = False,
    progress: Tell | None = None,
) -> Exported:
    """Write a model - converted or not, live or a folder - as ONNX, and run it against torch before it is there.

    `path` ends in .onnx for a file (with OUT.onnx.data beside it where the weights exceed 1.5 GB), or names a folder
    for model.onnx, the config and the tokenizer. A language model becomes one graph for prefill and decoding, with its
    cache as inputs and outputs; any other model, and a module with example `inputs`, one call. `form` is how attention
    is written. "matmul" (what "auto" is): standard products, the fastest that takes and gives whole caches;
    "attention": the standard operator; "shared": the cache is written in place, opset 24; "contrib": in place by ONNX
    Runtime's own operator. `trust_remote_code` runs the modelling file that lies in a folder.
    Raises where the model cannot be written so, and CheckFailed where ONNX Runtime computes something else than torch.
    """
    out, tell = Path(path), progress or silent
    written = _usable(form, dtype)
    refuse_output(out, Path(model) if isinstance(model, (str, Path)) else None)
    opened = open_model(model, trust_remote_code=trust_remote_code)
    working: Any = copy.deepcopy(opened.working).half() if dtype == "float16" else opened.working
    tell("trace", 0, 3)
    stage = Stage(form=written)
    with _quiet():
        traced = decoding(working, stage) if decodes(working) else plain(working, inputs)
        _fits(written, traced.slots)
        with staged(working, stage):
            made = _translated(working, traced)
    opset = 24 if written == "shared" else 23
    graph.finish(made, traced.inputs, traced.outputs, opset)
    graph.require(made, _axes(traced), contrib=written == "contrib")
    report = _report(model, opened)
    made.metadata_props.update(_metadata(written, traced.slots, report))
    with draft(out, opened.folder) as work:
        tell("write", 1, 3)
        main = _write(made, work.path, out)
        tell("check", 2, 3)
        check_file(main)
        agreed = _agreement(main, working, traced, contrib=written == "contrib")
        note = _beside(work, opened, made, traced.slots, written) if traced.slots else ""
        done = _done(made, work, written, opset, traced.slots, agreed, note)
        work.publish_file() if out.suffix == ".onnx" else work.publish()
    tell("done", 3, 3)
    return done


def _usable(form: str, dtype: str) -> str:
    if form not in FORMS:
        raise BadUsage("usage", f"there is no form '{form}'", f"one of {', '.join(FORMS)}")
    if dtype not in KINDS:
        raise BadUsage(
            "usage", f"'{dtype}' is no type that ONNX Runtime computes in on every device", f"one of {', '.join(KINDS)}"
        )
    return "matmul" if form == "auto" else form


def _fits(form: str, slots: tuple[Slot, ...]) -> None:
    if not slots and form in ("shared", "contrib"):
        raise BadUsage("onnx", f"form '{form}' is about a cache, and this model has none", "leave the form away")
    if form in ("attention", "contrib") and any(slot.rank is not None for slot in slots):
        raise Refused(
            "onnx",
            f"form '{form}' reads keys and values of every kv head, and this model caches a latent",
            "form 'matmul' or 'shared' reads the latent itself",
        )
    if form in ("shared", "contrib") and any(slot.bound is not None for slot in slots):
        raise Refused("onnx", f"form '{form}' writes in place, and this cache drops tokens", "form 'matmul' does that")
    if any(not width for slot in slots for _, width in slot.tensors):
        raise Refused(
            "onnx",
            "its class computes its attention itself and is shown heads expanded from the latent at every step",
            "nothing that is cached is expanded in a file of ours: the original model can be written, this one not",
        )


@contextmanager
def _quiet() -> Generator[None]:
    """The exporter tells of its own insides at length; where it fails, the error tells what matters."""
    silent = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silent)


def _translated(model: nn.Module, traced: Traced) -> ir.Model:
    try:
        made: Any = torch.onnx.export(
            traced.module,
            traced.args,
            dynamo=True,
            # what is newer than 23 is in the graph by name; the exporter's own 24 takes norms and ropes apart
            opset_version=23,
            dynamic_shapes=traced.shapes,
            input_names=traced.inputs,
            output_names=traced.outputs,
            verbose=False,
        )
    except Exception as failure:  # tracing runs the model's own code, which may raise anything
        # the exporter's own error is a page of advice on reporting it; what it was raised from tells what happened
        why = failure.__cause__ if isinstance(failure.__cause__, Exception) else failure
        raise _stuck(str(why), traced) or describe(model, why) from failure
    return made.model


_STATIC = re.compile(
    r"static shape of (\d+) for dimension inputs\['(\w+)'\](?:\[(\d+)\])?(?:\[(\d+)\])?\.shape\[(\d+)\]"
)


def _stuck(message: str, traced: Traced) -> Refused | None:
    """The error where an axis that was to move has one size, in the names of the file."""
    found = [
        f"axis {axis} of {traced.named_input(argument, *(int(n) for n in (first, second) if n))} stayed {length}"
        for length, argument, first, second, axis in _STATIC.findall(message)
    ]
    return graph.fixed_size(", ".join(found)) if found else None


def _axes(traced: Traced) -> dict[str, dict[int, str]]:
    """Axis names by input; the cache's come last and are nested in the tree of shapes."""
    flat: list[dict[int, str]] = []
    for shape in traced.shapes:
        for one in shape if isinstance(shape, (list, tuple)) else [shape]:
            flat += one if isinstance(one, list) else [one]
    return dict(zip(traced.inputs, flat, strict=True))


def _report(model: Any, opened: Opened) -> Report | None:
    known = getattr(model, "rewrite_report", None)
    if isinstance(known, Report):
        return known
    place = opened.folder / "report.json" if opened.folder is not None else None
    if place is None or not place.is_file():
        return None
    try:
        return Report.read(place.read_text(encoding="utf-8"))
    except ValueError:
        return None  # somebody else's file of that name


def _metadata(form: str, slots: tuple[Slot, ...], report: Report | None) -> dict[str, str]:
    made = {names.FORM: form}
    if slots:
        made[names.SHARED] = "yes" if form in ("shared", "contrib") else "no"
        made[names.CACHE] = json.dumps([slot.numbers for slot in slots])
    if any(slot.bound is not None for slot in slots):
        made[names.BOUND] = json.dumps([slot.bound for slot in slots])
    if report is not None:
        made |= {names.RECIPE: ", ".join(report.target), names.REPORT: report.json()}
    return made


def _write(made: ir.Model, folder: Path, out: Path) -> Path:
    main = folder / (out.name if out.suffix == ".onnx" else "model.onnx")
    weights = sum(v.const_value.nbytes for v in made.graph.initializers.values() if v.const_value is not None)
    ir.save(made, main, external_data=f"{main.name}.data" if weights > INLINE else None)
    return main


def _agreement(main: Path, working: nn.Module, traced: Traced, *, contrib: bool) -> Agreement:
    flags = [(m, m.training) for m in working.modules()]
    working.eval()
    try:
        if traced.slots:
            return check_decoding(main, working, traced.slots, contrib=contrib)
        return check_plain(main, working, traced)
    finally:
        for module, training in flags:
            module.training = training


def _beside(work: Draft, opened: Opened, made: ir.Model, slots: tuple[Slot, ...], form: str) -> str:
    """The other files of a folder; the sentence on what loads it."""
    working: Any = opened.working
    note = genai.loaders(working, slots, form)
    if work.out.suffix == ".onnx":
        return f"as a folder: {note}"
    working.config.save_pretrained(work.path)
    if working.generation_config is not None:
        working.generation_config.save_pretrained(work.path)
    if opened.folder is not None:
        copy_beside(opened.folder, work.path)
    if genai.refuse(slots) is None:
        inputs = [value.name or "" for value in made.graph.inputs]
        text = genai.config(working, slots, inputs, "model.onnx", shared=form in ("shared", "contrib"))
        (work.path / genai.CONFIG).write_text(text, encoding="utf-8")
    return note


def _done(
    made: ir.Model, work: Draft, form: str, opset: int, slots: tuple[Slot, ...], agreed: Agreement, note: str
) -> Exported:
    paths = sorted(p for p in work.path.iterdir() if p.is_file())
    place = work.out.parent if work.out.suffix == ".onnx" else work.out
    return Exported(
        files=tuple(str(place / p.name) for p in paths),
        bytes=sum(p.stat().st_size for p in paths),
        form=form,
        opset=opset,
        operators=graph.operators(made),
        cache=tuple(slot.numbers for slot in slots),
        worst=agreed.worst,
        runs=agreed.runs,
        note=note,
    )
