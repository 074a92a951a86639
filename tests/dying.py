"""Commands in a process that is killed in the middle: forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewrite.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["rewrite.api", "rewrite.verbs", "transformers.models.llama.modeling_llama"])


def die(words: Sequence[str], owner: str, name: str, calls: int, place: Path | None = None) -> None:
    """Run the command until `calls` calls of a function have returned, or with 0 until the first one begins; then
    kill -9. `owner` is what holds the function, as "package.module" or "package.module:object"; `place` the working
    folder."""
    process = SERVER.Process(target=_run, args=(tuple(words), owner, name, calls, place))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, f"the command ended with {process.exitcode}"


def _run(words: Sequence[str], owner: str, name: str, calls: int, place: Path | None) -> None:
    if place is not None:
        os.chdir(place)
    there = pkgutil.resolve_name(owner)
    whole, left = getattr(there, name), calls

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        made = whole(*args, **kwargs) if left else None
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    setattr(there, name, counted)
    sys.exit(main(words))
