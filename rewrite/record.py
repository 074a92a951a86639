"""Frozen dataclasses to JSON and back; reading verifies every field against its annotation."""

from __future__ import annotations

import json
import math
import types
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON knows them; what is not finite becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in cast("tuple[Any, ...]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> str:
    """One indented JSON text; equal data give equal bytes."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(cls: type[T], text: str) -> T:
    """The dataclass that `to_json` wrote; ValueError says which field is wrong and how."""
    return cast("T", _read(json.loads(text), cls, ""))


def _read(raw: Any, kind: Any, at: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(raw, inner, at)
    if origin is tuple:
        return _read_tuple(raw, inner, at)
    if is_dataclass(kind):
        return _read_dataclass(raw, cast("type[Any]", kind), at)
    if kind is float and type(raw) is int:
        return float(raw)
    if kind is types.NoneType and raw is None:
        return None
    if not isinstance(kind, type) or type(raw) is not kind:
        raise ValueError(f"{at or 'the text'} is {raw!r}, not {getattr(kind, '__name__', kind)}")
    return raw


def _read_union(raw: Any, kinds: tuple[Any, ...], at: str) -> Any:
    if raw is None and types.NoneType in kinds:
        return None
    some = [k for k in kinds if k is not types.NoneType]
    return _read(raw, some[0] if len(some) == 1 else type(raw), at)


def _read_tuple(raw: Any, kinds: tuple[Any, ...], at: str) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise ValueError(f"{at} is {raw!r}, not a list")
    items = cast("list[Any]", raw)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(kinds) != len(items):
        raise ValueError(f"{at} holds {len(items)} items, not {len(kinds)}")
    return tuple(_read(v, k, f"{at}[{i}]") for i, (v, k) in enumerate(zip(items, kinds, strict=True)))


def _read_dataclass(raw: Any, cls: type[Any], at: str) -> Any:
    names = [f.name for f in fields(cls)]
    if not isinstance(raw, dict):
        raise ValueError(f"{at or 'the text'} is {raw!r}, not an object")
    given = cast("dict[str, Any]", raw)
    wrong = sorted(set(names) ^ set(given))
    if wrong:
        word = "lacks" if wrong[0] in names else "has the unknown field"
        raise ValueError(f"{at or 'the text'} {word} {wrong[0]}")
    hints = get_type_hints(cls)
    return cls(**{n: _read(given[n], hints[n], f"{at}.{n}".lstrip(".")) for n in names})
