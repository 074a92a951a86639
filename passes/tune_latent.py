"""A site that caches a latent, as something to learn: how the latent is made and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from codegen.latent import expanded
from passes.mla_scene import Scene
from passes.tune_scene import fused, fuses
from rewrite.heads import Latents, Rewritten

LEARNT = ("down", "turn", "read", "query_turn", "up_v", "up_k")


@dataclass(frozen=True, eq=False)
class LatentTuned:
    """The tensors of `Latents` and the output projection."""

    made: Rewritten

    @property
    def _latents(self) -> Latents:
        if self.made.latents is None:
            raise ValueError(f"{self.made.site.name} has no latents")
        return self.made.latents

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The tensors as the closed form left them, float32. In the rebuilt form nothing is read but keys."""
        held, weights = self._latents, self.made.weights
        given = {n: getattr(held, n) for n in LEARNT if isinstance(getattr(held, n), Tensor)}
        if held.up_k is not None:
            given = {n: x for n, x in given.items() if n not in ("read", "turn", "query_turn")}
        given |= {"out": weights.out.flatten(1)} | ({} if weights.out_bias is None else {"out_bias": weights.out_bias})
        return {n: x.float() for n, x in given.items() if x.numel()}

    def inputs(self, scene: Scene) -> dict[str, Tensor]:
        """What each tensor is multiplied with."""
        c = scene.y @ self._latents.down.to(scene.y).T
        z = _heads(scene, self._latents).transpose(1, 2).flatten(2)
        rows = {"down": scene.y, "turn": scene.y, "read": scene.q, "query_turn": scene.q, "up_v": c, "up_k": c}
        return {n: x for n, x in (rows | {"out": z}).items() if n in self.start}

    def output(self, scene: Scene, tensors: Mapping[str, Tensor]) -> Tensor:
        """(b, t, outputs) of the attention."""
        z = _heads(scene, replace(self._latents, **{n: tensors[n] for n in LEARNT if n in tensors}))
        y = z.transpose(1, 2).flatten(2) @ tensors["out"].T
        return y + tensors["out_bias"] if "out_bias" in tensors else y

    def done(self, tensors: Mapping[str, Tensor]) -> Rewritten:
        """The result with these tensors."""
        found = {n: x.double() for n, x in tensors.items()}
        latents = replace(self._latents, **{n: found[n] for n in LEARNT if n in found})
        bias = found.get("out_bias")
        out = found["out"].view_as(self.made.weights.out)
        weights = replace(self.made.weights, out=out, out_bias=bias)
        return replace(self.made, weights=weights, latents=latents)


def _heads(scene: Scene, latents: Latents) -> Tensor:
    """(b, h, t, dv) the heads' outputs, by the fused kernel where it serves."""
    if not fuses(scene.site):
        return scene.heads(latents)
    y = scene.y if latents.key_norm is None else scene.raw
    return fused(scene.site, *expanded(latents, scene.site, scene.q, y, scene.keys_at, scene.at), scene.added)
