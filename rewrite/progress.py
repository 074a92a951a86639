"""Progress on stderr: bars on a terminal, one plain line per step in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

Tell = Callable[[str, int, int], None]
"""Told what is worked on, how much is done and how much there is."""


def silent(_name: str, _done: int, _total: int) -> None:
    """Tell nobody."""


def lines(name: str, done: int, total: int) -> None:
    """One line per step, without control characters."""
    if done < total:
        print(f"{done + 1}/{total}  {name}", file=sys.stderr, flush=True)


@contextmanager
def progress(*, quiet: bool = False) -> Generator[Tell]:
    """The way to tell that fits stderr."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        yield from _bar()
    else:
        yield lines


def _bar() -> Generator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)

        def tell(name: str, done: int, total: int) -> None:
            shown.update(task, description=name, completed=done, total=total)

        yield tell
