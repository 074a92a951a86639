"""A process in which this project cannot be imported: there must load and compute what it wrote."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewrite.emit.reading import for_older_readers

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rewrite", "passes", "codegen"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
"""


def command(code: str, *words: str) -> list[str]:
    """The command line that runs `code` there; it finds `words` from `sys.argv[1]` on."""
    return [sys.executable, "-I", "-c", BLOCK + code, *words]


def run(code: str, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run `code` to its end with `given` on standard input; ten minutes at most."""
    return subprocess.run(command(code, *words), input=given, capture_output=True, text=True, timeout=600, check=False)


def write(top: Path, cases: Mapping[str, tuple[Any, Any]], name: str) -> None:
    """Name -> (model, its inputs), each in a folder `name` beside its inputs."""
    for case, (model, given) in cases.items():
        folder = top / case / name
        model.save_pretrained(folder)
        for_older_readers(folder)
        torch.save(given, folder.parent / "inputs.pt")
