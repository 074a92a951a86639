"""A model of the chip: what a kernel may use of it, what a spec will use, and the tiles to begin with.

The compiler does not refuse a kernel that needs more shared memory than a block has; the launch would. So a spec is
held against the limit here, before it is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from codegen.spec import KernelSpec, chunks


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

_FORWARD = {64: Config(128, 128, 8, 3), 128: Config(128, 128, 8, 2), 192: Config(128, 64, 8, 2), 256: Config(128, 64, 8, 2)}
_DKDV = {64: Config(64, 128, 8, 2), 128: Config(64, 128, 8, 2), 192: Config(32, 64, 8, 1), 256: Config(32, 64, 8, 1)}
_DQ = {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 192: Config(64, 32, 8, 2), 256: Config(64, 32, 8, 2)}
_DECODE = {64: Config(16, 128, 4, 3), 128: Config(16, 128, 4, 2), 192: Config(16, 64, 4, 2), 256: Config(16, 64, 4, 2)}
_TABLES = {"forward": _FORWARD, "decode": _DECODE, "dkdv": _DKDV, "dq": _DQ}
_WIDE = {"forward": Config(64, 32, 8, 2), "decode": Config(16, 64, 8, 2), "dkdv": Config(16, 32, 8, 1), "dq": Config(16, 32, 8, 1)}


def width(spec: KernelSpec) -> int:
    """The columns that the wider of the two heads takes, chunks counted whole."""
    return max(sum(c.size for c in chunks(dim)) for dim in (spec.dqk, spec.dv))


def default(spec: KernelSpec) -> Config:
    """Tiles, warps and stages to begin with: measured on sm_90 for 16 bits, half the keys for 32."""
    if spec.phase in ("combine", "delta"):
        return Config(16 if spec.phase == "combine" else 64, 16, 4, 1)
    table = _TABLES[spec.phase]
    wide = [size for size in table if size >= width(spec)]
    config = table[min(wide)] if wide else _WIDE[spec.phase]
    if spec.dtype == "fp32":
        config = Config(max(16, config.rows // 2), max(16, config.keys // 2), config.warps, 1)
    return config


def shared(spec: KernelSpec) -> int:
    """Bytes of shared memory: the tile that stays, and the tiles that are read ahead, as the compiler lays them out."""
    rows, keys = spec.tiles
    key_bytes = sum(c.size for c in chunks(spec.dqk)) * spec.bytes
    value_bytes = sum(c.size for c in chunks(spec.dv)) * spec.bytes
    if spec.phase in ("combine", "delta"):
        return 0
    if spec.phase == "dkdv":
        return keys * (key_bytes + value_bytes) + spec.stages * rows * (key_bytes + value_bytes + 8)
    resident = rows * (key_bytes + (value_bytes if spec.phase == "dq" else 0))
    return resident + spec.stages * keys * (key_bytes + (0 if spec.latent else value_bytes))


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
