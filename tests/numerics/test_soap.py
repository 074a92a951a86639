"""SOAP: the same steps in whatever axes a matrix is written, Adam's where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.soap import FIRST, SECOND, TINY, Soap

STEPS = 20
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of a tensor and this step's noise."""


def run(loss: Loss, start: Tensor, noise: Tensor, rate: float = 0.05) -> Tensor:
    """The tensor after as many steps as there is noise."""
    x = start.clone().requires_grad_()
    soap = Soap({"x": x})

    def gradient(step: int) -> dict[str, Tensor]:
        return {"x": torch.autograd.grad(loss(x, noise[step]), x)[0]}

    for step in range(4):
        soap.look(gradient(step))
    soap.turn()
    for step in range(len(noise)):
        soap.step(gradient(step), rate)
    return x.detach()


def adam(loss: Loss, start: Tensor, noise: Tensor, rate: float = 0.05) -> Tensor:
    """The same by PyTorch's Adam."""
    x = start.clone().requires_grad_()
    steps = torch.optim.Adam([x], lr=rate, betas=(FIRST, SECOND), eps=TINY)
    for step in noise:
        steps.zero_grad()
        loss(x, step).backward()
        steps.step()
    return x.detach()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def uneven(x: Tensor, noise: Tensor) -> Tensor:
    """Its curvature differs by the square of the size from direction to direction, and so does the noise."""
    m, n = x.shape[-2:]
    weight = torch.outer(torch.logspace(0, 1, m), torch.logspace(0, -1, n))
    return (weight * (x - 1 - noise)).square().sum()


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 4)], ids=str)
def test_axes_do_not_matter(shape: tuple[int, ...]) -> None:
    """Written as A Y B with orthogonal A and B, Y goes where X goes."""
    a = torch.linalg.qr(drawn(*shape[:-2], shape[-2], shape[-2]))[0]
    b = torch.linalg.qr(drawn(*shape[:-2], shape[-1], shape[-1]))[0]
    start, noise = drawn(*shape), drawn(STEPS, *shape)
    x = run(uneven, start, noise)
    y = run(lambda y, e: uneven(a @ y @ b, e), a.mT @ start @ b.mT, noise)
    assert float((x - start).norm()) > 0.5
    torch.testing.assert_close(a @ y @ b, x, rtol=1e-3, atol=1e-3)


def test_vectors_move_as_adam_moves_them() -> None:
    start, noise = drawn(6), drawn(STEPS, 6)

    def loss(x: Tensor, e: Tensor) -> Tensor:
        return (x - e).pow(4).sum()

    torch.testing.assert_close(run(loss, start, noise), adam(loss, start, noise))


def test_a_turn_that_finds_the_same_axes_changes_nothing() -> None:
    x, noise = drawn(4, 6).requires_grad_(), drawn(5, 4, 6)
    soap = Soap({"x": x})
    for step in noise:
        gradients = {"x": torch.autograd.grad(uneven(x, step), x)[0]}
        soap.step(gradients, 0.05)
    soap.turn()
    squares = soap.squares["x"].clone()
    soap.turn()
    torch.testing.assert_close(soap.squares["x"], squares)


def test_curvature_that_lies_askew_is_met() -> None:
    """Adam, which scales along the given axes, is left far behind."""
    a, b = (torch.linalg.qr(drawn(n, n))[0] for n in (8, 12))
    weight = torch.outer(torch.logspace(0, 2, 8), torch.logspace(0, -2, 12))

    def loss(x: Tensor, e: Tensor) -> Tensor:
        return (weight * (a @ (x + e * 1e-3) @ b)).square().sum()

    start, noise = drawn(8, 12), drawn(200, 8, 12)
    still = torch.zeros_like(start)
    assert loss(run(loss, start, noise), still) < loss(adam(loss, start, noise), still) / 10
