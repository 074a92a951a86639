"""Output folders that are whole or absent: written beside their name, synced, then renamed.

    out.partial/reattn-partial   the mark: this folder is ours, so a later run may clear it
    out.partial/whole/...        what becomes `out` (or `out.failed`) in one rename
    out.partial/journal/...      what a long conversion has finished (rewrite/journal.py), and of which (`key`)

A process that dies at any point leaves nothing named `out`; the next one clears `out.partial` and starts again, or goes
on from its journal where it is the same conversion. The folder's own lock tells a dead writer from a living one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewrite.errors import OutOfSpace, ReattnError, Refused

BLOCK = 1 << 22
"""Bytes of a file that are read at once."""
_MARK = "reattn-partial"
_WHOLE = "whole"
_JOURNAL = "journal"
_KEY = "key"


@dataclass(frozen=True)
class Draft:
    """An output in the making: write into `path`, then `publish` or `fail`."""

    out: Path
    partial: Path
    path: Path

    @property
    def journal(self) -> Path:
        """Where a conversion that can be resumed notes what is done."""
        return self.partial / _JOURNAL

    def publish(self) -> Path:
        """The draft becomes `out`: from one moment to the next, and for good."""
        return self._rename(self.out)

    def fail(self) -> Path:
        """The draft becomes `out.failed` (or out.failed-2 ...: an earlier one is kept)."""
        target, count = self.out.with_name(self.out.name + ".failed"), 1
        while target.exists():
            count += 1
            target = self.out.with_name(f"{self.out.name}.failed-{count}")
        return self._rename(target)

    def publish_file(self) -> Path:
        """The draft's file of the name of `out` becomes `out`, after all that it needs beside it."""
        self._settle()
        paths = sorted(self.path.iterdir(), key=lambda p: (p.name == self.out.name, p.name))
        for path in paths:
            if (target := self.out.with_name(path.name)).exists():
                raise _exists(target)
            os.rename(path, target)
        sync(self.out.absolute().parent)
        return self.out

    def _settle(self) -> None:
        # the libraries that write weights leave files that only the owner reads; ours get what the umask gives
        mode = (self.partial / _MARK).stat().st_mode & 0o777
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                path.chmod(mode)
            sync(path)
        sync(self.path)

    def _rename(self, target: Path) -> Path:
        self._settle()
        if target.exists():  # made by someone else while we worked; a rename would replace an empty folder
            raise _exists(target)
        os.rename(self.path, target)
        sync(target.parent)
        return target


