"""The folder that `convert` leaves: what transformers expects, the recipe, the report and the model card."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rewrite.card import write_card
from rewrite.emit import for_older_readers
from rewrite.errors import BadUsage
from rewrite.folder import draft
from rewrite.opened import Opened
from rewrite.report import Report

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


def save(made: Any, opened: Opened, report: Report, out: Path) -> Path:
    """Write the folder, whole or not at all; a failed check leaves `out.failed`. Gives the folder's final name."""
    with draft(out, opened.folder) as work:
        made.save_pretrained(work.path)
        for_older_readers(work.path)
        if opened.folder is not None:
            copy_beside(opened.folder, work.path)
        elif opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(work.path)
        write_card(work.path, report, _licence(opened.folder))
        failed = report.checked is not None and bool(report.checked.failures)
        return work.fail() if failed else work.publish()


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
