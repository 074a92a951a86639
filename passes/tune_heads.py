"""A site with fewer kv heads, as something to learn: its projections as maps of what the source's projections give.

u' = T u + c, u the rows of the source's projection, before norm and rope. A query head is made of its own source head,
a kv head of all of them, so that T W holds every matrix that can matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from codegen.eager import normed, rotated, scored
from passes.mla_scene import Scene
from passes.trial import uniform
from passes.tune_scene import RowScene, fused, fuses
from rewrite.heads import Heads, Rewritten, Weights
from rewrite.site import Sink, Site

Rows = tuple[Tensor, Tensor, Tensor]
"""(b, heads, tokens, d) of q, k and v as the source's projections give them."""


@dataclass(frozen=True, eq=False)
class HeadsTuned:
    """Maps and constants of the three projections, and the output projection."""

    made: Rewritten
    site: Site
    source: Weights

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The tensors as the closed form left them, float32: those of the projections, and out (outputs, h * dv)."""
        out: dict[str, Tensor] = {"out": self.made.weights.out.flatten(1)}
        if self.made.weights.out_bias is not None:
            out["out_bias"] = self.made.weights.out_bias
        for name, new, old in self._projections():
            out |= self._started(name, new, old)
        return {n: x.float() for n, x in out.items()}

    def _started(self, name: str, new: Heads, old: Heads) -> dict[str, Tensor]:
        """A projection's map, q (h, d, d), k and v (kv heads * d, source rows), and its constant."""
        if name == "q":
            old = _picked(old, self.made.order)
            maps = torch.stack([matching(a, b) for a, b in zip(new.weight, old.weight, strict=True)])
            there = None if old.bias is None else torch.einsum("hij,hj->hi", maps, old.bias)
        else:
            maps = matching(new.weight.flatten(0, 1), old.weight.flatten(0, 1))
            there = None if old.bias is None else (maps @ old.bias.flatten()).view(new.weight.shape[:2])
        return {name: maps} | ({} if there is None or new.bias is None else {f"{name}_bias": new.bias - there})

    def inputs(self, scene: Scene) -> dict[str, Tensor]:
        """What each tensor is multiplied with."""
        u_q, u_k, u_v = rows_of(scene)
        z = self._run(scene, self.start).transpose(1, 2).flatten(2)
        rows = {n: u.transpose(1, 2).flatten(2) for n, u in (("k", u_k), ("v", u_v))}
        return rows | {"q": u_q[:, list(self.made.order)], "out": z}

    def output(self, scene: Scene, tensors: Mapping[str, Tensor]) -> Tensor:
        """(b, t, outputs) of the attention."""
        y = self._run(scene, tensors).transpose(1, 2).flatten(2) @ tensors["out"].T
        return y + tensors["out_bias"] if "out_bias" in tensors else y

    def _run(self, scene: Scene, tensors: Mapping[str, Tensor]) -> Tensor:
        """(b, h, t, dv) of the heads."""
        site, order, kv_of = self.site, list(self.made.order), list(self.made.site.kv_of)
        q, k, v = self._heads(rows_of(scene), tensors)
        q = q if site.q.rope is None else rotated(site.q.rope, q, scene.at)
        k = k if site.k.rope is None else rotated(site.k.rope, k, scene.keys_at)
        factor = uniform(site.q.after) * uniform(site.k.after)
        k, v = (x.index_select(1, torch.tensor(kv_of, device=x.device)) for x in (k, v))
        if fuses(site):
            return fused(site, q * factor, k, v, scene.added)
        products = q @ k.transpose(-1, -2) * factor
        s_bhts = scored(site, products, mask=scene.added[:, order])
        if any(isinstance(m, Sink) for m in site.mods) and scene.sink is not None:
            p = torch.cat([s_bhts, scene.sink[:, order]], -1).softmax(-1)[..., :-1]
        else:
            p = torch.nan_to_num(s_bhts.softmax(-1))
        return p @ v

    def done(self, tensors: Mapping[str, Tensor]) -> Rewritten:
        """The result with these tensors."""
        found = {n: x.double() for n, x in tensors.items()}
        made = {name: self._projection(name, new, old, found) for name, new, old in self._projections()}
        out = found["out"].view_as(self.made.weights.out)
        weights = replace(self.made.weights, **made, out=out, out_bias=found.get("out_bias"))
        return replace(self.made, weights=weights)

    def _projection(self, name: str, new: Heads, old: Heads, found: Mapping[str, Tensor]) -> Heads:
        """`new` with what was found for it."""
        extra = found.get(f"{name}_bias")
        if name == "q":
            old = _picked(old, self.made.order)
            weight = torch.einsum("hij,hjx->hix", found[name], old.weight)
            bias = None if old.bias is None else torch.einsum("hij,hj->hi", found[name], old.bias)
        else:
            weight = (found[name] @ old.weight.flatten(0, 1)).view_as(new.weight)
            bias = None if old.bias is None else (found[name] @ old.bias.flatten()).view(new.weight.shape[:2])
        return replace(new, weight=weight, bias=bias if bias is None or extra is None else bias + extra)

    def _projections(self) -> tuple[tuple[str, Heads, Heads], ...]:
        return tuple((n, getattr(self.made.weights, n), getattr(self.source, n)) for n in "qkv")

    def _heads(self, given: Rows, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k, v) of the new heads, before the rope."""
        out: list[Tensor] = []
        for (name, new, _), operand in zip(self._projections(), (self.site.q, self.site.k, self.site.v), strict=True):
            x = self._projected(name, given, tensors)
            x = x + tensors[f"{name}_bias"][:, None] if f"{name}_bias" in tensors else x
            x = x if operand.norm is None else normed(operand.norm, x)
            out.append(x * new.gain.float()[:, None])
        return out[0], out[1], out[2]

    def _projected(self, name: str, given: Rows, tensors: Mapping[str, Tensor]) -> Tensor:
        """(b, heads, tokens, d) of a new projection, but for a constant."""
        u_q, u_k, u_v = given
        if name == "q":
            return torch.einsum("hij,bhtj->bhti", tensors["q"], u_q[:, list(self.made.order)])
        return _joined(u_k if name == "k" else u_v, tensors[name], self.made.weights.k.weight.shape[0])


def rows_of(scene: Scene) -> Rows:
    """The scene's rows of the projections."""
    if not isinstance(scene, RowScene):
        raise TypeError("heads are tuned on scenes with rows")
    return scene.rows


def _joined(u: Tensor, maps: Tensor, heads: int) -> Tensor:
    """(b, heads, s, d) of rows (b, g, s, d) under maps (heads * d, g * d)."""
    return (u.transpose(1, 2).flatten(2) @ maps.T).unflatten(-1, (heads, -1)).transpose(1, 2)


def matching(new: Tensor, old: Tensor) -> Tensor:
    """T with T @ old = new, of least size."""
    return new @ torch.linalg.pinv(old, rtol=1e-9)


def _picked(heads: Heads, order: Sequence[int]) -> Heads:
    pick = list(order)
    bias = None if heads.bias is None else heads.bias[pick]
    return Heads(heads.weight[pick], bias, heads.gain[pick])
