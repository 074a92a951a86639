"""What each verb of the command does: options in, the text for stdout and the exit code out. Nothing heavy is imported
before a verb runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rewrite.errors import BadUsage


def _api() -> Any:
    """The library, its own libraries' bars and warnings switched off: they would mix with ours."""
    from transformers.utils import logging

    from rewrite import api

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return api


def run_plan(options: argparse.Namespace) -> tuple[str, int]:
    """`reattn plan`: the table, or one site with --why."""
    from rewrite.checkpoint import open_checkpoint

    open_checkpoint(options.model)
    targets = _targets(options.to)
    plan = _api().plan(options.model, targets, only=options.only, skip=options.skip, context=options.context)
    if options.why is not None:
        return plan.explain(_known(options.why, [*(s.name for s in plan.sites), *(n for n, _ in plan.refused)])), 0
    refusal = plan.refusal()
    if refusal is not None:
        raise refusal
    return (plan.json() if options.json else str(plan)), 0


def run_convert(options: argparse.Namespace) -> tuple[str, int]:
    """`reattn convert`: the report; exit code 1 where the check failed."""
    from rewrite.checkpoint import require_checkpoint
    from rewrite.folder import refuse_output
    from rewrite.progress import progress
    from rewrite.ranks import here

    if options.max_loss is not None and (options.text is None or options.no_check):
        raise BadUsage("usage", "--max-loss is a limit on perplexity", "it needs --text FILE, and no --no-check")
    require_checkpoint(options.model)
    if here().first:
        refuse_output(options.out, options.model)
    for path in (options.calibrate, options.text):
        _readable(path)
    targets = _targets(options.to)
    with progress() as tell:
        made = _api().convert(
            options.model,
            targets,
            calibration=options.calibrate,
            text=options.text,
            samples=options.calibrate_samples,
            length=options.calibrate_length,
            check=not options.no_check,
            tune=options.tune,
            emit=options.emit,
            memory=options.memory,
            resume=not options.restart,
            only=options.only,
            skip=options.skip,
            out=options.out,
            max_loss=options.max_loss,
            seed=options.seed,
            progress=tell,
        )
    if made is None:  # another process of this run writes and tells
        return "", 0
    report = made.rewrite_report
    failed = report.checked is not None and bool(report.checked.failures)
    if failed:
        kept = max(options.out.parent.glob(f"{options.out.name}.failed*"), key=lambda p: p.stat().st_mtime_ns)
        print(f"there is no {options.out}; the result is kept in {kept}", file=sys.stderr)
    return (report.json() if options.json else report.text()), int(failed)


def run_check(options: argparse.Namespace) -> tuple[str, int]:
    """`reattn check`: the table; exit code 1 where it failed."""
    from rewrite.checkpoint import require_checkpoint
    from rewrite.progress import progress
    from rewrite.record import to_json

    if options.max_loss is not None and options.text is None:
        raise BadUsage("usage", "--max-loss is a limit on perplexity", "it needs --text FILE")
    for folder in (options.out, options.against):
        require_checkpoint(folder)
    _readable(options.text)
    with progress() as tell:
        checked = _api().check(
            options.out,
            options.against,
            text=options.text,
            max_loss=options.max_loss,
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
            progress=tell,
        )
    held = "measured; --max-loss sets a limit" if options.max_loss is None else "ok"
    result = "FAILED: " + "; ".join(checked.failures) if checked.failures else held
    text = to_json(checked) if options.json else f"{checked.text()}\n\nresult   {result}"
    return text, int(bool(checked.failures))


def run_export(options: argparse.Namespace) -> tuple[str, int]:
    """`reattn export`: what was written."""
    from rewrite.checkpoint import require_checkpoint
    from rewrite.folder import refuse_output
    from rewrite.progress import progress

    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise BadUsage("onnx", f"not installed: {', '.join(missing)}", "pip install 'reattn[onnx]'")
    require_checkpoint(options.model)
    refuse_output(options.out, options.model)
    _api()
    from rewrite.onnx.export import export_onnx

    given = {"form": options.form, "dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    with progress() as tell:
        done = export_onnx(options.model, options.out, **given, progress=tell)
    return (done.json() if options.json else done.text()), 0


def _targets(words: Sequence[str]) -> tuple[Any, ...]:
    from rewrite.spell import parse

    return tuple(parse(word, _api().TARGETS) for word in words)


def _readable(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as why:
        reason = (why.strerror or str(why)).lower() if isinstance(why, OSError) else "it is not UTF-8 text"
        raise BadUsage("text", f"cannot read {path}: {reason}", "give a file of plain text") from why


def _known(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    if name in names:
        return name
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    raise BadUsage(
        "unknown-name",
        f"--why: no site is called '{name}'",
        f"did you mean '{near[0]}'?" if near else "list them: reattn plan MODEL",
    )
