"""Targets as text: `gqa:8`, `gqa:kv_heads=8,method=mean`; what is printed parses back to an equal target."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rewrite.errors import BadUsage

T = TypeVar("T")


def spell(target: Any) -> str:
    """The text of a target: only what differs from the defaults, the first field without its name if it is alone."""
    settings = [(f.name, getattr(target, f.name)) for f in fields(target) if getattr(target, f.name) != _default(f)]
    if not settings:
        return str(target.name)
    if [name for name, _ in settings] == [fields(target)[0].name]:
        return f"{target.name}:{_write(settings[0][1])}"
    return f"{target.name}:" + ",".join(f"{name}={_write(value)}" for name, value in settings)


def parse(text: str, targets: Sequence[type[T]]) -> T:
    """The target that `text` spells; the error names what is close to a slip."""
    known = {str(getattr(cls, "name", cls.__name__)): cls for cls in targets}
    name, _, rest = text.partition(":")
    cls = known.get(name.strip().lower())
    if cls is None:
        raise BadUsage(
            "unknown-target", f"there is no target '{name}' in '{text}'", _close(name, known), _usage(*targets)
        )
    hints = get_type_hints(cls)
    names = [f.name for f in _fields(cls)]
    values: dict[str, Any] = {}
    for at, piece in enumerate(p.strip() for p in _pieces(rest) if p.strip()):
        key, equals, value = piece.partition("=")
        if not equals or not key.strip().isidentifier():
            if at > 0:
                raise BadUsage("bad-target", f"'{piece}' in '{text}' has no name", _usage(cls))
            key, value = names[0], piece
        if key not in names:
            raise BadUsage("bad-target", f"{name} has no setting '{key}'", _close(key, names), _usage(cls))
        if key in values:
            raise BadUsage("bad-target", f"{key} is given twice in '{text}'", _usage(cls))
        values[key] = _read(value, hints[key], key, cls)
    return _build(cls, values, text)


def _pieces(text: str) -> list[str]:
    """What stands between commas; those in brackets belong to a mask."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def _build(cls: type[T], values: dict[str, Any], text: str) -> T:
    missing = [f.name for f in _fields(cls) if _default(f) is MISSING and f.name not in values]
    if missing:
        raise BadUsage("bad-target", f"'{text}' does not say {', '.join(missing)}", _usage(cls))
    try:
        return cls(**values)
    except ValueError as why:
        raise BadUsage("bad-target", f"'{text}': {why}", _usage(cls)) from why


def _fields(cls: type[Any]) -> tuple[Field[Any], ...]:
    return fields(cls)


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _write(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "/".join(_write(v) for v in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def _read(text: str, hint: Any, key: str, cls: type[Any]) -> Any:
    for kind in _kinds(hint):
        value = _read_as(text.strip(), kind)
        if value is not MISSING:
            return value
    choices = [str(c) for kind in _kinds(hint) if get_origin(kind) is Literal for c in get_args(kind)]
    near = _close(text, choices) if choices else ""
    wanted = " or ".join(dict.fromkeys(_noun(kind) for kind in _kinds(hint) if kind is not type(None)))
    raise BadUsage("bad-target", f"{key} wants {wanted}, got '{text}'", *([near] if near else []), _usage(cls))


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _read_as(text: str, kind: Any) -> Any:
    """The value, or MISSING where `text` is no such thing."""
    origin = get_origin(kind)
    if origin is Literal:
        return next((c for c in get_args(kind) if str(c) == text), MISSING)
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        items = [_read_as(part, get_args(kind)[0]) for part in text.split("/")]
        return MISSING if MISSING in items else tuple(items)
    if kind is bool:
        return {"true": True, "false": False}.get(text, MISSING)
    if kind is int:
        return int(text) if text.lstrip("-").isdecimal() else MISSING
    if kind is float:
        return float(text) if text.replace(".", "", 1).replace("e-", "", 1).isdecimal() else MISSING
    if kind is str:
        return text
    return _mask(text) if _is_mask(kind) else MISSING


def _is_mask(kind: Any) -> bool:
    # masks are made of sympy, which a spelling alone should not load
    from rewrite.mask import Mask

    return kind is Mask


def _mask(text: str) -> Any:
    """The mask of some algebra, or MISSING."""
    from rewrite.mask import parse as read

    try:
        return read(text)
    except ValueError:
        return MISSING


def _noun(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(c) for c in get_args(kind))
    if get_origin(kind) is not None:
        return "numbers with / between them, one per site"
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return known.get(kind) or "a mask, as causal & (window(1024) | sink(4))"


def _close(word: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"


def _usage(*targets: type[Any]) -> str:
    """A line that can be typed, for each target."""
    return "write it as: " + "   or   ".join(_pattern(cls) for cls in targets)


def _pattern(cls: type[Any]) -> str:
    must = ",".join(f"{f.name}=…" for f in _fields(cls) if _default(f) is MISSING)
    may = "".join(f"[,{f.name}=…]" for f in _fields(cls) if _default(f) is not MISSING)
    rest = must + may if must else may.replace("[,", "[", 1)
    return f"--to {getattr(cls, 'name', cls.__name__)}:{rest}"
