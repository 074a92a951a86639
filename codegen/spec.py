"""A `KernelSpec` is everything that a generated kernel's text depends on; equal specs emit equal text.

Lengths, strides, the scale and a softcap's size are arguments of the kernel, so one kernel serves every length.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Literal

from rewrite.mask import Mask, all_

Phase = Literal[
    "forward", "decode", "combine", "delta", "dkdv", "dq", "antidiagonal", "mass", "means", "columns", "listk", "listq"
]
DType = Literal["fp16", "bf16", "fp32"]

BYTES: dict[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
TRITON: dict[str, str] = {"fp16": "tl.float16", "bf16": "tl.bfloat16", "fp32": "tl.float32"}
SMALLEST = 16
"""The fewest columns a matrix product may have."""


@dataclass(frozen=True)
class Chunk:
    """Columns `first .. first + size` of a head, `size` a power of two; those from `end` on do not exist."""

    first: int
    size: int
    end: int

    @property
    def ragged(self) -> bool:
        """Some of its columns do not exist."""
        return self.first + self.size > self.end


def chunks(dim: int) -> tuple[Chunk, ...]:
    """A head of `dim` as power-of-two chunks, the largest first: 96 = 64 + 32, 192 = 128 + 64, 72 = 64 + 16."""
    found: list[Chunk] = []
    first = 0
    while first < dim:
        size = max(SMALLEST, 1 << ((dim - first).bit_length() - 1))
        found.append(Chunk(first, size, dim))
        first += size
    return tuple(found)


def leads(dv: int, dqk: int) -> bool:
    """Whether a head of `dv` is the first chunks of a head of `dqk`."""
    ours, theirs = ([(c.first, c.size) for c in chunks(dim)] for dim in (dv, dqk))
    return dv <= dqk and ours == theirs[: len(ours)]


@dataclass(frozen=True)
class KernelSpec:
    """One kernel. `mask` is a pattern (codegen/loops.py): what tables hold is an argument.

    phase: forward reads all keys of a query tile; decode a share of them, and combine merges the shares; delta, dkdv
    and dq are the backward pass; antidiagonal, mass, means and columns score blocks of `block` tokens in groups of
    `stride`, or columns (codegen/triton_coarse.py); listk and listq list tiles (codegen/triton_lists.py). `dqk`, `dv`:
    head dims of queries with keys, and of values. `group`: query heads of a kv head; `packed`: the rows of a tile are
    (query, head of the group). `latent`: values are the first `dv` columns of the keys, which are read once. `tiles`:
    rows of a query tile, keys of a key tile.
    `upcast`: multiply in fp32 (the interpreter cannot multiply bf16).
    """

    phase: Phase
    dtype: DType
    dqk: int
    dv: int
    mask: Mask = all_
    group: int = 1
    packed: bool = False
    latent: bool = False
    softcap: bool = False
    alibi: bool = False
    bias: bool = False
    dbias: bool = False
    sinks: bool = False
    lengths: bool = False
    tiles: tuple[int, int] = (64, 64)
    warps: int = 4
    stages: int = 2
    upcast: bool = False
    block: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        reason = _refuse(self)
        if reason is not None:
            raise ValueError(reason)

    def __str__(self) -> str:
        """One line: the phase, then what differs from a plain kernel."""
        parts = [self.phase, self.dtype]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value is True:
                parts.append(field.name)
            elif field.name == "tiles":
                parts.append(f"tiles={value[0]}x{value[1]}")
            elif value is not False and (value != field.default or field.name in ("warps", "stages", "mask")):
                parts.append(f"{field.name}={value}".replace(" ", ""))
        return " ".join(parts)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits: specs differ exactly where these do."""
        text = f"{self} {self.mask.keep} {sorted(self.mask.tables)}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """The kernel's function, and its file in the cache."""
        return f"{self.phase}_{self.dtype}_{self.dqk}_{self.dv}_{self.digest}"

    @property
    def bytes(self) -> int:
        """Of one element of queries, keys and values."""
        return BYTES[self.dtype]

    @property
    def cells(self) -> int:
        """Groups of a block."""
        return self.block // self.stride

    @property
    def modified(self) -> bool:
        """Scores are more than a scaled product."""
        return self.softcap or self.alibi or self.bias

    def with_config(self, config: tuple[int, int, int, int]) -> KernelSpec:
        """The same computation in the tiles, warps and stages of a `Config`."""
        return self.with_tiles(config[:2], *config[2:])

    def with_tiles(self, tiles: tuple[int, int], warps: int, stages: int) -> KernelSpec:
        """The same computation in other tiles."""
        return replace(self, tiles=tiles, warps=warps, stages=stages)


def _refuse(spec: KernelSpec) -> str | None:
    rows, keys = spec.tiles
    if any(n < SMALLEST or n & (n - 1) for n in (rows, keys)):
        return f"tiles are powers of two of at least {SMALLEST}, and these are {rows}x{keys}"
    if spec.latent and not leads(spec.dv, spec.dqk):
        return f"values cannot be the first {spec.dv} columns of keys that have {spec.dqk}, which are cut elsewhere"
    if spec.phase in ("antidiagonal", "mass") and (spec.block % spec.stride or keys % spec.cells):
        return f"blocks of {spec.block} in groups of {spec.stride} do not divide tiles of {keys} groups"
    if spec.phase == "columns" and rows != keys:
        return f"diagonals of {rows} queries need tiles of as many keys, and these have {keys}"
    if spec.dbias and spec.phase != "dq":
        return f"the gradient of a bias is written by dq, not by {spec.phase}"
    return None


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel: its name, its Triton type, and whether Triton may rely on a multiple of 16.

    `varies`: a number that changes from call to call, for whose values there shall be no kernels of their own.
    """

    name: str
    type: str
    aligned: bool = False
    varies: bool = False


def number(name: str, type: str = "i32") -> Argument:
    """A length, a count or a size."""
    return Argument(name, type, varies=True)
