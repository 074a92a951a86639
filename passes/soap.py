"""Adam along the axes of a matrix's gradient, taken anew on the way: SOAP (Vyas et al., arXiv 2409.11321).

Axes are the eigenvectors of the gradient's second moments over outputs and over inputs. Here they turn after 1, 2, 4,
... steps, not at even intervals, so that a run of any length pays for few decompositions, most of them where the
gradient changes most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.eigen import eigh

FIRST, SECOND = 0.9, 0.9
"""What a step keeps of a gradient's mean and of its squares: some hundred steps have no time for long memories."""
MOMENTS = 0.9
"""What a gradient keeps of the moments that the axes come from, once ten are known."""
TINY = 1e-8


@dataclass(eq=False)
class _Axes:
    """Of one matrix (..., m, n)."""

    outputs: Tensor
    """(..., m, m) mean of G Gᵀ, float64"""
    inputs: Tensor
    """(..., n, n) mean of Gᵀ G, float64"""
    left: Tensor
    right: Tensor

    def along(self, x: Tensor) -> Tensor:
        """x in these axes."""
        return self.left.mT @ x @ self.right

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `along`."""
        return self.left @ x @ self.right.mT


class Soap:
    """Moves tensors in place; those of two dimensions and more along axes (of the last two), others as Adam does."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.mean = {n: torch.zeros_like(x) for n, x in tensors.items()}
        self.squares = {n: torch.zeros_like(x) for n, x in tensors.items()}
        self.axes = {n: _still(x) for n, x in tensors.items() if x.dim() > 1}
        self.looks = self.steps = 0

    def look(self, gradients: Mapping[str, Tensor]) -> None:
        """Gradients from which axes are taken."""
        part = max(1 - MOMENTS, 1 / (self.looks + 1))
        for name, axes in self.axes.items():
            g = gradients[name].double()
            axes.outputs = axes.outputs.lerp(g @ g.mT, part)
            axes.inputs = axes.inputs.lerp(g.mT @ g, part)
        self.looks += 1

    def turn(self) -> None:
        """Take the axes of what was looked at; squares go along as if gradients were independent in the old ones."""
        for name, axes in self.axes.items():
            left, right = eigh(axes.outputs)[1].float(), eigh(axes.inputs)[1].float()
            old_left, old_right = (left.mT @ axes.left).square(), (right.mT @ axes.right).square()
            self.squares[name] = old_left @ self.squares[name] @ old_right.mT
            axes.left, axes.right = left, right

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """One step of size `rate` along every axis that the gradients agree on."""
        self.look(gradients)
        if self.steps.bit_count() == 1:
            self.turn()
        self.steps += 1
        for name, x in self.tensors.items():
            x.data.sub_(self._along(name, gradients[name]), alpha=rate)

    def _along(self, name: str, gradient: Tensor) -> Tensor:
        self.mean[name] = self.mean[name].lerp(gradient, 1 - FIRST)
        mean, axes = self.mean[name], self.axes.get(name)
        if axes is not None:
            mean, gradient = axes.along(mean), axes.along(gradient)
        self.squares[name] = self.squares[name].lerp(gradient.square(), 1 - SECOND)
        size = (self.squares[name] / (1 - SECOND**self.steps)).sqrt() + TINY
        move = mean / (1 - FIRST**self.steps) / size
        return move if axes is None else axes.back(move)


def _still(x: Tensor) -> _Axes:
    (m, n), more = x.shape[-2:], x.shape[:-2]
    outputs, inputs = x.new_zeros(*more, m, m).double(), x.new_zeros(*more, n, n).double()
    return _Axes(outputs, inputs, torch.eye(m).expand(*more, m, m), torch.eye(n).expand(*more, n, n))
