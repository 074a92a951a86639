"""The folder that `convert` leaves: what transformers expects, the recipe, the report and the model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rewrite.card import write_card
from rewrite.emit import for_older_readers
from rewrite.errors import BadUsage
from rewrite.folder import Draft, draft
from rewrite.journal import hash_of
from rewrite.opened import Opened
from rewrite.report import Report

SHARD = 5_000_000_000
"""Bytes of a file of weights at most."""
BESIDE = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "pre", "processor")
"""Beginnings of the names of files that belong to a model and that no conversion changes."""


def refuse_saving(model: Any) -> None:
    """Raise where the result could not be written as a folder."""
    if not hasattr(model, "save_pretrained"):
        raise BadUsage(
            "output",
            f"{type(model).__name__} is no PreTrainedModel, so there is no folder format for the result",
            "leave `out` away; keep the returned module with torch.export.save(torch.export.export(new, inputs), path)",
        )


def save(made: Any, opened: Opened, report: Report, out: Path) -> tuple[Path, Report]:
    """Write the folder, whole or not at all; a failed check leaves `out.failed`. Gives the folder's final name, and
    the report with the hashes of its files."""
    with draft(out, opened.folder) as work:
        made.save_pretrained(work.path, max_shard_size=SHARD)
        return finish(work, opened, report, {})


def save_config(model: Any, types: Mapping[str, torch.dtype], work: Draft) -> None:
    """Write what belongs to a model but its weights. `model` lies on meta; `types` are those that its parameters have
    in the files."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types.get(name, parameter.dtype))
    # in a folder of its own, as the library removes the files of weights that it finds where it writes
    with TemporaryDirectory(dir=work.partial / "journal") as place:
        model.save_pretrained(place, state_dict={})
        for path in sorted(Path(place).iterdir()):
            path.replace(work.path / path.name)


def finish(work: Draft, opened: Opened, report: Report, hashes: Mapping[str, str]) -> tuple[Path, Report]:
    """What stands beside the weights, then the folder's name. `hashes` are those of files that are known already."""
    for_older_readers(work.path)
    if opened.folder is not None:
        copy_beside(opened.folder, work.path)
    elif opened.tokenizer is not None:
        opened.tokenizer.save_pretrained(work.path)
    files = sorted(p for p in work.path.iterdir() if p.is_file())
    report = replace(report, files=tuple((p.name, hashes.get(p.name) or hash_of(p)) for p in files))
    write_card(work.path, report, _licence(opened.folder))
    failed = report.checked is not None and bool(report.checked.failures)
    return (work.fail() if failed else work.publish()), report


def copy_beside(source: Path, target: Path) -> None:
    """Copy the files that belong to a model and that no conversion changes."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name.startswith(BESIDE) and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _licence(folder: Path | None) -> str:
    """The licence that the source's model card names."""
    card = folder / "README.md" if folder is not None else None
    if card is None or not card.is_file():
        return ""
    lines = card.read_text(encoding="utf-8", errors="replace").split("---")
    head = lines[1].splitlines() if len(lines) > 2 else []
    return next((h.partition(":")[2].strip() for h in head if h.startswith("license:")), "")


def made_by() -> tuple[tuple[str, str], ...]:
    """(package, version) of what computed the result."""
    found: list[tuple[str, str]] = []
    for name in ("reattn", "torch", "transformers", "safetensors"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "not installed as a package"))
    return tuple(found)
