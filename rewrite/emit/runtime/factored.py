"""Projections some of whose rows come from few numbers of a token: where nothing is cached, a latent saves work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewrite.emit.runtime.heads import Part


class Factored(nn.Module):
    """Stands in place of a linear projection: its rows that stay, then those of each part, put in order.

    A part whose latent another projection holds (`lenders`) takes it from there: both are called with one input, and
    the second finds what the first has made.
    """

    lent = False
    """Whether another projection takes its latent from here."""

    def __init__(self, recipe: dict[str, Any], lenders: list[Factored | None], like: Tensor) -> None:
        super().__init__()

        def empty(*shape: int) -> nn.Parameter:
            value = torch.empty(shape, dtype=like.dtype, device=like.device)
            return nn.Parameter(value, requires_grad=like.requires_grad)

        sizes, inputs = recipe["parts"], recipe["inputs"]
        self.rest = empty(recipe["rest"], inputs) if recipe["rest"] else None
        self.down = nn.ParameterList([empty(p["rank"], inputs) for p in sizes if p["lender"] is None])
        self.up = nn.ParameterList([empty(p["rows"], p["rank"]) for p in sizes])
        self.bias = empty(recipe["bias"]) if recipe["bias"] else None
        # channels stand second in what a convolution of width one is given
        self.axis = recipe["axis"]
        self.runs = tuple((start, count) for start, count in recipe["runs"])
        # in a list, a lender is not one of this module's own
        self.lenders = [lender or self for lender in lenders]
        self.made: list[tuple[Tensor, Tensor]] = []

    def latent(self, x: Tensor, part: int) -> Tensor:
        """(..., rank) of what is projected; the last one is kept until the other projection has taken it."""
        if self.lent and self.made and self.made[0][0] is x:
            return self.made.pop()[1]
        latent = functional.linear(x.transpose(self.axis, -1), self.down[part])
        self.made[:] = [(x, latent)] if self.lent else []
        return latent

    def forward(self, x: Tensor) -> Tensor:
        """(..., rows)"""
        parts = [] if self.rest is None else [functional.linear(x.transpose(self.axis, -1), self.rest)]
        for i, (lender, up) in enumerate(zip(self.lenders, self.up, strict=True)):
            parts.append(functional.linear(lender.latent(x, i if lender is self else 0), up))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if len(self.runs) > 1:
            y = torch.cat([y[..., start : start + count] for start, count in self.runs], -1)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.transpose(self.axis, -1)


def install_factored(model: Part, recipe: dict[str, Any]) -> None:
    """One site: its projections of keys and values, or the one that holds them."""
    for projection in recipe["projections"]:
        old, (path, _, leaf) = model.get_submodule(projection["module"]), projection["module"].rpartition(".")
        new = Factored(projection, [_lender(model, p["lender"]) for p in projection["parts"]], next(old.parameters()))
        setattr(model.get_submodule(path), leaf, new.train(old.training))


def _lender(model: Part, path: str | None) -> Factored | None:
    """The projection that holds a latent, told that it does."""
    lender = None if path is None else model.get_submodule(path)
    if not isinstance(lender, Factored):
        return None
    lender.lent = True
    return lender
