"""A model of the chip: what a kernel may use of it, what a spec will use, and the tiles to begin with.

The compiler does not refuse a kernel that needs more shared memory than a block has; the launch would. So a spec is
held against the limit here, before it is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from codegen.spec import SMALLEST, KernelSpec, chunks


class Config(NamedTuple):
    """How a computation is cut up: rows of a query tile, keys of a key tile, warps, stages of the pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Chip:
    """Shared memory of a block in bytes, registers of a thread, multiprocessors."""

    name: str
    shared: int
    registers: int
    processors: int


HOPPER = Chip("sm_90", 232_448, 255, 132)
INSTINCT = Chip("gfx942", 65_536, 512, 304)

_FORWARD = {
    64: (128, 128, 8, 3),
    128: (128, 64, 8, 3),
    192: (128, 64, 8, 2),
    256: (128, 64, 8, 2),
    1024: (64, 32, 8, 2),
}
_FEW = {64: (64, 128, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2), 1024: (64, 32, 8, 2)}
_DECODE = {64: (16, 128, 4, 3), 128: (16, 128, 4, 2), 256: (16, 64, 4, 2), 1024: (16, 64, 8, 2)}
_DKDV = {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 192: (32, 64, 8, 2), 256: (32, 32, 8, 2), 1024: (16, 16, 8, 1)}
_DQ = {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2), 1024: (16, 16, 8, 1)}
_TABLES = {"dkdv": _DKDV, "dq": _DQ}
_BIASED = {"dkdv": (32, 64, 8, 2), "dq": (64, 32, 8, 2)}
_INSTINCT = {
    "forward": {128: (128, 32, 4, 1), 256: (64, 32, 4, 1), 1024: (16, 16, 4, 1)},
    "dkdv": {128: (32, 64, 4, 1), 256: (16, 32, 4, 1), 1024: (16, 16, 4, 1)},
    "dq": {128: (64, 32, 4, 1), 256: (32, 16, 4, 1), 1024: (16, 16, 4, 1)},
}
_COARSE = {64: (128, 128, 8, 3), 128: (128, 128, 8, 3), 256: (128, 64, 8, 2), 1024: (64, 32, 8, 2)}
COARSE_KEYS = 32
"""Groups of keys in the smallest tile of coarse scores."""
FEW_ROWS = 64
"""Up to so many rows (queries x heads of a group) a query tile is cut to what there is."""


def width(spec: KernelSpec) -> int:
    """The columns that the wider of the two heads takes, chunks counted whole."""
    return max(sum(c.size for c in chunks(dim)) for dim in (spec.dqk, spec.dv))


def default(spec: KernelSpec, rows: int, on: Chip = HOPPER) -> Config:
    """Tiles, warps and stages to begin with for `rows` rows of queries, smaller for 32 bits than for 16."""
    if spec.phase in ("combine", "delta"):
        return Config(16 if spec.phase == "combine" else 64, 16, 4, 1)
    if spec.phase in ("antidiagonal", "mass", "means", "columns"):
        return _coarse(spec, rows, on)
    if on is INSTINCT:
        return _instinct(spec, rows)
    table = _TABLES.get(spec.phase) or (_FORWARD if rows > FEW_ROWS else _FEW if rows > 32 else _DECODE)
    config = Config(*table[min(size for size in table if size >= width(spec))])
    if spec.phase == "decode" and len(chunks(spec.dqk)) > 1:
        config = config._replace(keys=max(16, config.keys // 2))
    if spec.bias:
        config = _biased(spec, config)
    elif spec.modified and spec.phase == "dq" and width(spec) <= 128:
        config = config._replace(keys=32)
    if spec.phase in ("forward", "decode") and rows <= 32:
        config = config._replace(rows=16 if rows <= 16 else 32, keys=config.keys if rows <= 16 else config.keys // 2)
    if spec.dtype == "fp32":
        config = config._replace(rows=max(16, config.rows // 2), keys=max(16, config.keys // 2), stages=1)
    return config


def _coarse(spec: KernelSpec, rows: int, on: Chip) -> Config:
    """Tiles of the kernels that score blocks and columns."""
    least = max(SMALLEST, 1 << max(0, rows - 1).bit_length())
    if spec.phase == "mass":
        return Config(16, 64, 4, 1)
    if spec.phase == "means":
        return Config(min(64, least), 16, 4, 1)
    if spec.phase == "columns":
        return Config(least, least, 4 if least <= 64 and spec.dtype != "fp32" else 8, 1)
    config = Config(*_COARSE[min(size for size in _COARSE if size >= width(spec))])
    if on is INSTINCT:
        config = Config(64, 32, 4, 1)
    elif spec.dtype == "fp32":
        config = Config(32, 64, 8, 1)
    return config._replace(rows=min(config.rows, least))


def _instinct(spec: KernelSpec, rows: int) -> Config:
    table = _INSTINCT[spec.phase if spec.phase in ("dkdv", "dq") else "forward"]
    config = Config(*table[min(size for size in table if size >= width(spec))])
    if spec.phase in ("forward", "decode") and rows <= FEW_ROWS:
        config = config._replace(rows=max(16, min(config.rows, 1 << max(0, rows - 1).bit_length())))
    half = 2 if spec.dtype == "fp32" or spec.bias else 1
    return config._replace(rows=max(16, config.rows // half), keys=max(16, config.keys // half))


def _biased(spec: KernelSpec, config: Config) -> Config:
    """A bias is read pair by pair, by addresses that fill registers: smaller tiles."""
    if spec.phase in _BIASED:
        small = Config(*_BIASED[spec.phase])
        return small._replace(rows=min(small.rows, config.rows), keys=min(small.keys, config.keys))
    return config._replace(rows=min(config.rows, 64 if width(spec) > 64 else 128), keys=min(config.keys, 32))


def shared(spec: KernelSpec) -> int:
    """Bytes of shared memory: the tile that stays and those that are read ahead.

    Products of 64 rows and more read their operands from shared memory; smaller ones go by registers, which takes one
    tile less, and a conversion of the weights.
    """
    if spec.phase in ("combine", "delta"):
        return 0
    rows, keys = spec.tiles
    key_bytes = sum(c.size for c in chunks(spec.dqk)) * spec.bytes
    value_bytes = 0 if spec.latent else sum(c.size for c in chunks(spec.dv)) * spec.bytes
    stays, moves = (keys, rows) if spec.phase == "dkdv" else (rows, keys)
    ahead = spec.stages if stays >= 64 else max(1, spec.stages - 1)
    resident = stays * (key_bytes + (value_bytes if spec.phase in ("dq", "dkdv") else 0))
    extra = (spec.stages - 1) * rows * 8 if spec.phase == "dkdv" else 0
    extra += rows * keys * spec.bytes if stays < 64 else 0
    extra += rows * keys * spec.bytes * max(1, spec.stages - 1) if spec.bias else 0
    return resident + ahead * moves * (key_bytes + value_bytes) + extra


def refuse(spec: KernelSpec, chip: Chip = HOPPER) -> str | None:
    """Why the chip cannot run the kernel, or None."""
    needed = shared(spec)
    if needed <= chip.shared:
        return None
    rows, keys = spec.tiles
    return (
        f"tiles of {rows}x{keys} with {spec.stages} stages need about {needed:,} bytes of shared memory, "
        f"and a block on {chip.name} has {chip.shared:,}: fewer stages or keys would fit"
    )
