"""The oracle's rope against complex numbers, however its pairs lie."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codegen.eager import rotated
from rewrite.site import Rope

DIM = 8
LAYOUTS = {
    "half": [(0, 4), (1, 5), (2, 6), (3, 7)],
    "interleaved": [(0, 1), (2, 3), (4, 5), (6, 7)],
    "backwards": [(7, 3), (6, 2)],
    "one": [(5, 2)],
    "uneven": [(0, 7), (1, 3), (4, 2)],
}


def turned(rope: Rope, x: Tensor, at: Tensor, sign: int = 1) -> Tensor:
    """x (b, h, t, d) with every pair multiplied by e^{iφ}."""
    out = x.detach().clone()
    for (a, b), frequency, start in zip(rope.pairs.tolist(), rope.frequencies, rope.start, strict=True):
        angle = sign * (start + frequency * at.double())
        z = torch.complex(x[..., a].detach(), x[..., b].detach()) * torch.polar(torch.ones_like(angle), angle)
        out[..., a], out[..., b] = z.real, z.imag
    return out


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 1000))
def test_pairs_turn_as_complex_numbers_do_forward_and_backward(layout: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    pairs = np.array(LAYOUTS[layout])
    frequencies, start = torch.rand(2, len(pairs), generator=draw, dtype=torch.float64).numpy()
    rope = Rope(pairs, frequencies, start)
    x, slope = torch.randn(2, 2, 3, 5, DIM, generator=draw, dtype=torch.float64)
    x.requires_grad_()
    at = torch.randint(0, 50, (5,), generator=draw)
    out = rotated(rope, x, at)
    torch.testing.assert_close(out, turned(rope, x, at))
    (back,) = torch.autograd.grad(out, x, slope)
    torch.testing.assert_close(back, turned(rope, slope, at, sign=-1))