def sync(path: Path) -> None:
    """Force a file or a folder's list of names to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_into(state: Any, path: Path) -> None:
    """Feed a file to a hash, a piece at a time."""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)


def refuse_output(out: Path, source: Path | None = None) -> None:
    """Raise where `out` cannot be made, before any work is done. Nothing that exists is ever replaced."""
    if out.exists() or out.is_symlink():
        raise _exists(out)
    parent = out.absolute().parent
    if not parent.is_dir():
        what = "is a file" if parent.exists() else "does not exist"
        fix = "choose another name" if parent.exists() else f"mkdir -p {parent}"
        raise Refused("output-unwritable", f"cannot write {out}", f"{parent} {what}", fix)
    if source is not None and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise Refused("output-inside-input", f"{out} lies inside the model {source}", "choose a folder outside of it")
    partial = partial_of(out)
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise _foreign(out, partial)
    with _as_refusal(out):
        made = not partial.exists()
        partial.mkdir(exist_ok=True)
        if made:
            with suppress(OSError):  # another process may have taken it at once; the lock will tell
                partial.rmdir()
    if partial.is_dir() and not _ours(partial):
        raise _foreign(out, partial)


@contextmanager
def draft(out: Path, source: Path | None = None, *, key: str = "", restart: bool = False) -> Generator[Draft]:
    """A `Draft` for `out`, locked against other processes; what is not published is gone at the end.

    With a `key`, a text that says which conversion this is, what is not published stays: the next draft with this key
    finds it, and one with another key is refused unless it may `restart`.
    """
    refuse_output(out, source)
    partial = partial_of(out)
    with _as_refusal(out):
        partial.mkdir(exist_ok=True)
        lock = _lock(out, partial)
    kept = False
    try:
        if not _ours(partial):
            raise _foreign(out, partial)
        _settle(out, partial, key, restart)
        made = Draft(out, partial, partial / _WHOLE)
        kept = bool(key)
        with _as_refusal(out):
            yield made
        kept = kept and made.path.is_dir()
    finally:
        # a journal in which nothing stands but its key is of no use
        if not kept or len(list((partial / _JOURNAL).iterdir())) < 2:
            _remove(partial)
        os.close(lock)


@contextmanager
def joined(out: Path) -> Generator[Draft]:
    """The draft that another process of this run opens."""
    yield Draft(out, partial_of(out), partial_of(out) / _WHOLE)


def _settle(out: Path, partial: Path, key: str, restart: bool) -> None:
    """Keep what an earlier run of the same conversion left, and nothing else."""
    held = partial / _JOURNAL / _KEY
    before = held.read_text(encoding="utf-8") if held.is_file() else ""
    if before and before != key and not restart:
        raise _other(out, partial, before, key)
    if not before or before != key or restart:
        shutil.rmtree(partial / _JOURNAL, ignore_errors=True)
        shutil.rmtree(partial / _WHOLE, ignore_errors=True)
    (partial / _MARK).write_text("an unfinished output of reattn; the next run removes it\n", encoding="utf-8")
    (partial / _WHOLE).mkdir(exist_ok=True)
    if key:
        (partial / _JOURNAL).mkdir(exist_ok=True)
        unfinished = partial / _JOURNAL / f"{_KEY}.unfinished"
        unfinished.write_text(key, encoding="utf-8")
        sync(unfinished)
        unfinished.replace(held)
        sync(partial / _JOURNAL)


def _other(out: Path, partial: Path, before: str, key: str) -> ReattnError:
    """What the unfinished conversion was, in the lines in which it differs."""
    old, new = set(before.splitlines()), set(key.splitlines())
    lines = [f"then  {line}" for line in before.splitlines() if line not in new]
    lines += [f"now   {line}" for line in key.splitlines() if line not in old]
    return Refused(
        "resume",
        f"{partial} holds an unfinished conversion that is another one",
        *lines,
        f"give the command that began it, choose another name than {out.name}, or discard it with --restart",
    )


def partial_of(out: Path) -> Path:
    """Where the output is made."""
    return out.with_name(out.name + ".partial")


def _ours(partial: Path) -> bool:
    """Empty, or marked by an earlier run: the mark is the first thing written and the last one removed."""
    names = {p.name for p in partial.iterdir()}
    return names <= {_MARK, _WHOLE, _JOURNAL} and (not names or _MARK in names)


def _remove(partial: Path) -> None:
    """The mark goes last, so that a process that dies here leaves a folder that is known as ours."""
    shutil.rmtree(partial / _WHOLE, ignore_errors=True)
    shutil.rmtree(partial / _JOURNAL, ignore_errors=True)
    with suppress(OSError):
        (partial / _MARK).unlink(missing_ok=True)
        partial.rmdir()


def _lock(out: Path, partial: Path) -> int:
    """The lock on the folder itself: the kernel lets go of it when its holder dies, however it dies."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino != partial.stat().st_ino:
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as why:
        os.close(handle)
        raise Refused(
            "output-busy",
            f"another process is writing {out}",
            f"it holds {partial}",
            "wait for it, or choose another name",
        ) from why
    return handle


@contextmanager
def _as_refusal(out: Path) -> Generator[None]:
    """The file system's no, in our words."""
    try:
        yield
    except OSError as why:
        if why.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace("disk", f"the disk is full: {out} is not complete", free_line(out)) from why
        if isinstance(why.filename, str) and Path(why.filename).name == partial_of(out).name:
            reason = (why.strerror or str(why)).lower()
            raise Refused(
                "output-unwritable",
                f"cannot write {out}",
                f"{out.absolute().parent}: {reason}",
                "choose a folder that you can write to",
            ) from why
        raise


def free_line(out: Path) -> str:
    """What is free where `out` lies."""
    from rewrite.table import size

    parent = out.absolute().parent
    return f"{size(shutil.disk_usage(parent).free)} are free in {parent}; free some, or write elsewhere"


def _exists(out: Path) -> ReattnError:
    return Refused(
        "output-exists", f"{out} exists already", "nothing is overwritten: choose another name, or move it away"
    )


def _foreign(out: Path, partial: Path) -> ReattnError:
    return Refused(
        "output-unwritable",
        f"cannot write {out}",
        f"{partial} is needed for unfinished work, and holds files that reattn did not write",
        "choose another name, or move it away",
    )
