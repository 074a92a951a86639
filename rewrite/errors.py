"""Every error a user can meet: what happened, why with numbers, what to type. The slug is stable."""

from __future__ import annotations


class ReattnError(Exception):
    """Base: `slug` to search for, lines to read, exit code of the command."""

    code = 3

    def __init__(self, slug: str, what: str, *lines: str) -> None:
        super().__init__("\n  ".join((f"error[{slug}] {what}", *lines)))
        self.slug = slug
        self.what = what
        self.lines = lines


class Refused(ReattnError):
    """Nothing to convert, or the target does not apply (exit 3)."""


class BadUsage(ReattnError):
    """The request cannot be understood (exit 2)."""

    code = 2


class CheckFailed(ReattnError):
    """The result was made and measured, and is not good enough (exit 1)."""

    code = 1


class OutOfSpace(ReattnError):
    """Memory or disk does not suffice (exit 4)."""

    code = 4
