"""Which sites a request means: globs on site names, and an error where a glob means none."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from rewrite.errors import BadUsage


def select(names: Sequence[str], only: str = "*", skip: Sequence[str] = (), *, label: str = "MODEL") -> frozenset[str]:
    """The names that `only` matches and no glob of `skip` does; a glob that matches nothing is an error."""
    chosen = _matching(names, only, "only", label)
    for glob in skip:
        chosen -= _matching(names, glob, "skip", label)
    return chosen


def _matching(names: Sequence[str], glob: str, option: str, label: str) -> frozenset[str]:
    hits = frozenset(n for n in names if fnmatchcase(n, glob))
    if hits or (glob == "*" and not names):
        return hits
    lines: list[str] = []
    near = _nearest(names, glob)
    if near:
        count = sum(fnmatchcase(n, near) for n in names)
        lines.append(f"did you mean '{near}'? ({count} site{'s' if count != 1 else ''})")
    lines.append(f"list them: reattn plan {label}")
    raise BadUsage("unknown-name", f"{option} '{glob}' matches no site", *lines)


def _nearest(names: Sequence[str], glob: str) -> str | None:
    """The glob with its dotted parts corrected one by one: 'model.layer.0.*' -> 'model.layers.0.*'."""
    candidates: set[str] = set()
    parts = glob.split(".")
    for name in names:
        # a part that holds a star stays as typed; the others take the spelling of the name
        theirs = name.split(".")
        fixed = [p if "*" in p else t for p, t in zip(parts, theirs, strict=False)]
        text = ".".join(fixed) if len(fixed) == len(parts) else name
        if fnmatchcase(name, text):
            candidates.add(text)
    close = difflib.get_close_matches(glob, sorted(candidates), n=1, cutoff=0.5)
    return close[0] if close else None
