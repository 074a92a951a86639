"""Gains and shifts of an operand as `constant + factor * parameter[index]`, by altering the parameters behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, fx

from passes.canonicalise import Graph
from passes.find.bits import spell
from passes.find.decode import Turn
from passes.find.draw import Draw
from passes.find.matrix import LARGE, Matrix
from passes.find.roots import NotLifted
from rewrite.site import Affine, FloatArray

TIGHT = 1e-7
Values = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Weighed:
    """The operand's block as a function of root outputs and of the parameters that act on it, and what is known."""

    letter: str
    run: Callable[[Tensor, Sequence[Tensor]], Tensor]
    u: Tensor
    """Root outputs (positions, rows), large where a norm follows."""
    at: Tensor
    matrix: Matrix
    turn: Turn

    @property
    def gain_is_after(self) -> bool:
        """The gains stand after the rotation."""
        return bool((self.turn.after != 1).any())

    def centred(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """What the norm divides (h, t, d) and the mean square it divides by (h, t)."""
        x = u[self.at]
        mine = x[:, self.turn.rows].permute(1, 0, 2)
        if self.matrix.kind is None or self.matrix.group is None:
            return mine, torch.ones(mine.shape[:2], dtype=u.dtype)
        weight = self.matrix.group.to(u.dtype) / self.matrix.group.sum(1, keepdim=True)
        mean = weight @ x.T if self.matrix.kind == "layer" else torch.zeros(len(weight), len(x), dtype=u.dtype)
        return mine - mean[..., None], weight @ x.T.square() - mean.square()

    @cached_property
    def normed(self) -> Tensor:
        """n(u) (h, t, d), at a size where the eps vanishes."""
        top, square = self.centred(self.u)
        return top / square.sqrt()[..., None]

    def halves(self, weights: Sequence[Tensor], size: float = 1.0) -> tuple[Tensor, Tensor]:
        """Odd and even part (h, t, d) at u and -u, without the token factor."""
        up, down = self.run(self.u * size, weights), self.run(-self.u * size, weights)
        even = (up + down) / 2
        even = torch.where(even.abs() <= 1e-11 * up.abs().max(), 0.0, even)
        token = self.turn.token[:, None]
        return (up - even) / token, even / token

    def gain(self, weights: Sequence[Tensor]) -> Tensor:
        """(h, d): the gain before, or after, the rotation."""
        odd, _ = self.halves(weights)
        x = self.normed
        if self.gain_is_after:
            x = self.turn.turn(self.turn.gain[:, None] * x)
        else:
            odd = self.turn.turn(odd, back=True)
        return (odd * x).sum(1) / x.square().sum(1)

    def shift(self, weights: Sequence[Tensor]) -> Tensor:
        """(h, d): what is added before the rotation."""
        _, even = self.halves(weights)
        after = self.gain(weights) if self.gain_is_after else self.turn.after
        back = self.turn.turn(even / after[:, None], back=True)
        if (back - back[:, :1]).abs().max() > 1e-7 * max(1.0, float(back.abs().max())):
            raise NotLifted(f"a vector that depends on the position is added to {self.letter} after the projection")
        return back.mean(1)

    def eps(self, weights: Sequence[Tensor]) -> float:
        """Of the norm: what small inputs show beside their mean square."""
        small = 1e-4 / LARGE
        odd, _ = self.halves(weights, small)
        top, square = self.centred(self.u * small)
        linear = self.turn.after[:, None] * self.turn.turn(self.turn.gain[:, None] * top)
        seen = odd.abs() > 1e-3 * odd.abs().median()
        ratio = torch.where(seen, linear / odd, torch.nan).square() - square[..., None]
        value = float(ratio.nanmedian())
        return 0.0 if abs(value) < 1e-13 else float(f"{value:.6g}")


def affine(graph: Graph, what: str, values: Values, leaves: Sequence[fx.Node], draw: Draw) -> Affine:
    """Link values to the parameters behind them: which element of which tensor, with which factor and constant."""
    weights = draw(leaves)
    base = values(weights)
    found: tuple[str, Tensor, Tensor] | None = None
    for i, leaf in enumerate(leaves):
        linked = _linked(what, values, weights, i)
        if linked is None:
            continue
        if found is not None:
            names = f"{found[0]} and {graph.parameters[leaf]}"
            raise NotLifted(f"the {what} is made of several parameters, {names} among them")
        found = (graph.parameters[leaf], *linked)
        weight = weights[i].reshape(-1)
    if found is None:
        return Affine(_tidy(base.numpy()))
    name, index, factor = found
    constant = base - factor * weight[index]  # pyright: ignore[reportPossiblyUnboundVariable]
    _check(what, values, leaves, draw, name, graph, (constant, factor, index))
    return Affine(_tidy(constant.numpy()), _tidy(factor.numpy()), name, index.numpy())


def _linked(what: str, values: Values, weights: Sequence[Tensor], i: int) -> tuple[Tensor, Tensor] | None:
    """Index and factor of each value in parameter i, or None where it moves nothing."""
    mine = weights[i]
    other = mine + 1.0

    def run(choice: Tensor) -> Tensor:
        mixed = torch.where(choice.reshape(mine.shape), other, mine)
        return values([*weights[:i], mixed, *weights[i + 1 :]])

    if torch.allclose(run(torch.ones(mine.numel(), dtype=torch.bool)), values(weights), 1e-10, 1e-12):
        return None
    spelled = spell(mine.numel(), run)
    if spelled.mixed.any():
        raise NotLifted(f"a {what} is made of several elements of one parameter")
    index = spelled.item.clamp(min=0)
    factor = run(torch.ones(mine.numel(), dtype=torch.bool)) - values(weights)
    return index, torch.where(spelled.item < 0, 0.0, factor)


def _check(
    what: str,
    values: Values,
    leaves: Sequence[fx.Node],
    draw: Draw,
    name: str,
    graph: Graph,
    law: tuple[Tensor, Tensor, Tensor],
) -> None:
    """A third filling: the law must hold there too, or the values are not affine in the parameter."""
    constant, factor, index = law
    weights = draw.change(2)(leaves)
    at = next(i for i, leaf in enumerate(leaves) if graph.parameters[leaf] == name)
    expected = constant + factor * weights[at].reshape(-1)[index]
    if not torch.allclose(values(weights), expected, TIGHT, TIGHT):
        raise NotLifted(f"the {what} is not affine in its parameter {name}")


def _tidy(x: FloatArray) -> FloatArray:
    """Without the noise of probing: 0.9999999999997 is 1, and so is the length of a float32 sine and cosine."""
    for step, noise in ((1e6, 1e-9), (64.0, 2e-7)):
        rounded = np.round(x * step) / step
        x = np.where(np.abs(x - rounded) <= noise * np.maximum(1.0, np.abs(x)), rounded, x)
    return x + 0.0  # no negative zero
