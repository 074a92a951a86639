"""Triton's integers in Python: `//` and `%` round toward zero, tables are pointers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np


class Number:
    """A number, or an array of them, that divides as Triton does and must fit 32 bits."""

    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value, dtype=np.int64)
        assert (np.abs(self.value) < 2**31).all(), "32 bits are not enough"

    def __add__(self, other: Any) -> Number:
        return Number(self.value + raw(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Number:
        return Number(self.value - raw(other))

    def __rsub__(self, other: Any) -> Number:
        return Number(raw(other) - self.value)

    def __mul__(self, other: Any) -> Number:
        return Number(self.value * raw(other))

    __rmul__ = __mul__

    def __neg__(self) -> Number:
        return Number(-self.value)

    def __floordiv__(self, other: Any) -> Number:
        c = raw(other)
        return Number(np.sign(self.value) * (np.abs(self.value) // c))

    def __mod__(self, other: Any) -> Number:
        c = raw(other)
        return Number(np.sign(self.value) * (np.abs(self.value) % c))

    def __rfloordiv__(self, other: Any) -> Number:
        return Number(other) // self

    def __rmod__(self, other: Any) -> Number:
        return Number(other) % self

    def __and__(self, other: Any) -> Number:
        return Number(self.value & raw(other))

    def __or__(self, other: Any) -> Number:
        return Number(self.value | raw(other))

    def __lt__(self, other: Any) -> Number:
        return Number(self.value < raw(other))

    def __le__(self, other: Any) -> Number:
        return Number(self.value <= raw(other))

    def __gt__(self, other: Any) -> Number:
        return Number(self.value > raw(other))

    def __ge__(self, other: Any) -> Number:
        return Number(self.value >= raw(other))

    def __eq__(self, other: object) -> Any:
        return Number(self.value == raw(other))

    def __ne__(self, other: object) -> Any:
        return Number(self.value != raw(other))

    def __hash__(self) -> int:
        raise TypeError("a number of a kernel is not a key")


class Pointer:
    """A table's first entry, or entries counted from there."""

    def __init__(self, data: Any, at: Any = None) -> None:
        self.data, self.at = data, at

    def __add__(self, at: Any) -> Pointer:
        return Pointer(self.data, raw(at) if self.at is None else self.at + raw(at))


def raw(x: Any) -> Any:
    """The numbers themselves."""
    return x.value if isinstance(x, Number) else np.asarray(x)


def read(pointer: Pointer) -> Number:
    """`tl.load`, inside the table."""
    assert ((pointer.at >= 0) & (pointer.at < pointer.data.size)).all(), "a load outside the table"
    return Number(pointer.data.reshape(-1)[pointer.at])


tl = SimpleNamespace(
    minimum=lambda a, b: Number(np.minimum(raw(a), raw(b))),
    maximum=lambda a, b: Number(np.maximum(raw(a), raw(b))),
    where=lambda c, a, b: Number(np.where(raw(c), raw(a), raw(b))),
    abs=lambda a: Number(np.abs(raw(a))),
    load=read,
)


def space(tables: Mapping[str, Any], **numbers: Any) -> dict[str, Any]:
    """What a kernel's text reads: numbers by name, tables as pointers with their lengths."""
    found: dict[str, Any] = {"tl": tl, **{name: Number(x) for name, x in numbers.items()}}
    for name, table in tables.items():
        data = np.ascontiguousarray(table)
        found[name] = Pointer(data)
        found |= {f"{name}_n{axis}": size for axis, size in enumerate(data.shape)}
    return found
