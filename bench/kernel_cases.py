"""What generated kernels are tried on: cases of shape, type, mask and modifiers, and their inputs.

A case is one line of text, from which its random inputs follow. Tensors are slices of larger ones that hold NaN, and so
is what lengths call padding: what a kernel reads beside its due shows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from codegen.options import Options
from codegen.spec import DType
from rewrite import mask as masks
from rewrite.mask import Mask

DTYPES: dict[DType, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MODIFIERS = ("softcap", "alibi", "bias", "row-bias", "sinks")
"""bias: a number a head, query and key; row-bias: a number a key and batch row, with -inf among them."""


@dataclass(frozen=True)
class Case:
    """One attention: `heads` of queries and keys, `sizes` batch, queries, keys; `latent`: values are keys' columns."""

    phase: str
    dtype: DType
    dims: tuple[int, int]
    heads: tuple[int, int]
    sizes: tuple[int, int, int]
    mask: str
    modifiers: tuple[str, ...] = ()
    lengths: bool = False
    latent: bool = False

    def __str__(self) -> str:
        """The case on a line."""
        text = f"{self.phase} {self.dtype} d={self.dims[0]}/{self.dims[1]} heads={self.heads[0]}/{self.heads[1]}"
        text += f" sizes={'x'.join(map(str, self.sizes))} {self.mask}"
        more = [*self.modifiers, *(["lengths"] if self.lengths else []), *(["latent"] if self.latent else [])]
        return " ".join([text, *more])

    @property
    def seed(self) -> int:
        """Of the inputs."""
        return zlib.crc32(str(self).encode())


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a case runs on."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    mask: Mask
    options: Options


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """The tensors of a case, seeded by its text."""
    make = torch.Generator().manual_seed(case.seed)
    (batch, queries, keys), (heads, kv_heads), (dim, dv) = case.sizes, case.heads, case.dims
    lengths = _lengths(case, make) if case.lengths else None
    spans = list(zip(*(x.tolist() for x in lengths), strict=True)) if lengths else [(queries, keys)] * batch
    of_q, of_k = [t for t, _ in spans], [s for _, s in spans]
    dtype = DTYPES[case.dtype]
    q = _tensor(make, of_q, heads, queries, dim, dtype, device)
    k = _tensor(make, of_k, kv_heads, keys, dim, dtype, device)
    v = k[..., :dv] if case.latent else _tensor(make, of_k, kv_heads, keys, dv, dtype, device)
    grad = _tensor(make, of_q, heads, queries, dv, dtype, device)
    made = {name: value.to(device) for name, value in _modifiers(case, make, dtype).items()}
    on = tuple(x.to(device) for x in lengths) if lengths else None
    softcap = 1.5 if "softcap" in case.modifiers else None
    options = Options(scale=dim**-0.5, softcap=softcap, lengths=(on[0], on[1]) if on else None, **made)
    return Inputs(q, k, v, grad, mask_of(case), options)


