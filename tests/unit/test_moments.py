"""The sums of calibration against the same sums written as loops."""

from __future__ import annotations

import cmath
from dataclasses import replace

import numpy as np
import pytest
import torch

from passes.moments import NEEDS, SiteBatch, coordinates, divisor, frequencies, windowed
from rewrite.layout import gather
from rewrite.site import Norm, Rope
from tests.attend import HandStats, turned
from tests.sites import half_rope, make_site

PARTIAL = Rope(np.array([[0, 2]]), np.array([0.7]), np.array([0.2]))


def batch_of(rope: Rope | None = None, norm: Norm | None = None, keep: torch.Tensor | None = None) -> SiteBatch:
    site, tensors = make_site(heads=2, kv_heads=2, dim=4, width=8, rope=rope, norm=norm)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = next(HandStats(site, gather(site, tensors.__getitem__), (x,)).batches())
    return replace(batch, keep=keep)


def test_grams_sum_over_tokens_that_count() -> None:
    keep = torch.tensor([[True, True, True, False, False], [True] * 5])
    batch = batch_of(keep=keep)
    q, k = torch.zeros(2, 4, 4).double(), torch.zeros(9, 9).double()
    for b, t in keep.nonzero().tolist():
        row = torch.cat([batch.k[b, :, t].reshape(-1), torch.ones(1).double()])
        k += torch.outer(row, row)
        q += torch.stack([torch.outer(batch.q[b, h, t], batch.q[b, h, t]) for h in range(2)])
    assert torch.allclose(NEEDS["q_gram"](batch), q)
    assert torch.allclose(NEEDS["k_gram"](batch), k)
    assert float(NEEDS["v_gram"](batch)[-1, -1]) == 8


@pytest.mark.parametrize("rope", [None, half_rope(4), PARTIAL])
def test_phases_are_what_attention_gives_the_rope(rope: Rope | None) -> None:
    batch = batch_of(rope)
    phi, p = frequencies(batch.site.k), batch.p()
    far, mean, even = torch.view_as_complex(NEEDS["phases"](batch))
    want = torch.zeros(3, 2, 4, 4, dtype=torch.complex128)
    for b, h, m in np.ndindex(2, 2, 5):
        turn = [[cmath.exp(1j * float(f) * (n - m)) for f in phi] for n in range(m + 1)]
        e = torch.tensor(turn, dtype=torch.complex128)
        weight = p[b, h, m, : m + 1].to(e.dtype)
        want[0, h] += (e.T * weight) @ e.conj()
        want[1, h] += torch.outer(e.T @ weight, (e.T @ weight).conj())
        want[2, h] += e.T @ e.conj() / (m + 1)
    assert torch.allclose(torch.stack([far, mean, even]), want)


@pytest.mark.parametrize("rope", [half_rope(4), PARTIAL])
def test_the_coordinates_make_the_rope_a_phase(rope: Rope) -> None:
    site, _ = make_site(dim=4, rope=replace(rope, start=np.zeros(len(rope.pairs))))
    u = coordinates(rope, 4)
    assert torch.allclose(u @ u.conj().T, torch.eye(4, dtype=u.dtype))
    x = torch.randn(1, 1, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    phase = torch.polar(torch.ones(7, 4).double(), torch.arange(7.0).double()[:, None] * frequencies(site.k))
    assert torch.allclose(turned(site.k, x).to(u.dtype) @ u.T, (x.to(u.dtype) @ u.T) * phase)


@pytest.mark.parametrize("kind", ["rms", "l2", "layer"])
@pytest.mark.parametrize("over", ["head", "row"])
def test_the_inverse_is_what_the_norm_does(kind: str, over: str) -> None:
    batch = batch_of(norm=Norm(kind, over, 1e-6))  # type: ignore[arg-type]
    u = batch.u["k"].reshape(2, 5, 2, 4)
    assert divisor(batch.site.k.norm, u).shape[-1] == 1
    total = NEEDS["k_inverse"](batch)
    assert float(total[-1]) == 10
    flat = u if over == "head" else u.flatten(2)[:, :, None]
    flat = flat - flat.mean(-1, keepdim=True) if kind == "layer" else flat
    size = flat.square().sum(-1) if kind == "l2" else flat.square().mean(-1)
    assert torch.allclose(total[:-1], (size + 1e-6).rsqrt().expand(2, 5, 2).sum((0, 1)))
    assert torch.equal(NEEDS["v_inverse"](batch)[:-1], torch.full((2,), 10.0).double())


def test_sums_add_up_over_batches() -> None:
    site, tensors = make_site(heads=2, kv_heads=2, dim=4, width=8, rope=half_rope(4))
    w = gather(site, tensors.__getitem__)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = HandStats(site, w, (x,)), HandStats(site, w, (x[:1], x[1:]))
    assert whole.moments.keys() == NEEDS.keys()
    for name in NEEDS:
        assert torch.allclose(whole.moments[name], parts.moments[name])


def test_windows_in_one_row_are_taken_apart() -> None:
    batch = batch_of(half_rope(4), keep=torch.tensor([[True] * 5, [False, True, True, True, True]]))

    def joined(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]

    u = {n: x.reshape(1, 10, -1) for n, x in batch.u.items()}
    flat = replace(batch, u=u, q=joined(batch.q), k=joined(batch.k), v=joined(batch.v))
    for name, need in NEEDS.items():
        assert torch.allclose(need(flat), need(batch)), name
    assert torch.equal(windowed(flat).q, batch.q)
    assert torch.equal(windowed(flat).u["k"], batch.u["k"])
