"""Tiles by measurement on the GPU at hand, kept on disk by chip and kernel."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from codegen import chip
from codegen.chip import Config
from codegen.compiled import cache
from codegen.spec import KernelSpec

_MANY = (
    (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3),
    (128, 32, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
)  # fmt: skip
_FEW = ((128, 4, 2), (128, 4, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 2, 3), (128, 8, 2), (32, 4, 4), (256, 8, 2))
_DKDV = (
    (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (32, 128, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3),
    (64, 64, 8, 2), (128, 64, 8, 2), (128, 128, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 2),
)  # fmt: skip


def candidates(spec: KernelSpec, rows: int) -> list[Config]:
    """The default tiles and those worth measuring beside them that fit the chip."""
    first = chip.default(spec, rows, chip.INSTINCT if torch.version.hip else chip.HOPPER)
    if spec.phase in ("combine", "delta"):
        return [first]
    if spec.phase == "dkdv":
        found = [Config(*c) for c in _DKDV]
    elif spec.phase == "dq" or rows > chip.FEW_ROWS:
        found = [Config(*c) for c in _MANY]
    else:
        found = [Config(first.rows, *c) for c in _FEW]
    fits = [c for c in found if chip.refuse(spec.with_config(c)) is None]
    return list(dict.fromkeys([first, *fits]))


def bucket(rows: int) -> int:
    """What rows of queries mean for tiles: 16, 32, 64, or more."""
    return next((size for size in (16, 32, chip.FEW_ROWS) if rows <= size), chip.FEW_ROWS + 1)


def _key(spec: KernelSpec, rows: int) -> str:
    return f"{spec.with_tiles((16, 16), 1, 1).name}_{bucket(rows)}"


def _file() -> Path:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return cache() / "tuned" / f"{name.replace(' ', '-')}.json"


@lru_cache(maxsize=1)
def _stored() -> dict[str, Config]:
    path = _file()
    return {k: Config(*v) for k, v in json.loads(path.read_text()).items()} if path.exists() else {}


def tuned(spec: KernelSpec, rows: int) -> Config | None:
    """What was measured to be fastest here, None where nothing was."""
    return _stored().get(_key(spec, rows)) if _stored() else None


def store(spec: KernelSpec, rows: int, config: Config) -> None:
    """Keeps a choice for later processes."""
    path = _file()
    _stored.cache_clear()
    found = {**_stored(), _key(spec, rows): config}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    os.replace(file.name, path)
    _stored.cache_clear()


def fastest(
    spec: KernelSpec,
    rows: int,
    run: Callable[[Mapping[str, Config]], Any],
    clock: Callable[[Callable[[], Any]], float],
    others: Mapping[str, Config],
) -> Config:
    """The best tiles of one phase by running a computation in each; what does not compile or fit is passed over."""
    times: dict[Config, float] = {}
    for config in candidates(spec, rows):
        configs = {**others, spec.phase: config}
        try:
            run(configs)
            times[config] = clock(lambda configs=configs: run(configs))
        except Exception as error:
            if not _too_large(error):
                raise
    if not times:
        raise RuntimeError(f"none of the tiles for {spec} runs on this chip")
    return min(times, key=lambda c: times[c])


def _too_large(error: Exception) -> bool:
    """Triton's word for a kernel that needs more than a block has, whose class moved between versions."""
    return type(error).__name__ in ("OutOfResources", "PTXASError")