def _lengths(case: Case, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """One row whole, the others shorter; the last one has no keys where it has no queries to need them."""
    batch, queries, keys = case.sizes
    of_q = torch.randint(1, queries + 1, (batch,), generator=make, dtype=torch.int32)
    of_k = torch.randint(1, keys + 1, (batch,), generator=make, dtype=torch.int32)
    of_q[0], of_k[0] = queries, keys
    if batch > 2:
        of_q[-1] = 0
    return of_q, of_k


def _tensor(
    make: torch.Generator, tokens: list[int], heads: int, longest: int, dim: int, dtype: torch.dtype, device: str
) -> Tensor:
    """(batch, heads, longest, dim) as a slice of (batch, tokens, heads, dim), NaN wherever no token is."""
    room = torch.full((len(tokens), longest + 2, heads, dim), torch.nan, dtype=dtype)
    for row, count in enumerate(tokens):
        room[row, 1 : 1 + count] = torch.randn(count, heads, dim, generator=make).to(dtype)
    return room.to(device)[:, 1 : 1 + longest].transpose(1, 2)


def _modifiers(case: Case, make: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    (batch, queries, keys), heads = case.sizes, case.heads[0]
    made: dict[str, Tensor] = {}
    if "alibi" in case.modifiers:
        made["slopes"] = 2.0 ** -torch.arange(1, heads + 1).float()
    if "sinks" in case.modifiers:
        made["sinks"] = torch.randn(heads, generator=make)
    if "bias" in case.modifiers:
        made["bias"] = torch.randn(1, heads, queries, keys, generator=make).to(dtype).requires_grad_()
    if "row-bias" in case.modifiers:
        bias = torch.randn(batch, 1, 1, keys, generator=make).to(dtype)
        made["bias"] = bias.masked_fill(torch.rand(bias.shape, generator=make) < 0.2, -torch.inf)
    return made


def _block_list(case: Case) -> Mask:
    """A list of blocks of 16 x 16, a third of them, and the diagonal for most rows."""
    random = Random(case.seed)
    rows, columns = (-(-n // 16) for n in case.sizes[1:])
    table = torch.tensor(
        [[[random.random() < 0.4 for _ in range(columns)] for _ in range(rows)] for _ in range(case.heads[0])]
    )
    return masks.blocks(table.numpy(), 16)


def mask_of(case: Case) -> Mask:
    """The mask that the case names."""
    keys, heads = case.sizes[2], case.heads[0]
    return {
        "all": lambda: masks.all_,
        "causal": lambda: masks.causal,
        "top-left": lambda: masks.causal_top_left,
        "window": lambda: masks.causal & masks.window(21),
        "sink|window": lambda: masks.causal & (masks.sink(5) | masks.window(19)),
        "around": lambda: masks.around(13),
        "prefix": lambda: masks.causal | masks.prefix(11),
        "chunk": lambda: masks.causal & masks.chunk(24),
        "strided": lambda: masks.causal & (masks.window(7) | masks.strided(6)),
        "dilated": lambda: masks.causal & masks.dilated(40, 3),
        "grid": lambda: masks.neighbourhood((3, 5), (9, 11)),
        "documents": lambda: masks.causal & masks.documents([keys // 3, keys // 2, keys - keys // 3 - keys // 2]),
        "diagonal": lambda: masks.blocks_diagonal(20),
        "longformer": lambda: masks.longformer(4, 9),
        "streaming": lambda: masks.streaming([3] * heads, [None if i % 2 else 17 for i in range(heads)]),
        "blocks": lambda: _block_list(case),
        "blocks&causal": lambda: masks.causal & _block_list(case),
        "negated": lambda: ~(masks.causal & masks.window(15)),
    }[case.mask]()


MASKS = (
    "all", "causal", "top-left", "window", "sink|window", "around", "prefix", "chunk", "strided", "dilated", "grid",
    "documents", "diagonal", "longformer", "streaming", "blocks", "blocks&causal", "negated",
)  # fmt: skip
DIMS = ((64, 64), (128, 128), (32, 32), (96, 96), (80, 80), (192, 128), (256, 256), (72, 40), (64, 128), (16, 48))
HEADS = ((2, 2), (4, 2), (4, 1), (6, 2), (7, 1), (1, 1))


def _sizes(phase: str, random: Random) -> tuple[int, int, int]:
    batch = random.choice((1, 2, 3))
    if phase == "decode":
        return batch, random.choice((1, 1, 2, 3)), random.choice((40, 97, 128, 161))
    queries = random.choice((33, 48, 64, 75))
    return batch, queries, random.choice((queries, queries, queries + 29, 96, 50))


def _draw(phase: str, mask: str, random: Random) -> Case:
    modifiers = random.sample(MODIFIERS, random.choice((0, 0, 1, 2)))
    if "bias" in modifiers and "row-bias" in modifiers:
        modifiers.remove("bias")
    dtype: DType = random.choice(("fp16", "fp16", "fp32", "bf16"))
    sizes, heads = _sizes(phase, random), random.choice(HEADS)
    if mask == "grid":
        sizes = (sizes[0], sizes[1], 99)
    return Case(phase, dtype, random.choice(DIMS), heads, sizes, mask, tuple(sorted(modifiers)), random.random() < 0.35)


def table() -> list[Case]:
    """Every case: each phase with each mask four times, all else drawn; then plain ones of all dims, and latent."""
    random = Random(0)
    found = [
        _draw(phase, mask, random) for mask in MASKS for phase in ("prefill", "decode", "backward") for _ in range(4)
    ]
    for phase in ("prefill", "backward"):
        found += [Case(phase, "fp16", dims, (4, 2), (1, 40, 56), "causal") for dims in DIMS]
    latent = Case("decode", "fp16", (576, 512), (8, 1), (2, 1, 70), "causal", latent=True)
    found += [latent, replace(latent, heads=(16, 1), sizes=(1, 2, 90), mask="window"), replace(latent, dtype="fp32")]
    found += [replace(latent, phase="prefill", sizes=(1, 40, 40), heads=(2, 1), dims=(80, 64))]
    return list(dict.fromkeys(found))
