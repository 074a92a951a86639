"""What a target made of a site, as tensors and JSON text, so that it can wait on disk; read back it is the same bits.

Only the dataclasses of `rewrite/site.py` and `rewrite/heads.py`, and masks as the algebra that reads back to them, are
written and read; a site is what differs from its source's, so that what no target changes is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rewrite import heads, site
from rewrite.data import digest
from rewrite.heads import Rewritten
from rewrite.mask import Mask, parse
from rewrite.site import Site

KNOWN: dict[str, type[Any]] = {
    name: kind
    for module in (site, heads)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and is_dataclass(kind)
}
"""Classes by name."""


def stored(made: Rewritten, source: Site) -> tuple[Any, dict[str, Tensor]]:
    """(what JSON holds, the tensors by name) of a rewritten site."""
    writer = _Writer()
    new = {f.name: getattr(made.site, f.name) for f in fields(Site)}
    changed = {n: v for n, v in new.items() if digest(v) != digest(getattr(source, n))} if made.site != source else {}
    parts = {f.name: getattr(made, f.name) for f in fields(Rewritten) if f.name != "site"}
    return writer.text({"site": changed, **parts}, ""), writer.tensors


def restored(text: Any, tensors: Mapping[str, Tensor], source: Site) -> Rewritten:
    """The inverse of `stored`; a site that did not change is the source's own object."""
    parts = _Reader(tensors).value(text)
    changed = parts.pop("site")
    return Rewritten(site=replace(source, **changed) if changed else source, **parts)


class _Writer:
    """Numbers tensors by the place where they are met first; one that stands in two places is one."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        self.alive: list[Any] = []

    def text(self, value: Any, at: str) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            return self._array(value, at)
        if isinstance(value, Mask):
            return {"is": "Mask", "has": {n: self.text(v, f"{at}.{n}") for n, v in _mask_parts(value, at).items()}}
        if is_dataclass(value) and not isinstance(value, type):
            inner = {f.name: self.text(getattr(value, f.name), f"{at}.{f.name}") for f in fields(value)}
            return {"is": type(value).__name__, "has": inner}
        if isinstance(value, dict):
            return {k: self.text(v, f"{at}.{k}") for k, v in cast("dict[str, Any]", value).items()}
        if isinstance(value, (tuple, list)):
            return [self.text(v, f"{at}.{i}") for i, v in enumerate(cast("tuple[Any, ...]", value))]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{at}: a {type(value).__name__} cannot be stored")

    def _array(self, value: Tensor | np.ndarray[Any, Any], at: str) -> Any:
        if id(value) not in self.names:
            name = at.strip(".")
            self.names[id(value)] = name
            self.alive.append(value)  # or its number could be given to another one
            held = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
            self.tensors[name] = narrowest(held.detach().cpu().contiguous())
        kind = str(value.dtype).removeprefix("torch.")
        return {"of": kind, "array" if isinstance(value, np.ndarray) else "tensor": self.names[id(value)]}


def _mask_parts(mask: Mask, at: str) -> dict[str, Any]:
    tables = {n: np.asarray(t) for n, t in mask.tables.items()}
    if parse(mask.text, tables).keep != mask.keep:
        raise TypeError(f"{at}: the mask {mask} cannot be stored, its algebra reads back as another one")
    return {"name": mask.name, "text": mask.text, "origin": mask.origin, "tables": tables}


def narrowest(value: Tensor) -> Tensor:
    """The same numbers in the smallest floating type that holds every one of them: what a target leaves as it was
    takes no more room than it did in the checkpoint."""
    if value.dtype != torch.float64:
        return value
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        small = value.to(kind)
        if torch.equal(small.double(), value):
            return small
    return value


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.made: dict[str, Any] = {}

    def value(self, text: Any) -> Any:
        if isinstance(text, list):
            return tuple(self.value(v) for v in cast("list[Any]", text))
        if not isinstance(text, dict):
            return text
        given = cast("dict[str, Any]", text)
        if given.get("is") == "Mask":
            parts = {k: self.value(v) for k, v in given["has"].items()}
            return Mask(parts["name"], parse(parts["text"], parts["tables"]).keep, parts["origin"], parts["tables"])
        if set(given) == {"is", "has"}:
            return KNOWN[given["is"]](**{k: self.value(v) for k, v in given["has"].items()})
        if "of" in given:
            return self._array(given)
        return {k: self.value(v) for k, v in given.items()}

    def _array(self, text: dict[str, Any]) -> Any:
        name = text.get("tensor") or text["array"]
        if name not in self.made:
            wide = self.tensors[name].to(getattr(torch, text["of"]))
            self.made[name] = wide if "tensor" in text else wide.numpy()
        return self.made[name]
