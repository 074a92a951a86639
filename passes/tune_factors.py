"""A site with low-rank projections, as something to learn: the factors, beside what other sites learn.

A projection's rows are up D (u - b) + c, u the rows of the source's projection and b its constant. D W is every matrix
of the latent that can matter: what W does not see of a token no output hangs on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from passes.mla_scene import Scene
from passes.tune_heads import HeadsTuned, Rows, matching, rows_of
from rewrite.heads import Factor, Factors, Heads, Rewritten


@dataclass(frozen=True)
class _Part:
    """One factored projection."""

    factor: Factor
    down: str
    """The name of what makes its latent"""
    reads: str
    """The projections whose rows that reads"""


@dataclass(frozen=True, eq=False)
class FactorsTuned(HeadsTuned):
    """Up-projections and latents in place of the maps of keys and values."""

    @cached_property
    def _parts(self) -> dict[str, _Part]:
        held = self.made.factors
        if held is None:
            raise ValueError(f"{self.made.site.name} has no factors")
        sides = {n: f for n, f in (("k", held.k), ("v", held.v)) if f is not None}
        return {n: _Part(f, *(("down", "kv") if held.shared else (f"down_{n}", n))) for n, f in sides.items()}

    def _started(self, name: str, new: Heads, old: Heads) -> dict[str, Tensor]:
        """up_k and up_v (rows, rank), down (rank, source rows) or one of each, and the constants."""
        if name not in self._parts:
            return super()._started(name, new, old)
        part = self._parts[name]
        out = {f"up_{name}": part.factor.up, part.down: matching(part.factor.down, self._read(part))}
        return out | ({} if new.bias is None else {f"{name}_bias": new.bias})

    def inputs(self, scene: Scene) -> dict[str, Tensor]:
        """What each tensor is multiplied with."""
        out = {n: x for n, x in super().inputs(scene).items() if n not in self._parts}
        for name, part in self._parts.items():
            out[part.down] = self._tokens(rows_of(scene), part)
            out[f"up_{name}"] = out[part.down] @ self.start[part.down].T
        return out

    def done(self, tensors: Mapping[str, Tensor]) -> Rewritten:
        """The result with these tensors."""
        # a latent's map of rows makes way for its map of inputs
        found = dict(tensors) | {p.down: tensors[p.down].double() @ self._read(p) for p in self._parts.values()}
        sides = {n: Factor(found[f"up_{n}"].double(), found[p.down]) for n, p in self._parts.items()}
        return replace(super().done(found), factors=Factors(sides.get("k"), sides.get("v")))

    def _projected(self, name: str, given: Rows, tensors: Mapping[str, Tensor]) -> Tensor:
        if name not in self._parts:
            return super()._projected(name, given, tensors)
        part = self._parts[name]
        rows = self._tokens(given, part) @ tensors[part.down].T @ tensors[f"up_{name}"].T
        return rows.unflatten(-1, (getattr(self.made.weights, name).weight.shape[0], -1)).transpose(1, 2)

    def _projection(self, name: str, new: Heads, old: Heads, found: Mapping[str, Tensor]) -> Heads:
        if name not in self._parts:
            return super()._projection(name, new, old, found)
        weight = found[f"up_{name}"] @ found[self._parts[name].down]
        return replace(new, weight=weight.view_as(new.weight), bias=found.get(f"{name}_bias"))

    def _read(self, part: _Part) -> Tensor:
        """(source rows, inputs) what a latent is made of."""
        return torch.cat([getattr(self.source, n).weight.flatten(0, 1) for n in part.reads])

    def _tokens(self, given: Rows, part: _Part) -> Tensor:
        """(b, tokens, source rows) the same on tokens."""
        rows: list[Tensor] = []
        for name in part.reads:
            u, bias = given["qkv".index(name)], getattr(self.source, name).bias
            rows.append((u if bias is None else u - bias.float()[:, None]).transpose(1, 2).flatten(2))
        return torch.cat(rows, -1)
