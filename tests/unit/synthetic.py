"""Sites, programs and reports made by hand: for tests of what prints, which need no model."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch

from rewrite.mask import all_, causal
from rewrite.program import Program
from rewrite.site import Affine, Dense, Grouped, Operand, Output, Proof, Root, Site

PROOF = Proof(errors=((1.0, 3e-7), (100.0, 5e-7)), lengths=(10,), region="0123456789abcdef")


def operand(name: str, heads: int, dim: int, columns: int) -> Operand:
    starts = np.arange(heads * dim, dtype=np.int64) * columns
    root = Root(f"{name}.weight", starts, 1, columns, source="norm", module=name)
    return Operand((root,), np.arange(heads * dim).reshape(heads, dim), Affine(np.ones((heads, dim))))


def site(name: str, heads: int = 6, kv_heads: int | None = None, dim: int = 32, *, encoder: bool = False) -> Site:
    held = kv_heads or heads
    width = heads * dim
    out = Root(f"{name}.o_proj.weight", np.arange(width, dtype=np.int64) * width, 1, width, module=f"{name}.o_proj")
    return Site(
        name=name,
        q=operand(f"{name}.q_proj", heads, dim, width),
        k=operand(f"{name}.k_proj", held, dim, width),
        v=operand(f"{name}.v_proj", held, dim, width),
        heads=heads,
        kv_of=tuple(h * held // heads for h in range(heads)),
        form=Dense(heads) if held == heads else Grouped(held),
        mask=all_ if encoder else causal,
        scale=(dim**-0.5,),
        mods=(),
        out=Output(out, np.arange(width).reshape(heads, dim)),
        cross=False,
        proof=PROOF,
        where="modeling_x.py:212",
    )


@dataclass(frozen=True)
class Halve:
    """A target for tests: so many kv heads, if they divide."""

    name: ClassVar[str] = "halve"
    needs: ClassVar[frozenset[str]] = frozenset()
    kv_heads: int

    def refuse(self, s: Site) -> str | None:
        if s.kv_heads % self.kv_heads:
            return f"{s.kv_heads} kv heads do not split into {self.kv_heads} equal groups; possible: 1, 2, 3, 6"
        return None

    def after(self, s: Site) -> Site:
        small = site(s.name, s.heads, self.kv_heads, s.k.dim)
        return replace(small, mask=s.mask)


class Model(torch.nn.Module):
    """Parameters without a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.empty(1_000_000, dtype=torch.bfloat16))

    def can_generate(self) -> bool:
        return True


def program() -> Program:
    graph = SimpleNamespace(graph=SimpleNamespace(nodes=range(214)))
    return Program(Model(), graph, None, None, (), {})  # type: ignore[arg-type]


def found(*sites: Site, refused: tuple[object, ...] = ()) -> SimpleNamespace:
    """What the finder would give, without its types, which need a graph."""
    return SimpleNamespace(sites=sites, regions=(), refused=refused)
