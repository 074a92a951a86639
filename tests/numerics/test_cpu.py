"""The CPU back end against the oracle in float64: masks, shapes and options, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codegen import cpu, cpu_backward, oracle, pieces
from codegen.options import Options
from codegen.pieces import Shape
from rewrite.mask import (
    Mask,
    all_,
    blocks,
    causal,
    causal_top_left,
    dilated,
    documents,
    mask,
    neighbourhood,
    sharded,
    sink,
    streaming,
    window,
)

torch.set_num_threads(1)
HEADS = 6
MASKS: dict[str, Callable[[], Mask]] = {
    "all": lambda: all_,
    "causal": lambda: causal,
    "top left": lambda: causal_top_left,
    "window": lambda: causal & window(70),
    "sink": lambda: causal & (window(70) | sink(4)),
    "heads": lambda: streaming([1, 3, 3, 0, 5, 64], [70, None, 5, 5, 200, 1]),
    "documents": lambda: documents([50, 130, 3, 200]),
    "documents by row": lambda: causal & documents([[50, 130], [3, 200]]),
    "dilated": lambda: causal & dilated(20, 8),
    "sharded": lambda: causal & sharded(16, 2, 3),
    "grid": lambda: neighbourhood((3, 5), (16, 16)),
    "blocks": lambda: blocks([[1, 0, 0], [1, 1, 0], [0, 1, 1]], 64),
    "holes": lambda: mask(lambda b, h, q, k: (k <= q) & (q % 7 > 2) & (k < q - 3 * b)),
    "later": lambda: window(5) & ~causal,
    "none": lambda: ~all_,
}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def tensors(queries: int, keys: int, kv_heads: int, dv: int, batch: int = 2) -> list[Tensor]:
    shapes = (batch, HEADS, queries, 16), (batch, kv_heads, keys, 16), (batch, kv_heads, keys, dv)
    return [drawn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def held(chosen: Mask, qkv: list[Tensor], options: Options) -> None:
    """Outputs, logarithms of sums and all gradients are the oracle's."""
    o, lse = oracle.attention(*qkv, chosen, options)
    grad = drawn(*o.shape, seed=9)
    names = {"q": qkv[0], "k": qkv[1], "v": qkv[2], "bias": options.bias, "sinks": options.sinks}
    wanted = {name: x for name, x in names.items() if x is not None}
    grads = torch.autograd.grad(o, list(wanted.values()), grad, allow_unused=True)
    with torch.no_grad():
        got, got_lse = cpu.forward(*qkv, chosen, options)
        found = cpu_backward.backward(grad, *qkv, got, got_lse, chosen, options, options.bias is not None)
    torch.testing.assert_close(got, o.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(got_lse, lse.detach(), rtol=0, atol=1e-11)
    assert set(found) == set(wanted)
    for name, of_oracle in zip(wanted, grads, strict=True):
        expected = torch.zeros_like(found[name]) if of_oracle is None else of_oracle
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("queries", "keys"), [(330, 330), (70, 400), (150, 140)])
def test_every_mask(name: str, queries: int, keys: int) -> None:
    held(MASKS[name](), tensors(queries, keys, 2, 16), Options(0.25))


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(MASKS)),
    queries=st.integers(1, 140),
    keys=st.integers(1, 210),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    dv=st.sampled_from([16, 24]),
    softcap=st.sampled_from([None, 1.5]),
    bias=st.sampled_from([None, (2, 1, 1, 0), (1, HEADS, 0, 0), (0, 0)]),
    slopes=st.booleans(),
    sinks=st.booleans(),
    short=st.sampled_from([None, 0, 7, 1000]),
)
def test_options_and_shapes(
    name: str,
    queries: int,
    keys: int,
    kv_heads: int,
    dv: int,
    softcap: float | None,
    bias: tuple[int, ...] | None,
    slopes: bool,
    sinks: bool,
    short: int | None,
) -> None:
    """Sizes 0 of a bias are filled in; rows of the batch are `short` by so many queries and keys."""
    filled = None if bias is None else [*bias[:-2], bias[-2] or queries, bias[-1] or keys]
    options = Options(
        scale=0.3,
        softcap=softcap,
        bias=None if filled is None else drawn(*filled, seed=3).requires_grad_(),
        slopes=torch.linspace(0.1, 0.6, HEADS, dtype=torch.float64) if slopes else None,
        sinks=drawn(HEADS, seed=4).requires_grad_() if sinks else None,
        lengths=None
        if short is None
        else (torch.tensor([queries, max(0, queries - short)]), torch.tensor([keys, max(0, keys - 2 * short)])),
    )
    held(MASKS[name](), tensors(queries, keys, kv_heads, dv), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_other_dtypes_stay_within_their_rounding(dtype: torch.dtype, softcap: float | None) -> None:
    qkv = [x.detach().to(dtype) for x in tensors(200, 260, 3, 16)]
    options = Options(0.25, softcap, sinks=drawn(HEADS))
    o, lse = cpu.forward(*qkv, MASKS["sink"](), options)
    exact, exact_lse = oracle.attention(*(x.double() for x in qkv), MASKS["sink"](), options)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    # a product of rounded parts, merged: a few roundings of numbers below the largest value
    assert (o.double() - exact).abs().max() < 3 * torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    assert (lse.double() - exact_lse).abs().max() < 1e-4

    wide = [x.double().requires_grad_() for x in qkv]
    grad = drawn(*o.shape, seed=9).to(dtype)
    expected = torch.autograd.grad(oracle.attention(*wide, MASKS["sink"](), options)[0], wide, grad.double())
    found = cpu_backward.backward(grad, *qkv, o, lse, MASKS["sink"](), options)
    for name, wanted in zip("qkv", expected, strict=True):
        assert found[name].dtype == dtype
        assert (found[name].double() - wanted).norm() < 2 * torch.finfo(dtype).eps * wanted.norm() + 1e-5, name


def test_an_infinite_bias_hides_keys() -> None:
    qkv = [x.detach() for x in tensors(40, 130, 2, 16)]
    bias = torch.zeros(40, 130, dtype=torch.float64)
    bias[3] = -math.inf
    bias[:, 20:] = -math.inf
    o, lse = cpu.forward(*qkv, causal, Options(0.25, bias=bias))
    exact, exact_lse = oracle.attention(*qkv, causal, Options(0.25, bias=bias))
    torch.testing.assert_close(o, exact)
    torch.testing.assert_close(lse, exact_lse)
    assert bool((o[:, :, 3] == 0).all())


def test_strided_tensors_are_read_as_they_lie() -> None:
    """(batch, tokens, heads, dim) in memory, as most models have it, and keys whose channels are not neighbours."""
    q, k, v = (x.detach() for x in tensors(150, 150, 2, 16))
    other = [q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v[..., ::2].repeat_interleave(2, -1)]
    for got, exact in zip(
        cpu.forward(*other, causal, Options(0.25)),
        oracle.attention(q, k, other[2], causal, Options(0.25)),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("name", ["causal", "sink", "heads", "documents by row", "dilated", "blocks"])
@pytest.mark.parametrize(("queries", "keys"), [(1100, 1100), (3, 700), (320, 500)])
def test_pieces_hold_every_pair_once_and_few_others(name: str, queries: int, keys: int) -> None:
    """What is visited covers the mask; a stretch that is not masked holds no forbidden pair."""
    chosen = MASKS[name]()
    wanted = oracle.kept(chosen, HEADS, queries, [(queries, keys)] * 2, keys)
    seen, open_ = torch.zeros_like(wanted, dtype=torch.int64), torch.zeros_like(wanted)
    for piece in pieces.pieces(chosen, Shape(((queries, keys),) * 2, HEADS, 3)):
        size = piece.queries[1] - piece.queries[0]
        for tile in range(piece.count):
            first = piece.queries[0] + tile * size
            block = slice(*piece.rows), slice(*piece.heads), slice(first, first + size)
            of_tile, open_of_tile = seen[block], open_[block]
            for run in (r.moved(tile * r.step) for r in piece.runs):
                of_tile[..., run.first : run.last] += 1
                open_of_tile[..., run.first : run.last] = True
                for a, b in run.masked:
                    open_of_tile[..., a:b] = False
    assert int(seen.max()) == 1
    assert bool((seen.bool() | ~wanted).all())
    assert not bool((open_ & ~wanted).any())


def test_sparse_masks_visit_little() -> None:
    """Work follows the mask: sink and window at 16k tokens visit at most a fifth more pairs than are allowed."""
    chosen, tokens = causal & (window(1024) | sink(64)), 16384
    visited = 0
    for piece in pieces.pieces(chosen, Shape(((tokens, tokens),), 1, 1)):
        visited += piece.count * (piece.queries[1] - piece.queries[0]) * sum(r.last - r.first for r in piece.runs)
    allowed = sum(min(at + 1, 1024 + min(64, max(0, at - 1023))) for at in range(tokens))
    assert allowed <= visited <= allowed * 1.2


def test_a_second_backward_pass_is_the_same_to_the_bit() -> None:
    qkv = [x.detach().float() for x in tensors(300, 300, 2, 16)]
    o, lse = cpu.forward(*qkv, MASKS["sink"](), Options(0.25))
    once, again = (
        cpu_backward.backward(torch.ones_like(o), *qkv, o, lse, MASKS["sink"](), Options(0.25)) for _ in range(2)
    )
    assert all(torch.equal(once[n], again[n]) for n in once)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 9 queries and 5 keys, and there are 4 and 5"):
        cpu.forward(*tensors(4, 5, 2, 16), causal, Options(1.0, lengths=(torch.tensor([4, 9]), torch.tensor([5, 5]))))
