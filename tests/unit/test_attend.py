"""The door for tensors: what it refuses, in which words, and the rules of lengths, scale and empty queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rewrite
from codegen import oracle
from codegen.options import Options
from rewrite import Alibi, ReattnError, attention
from rewrite.errors import BadUsage
from rewrite.mask import at, causal, mask, window

torch.set_num_threads(1)


def tensors(queries: int, keys: int, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, 16, generator=make) for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))]


Q, K, V = tensors(5, 8)
REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "axes": ([Q[0], K, V], {}, "tensors are (batch, heads, tokens, dim), and these have 3, 4 and 4 axes"),
    "batch": ([Q, K[:1], V], {}, "queries, keys and values have batches of 2, 1 and 2, which must agree"),
    "dim": ([Q[..., :8], K, V], {}, "queries have 8 channels and keys 16, which must agree"),
    "tokens": ([Q, K, V[:, :, 1:]], {}, "keys have 2 heads of 8 tokens and values 2 of 7: not alike"),
    "heads": (tensors(5, 8, 4, 3), {}, "4 query heads cannot share 3 kv heads evenly"),
    "dtype": (
        [Q, K.half(), V],
        {},
        "queries, keys and values are of one floating type, "
        "and these are torch.float32, torch.float16 and torch.float32",
    ),
    "softcap": ([Q, K, V], {"softcap": 0.0}, "a softcap is above 0, and this one is 0.0: None is no cap"),
    "slopes": ([Q, K, V], {"bias": Alibi([1.0, 2.0])}, "2 slopes were given for 4 query heads: one each"),
    "slopes that learn": (
        [Q, K, V],
        {"bias": Alibi(torch.ones(4, requires_grad=True))},
        "slopes have no gradient: give what they make of distances as a bias",
    ),
    "bias": (
        [Q, K, V],
        {"bias": torch.zeros(5, 7)},
        "a bias of shape (5, 7) does not broadcast to (batch, heads, queries, keys) = (2, 4, 5, 8)",
    ),
    "sinks": (
        [Q, K, V],
        {"sinks": torch.zeros(2)},
        "sinks have the shape (2,), and there are 4 query heads: one logit each",
    ),
    "lengths": (
        [Q, K, V],
        {"lengths": torch.ones(2)},
        "lengths are whole numbers, one for each of 2 rows, not (2,) of torch.float32",
    ),
}

LATER = mask(lambda b, h, q, k: (k <= q) & (q - k < at("near", h)), "later", {"near": np.empty(0, np.int8)})
TABLES: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "missing": (LATER, {}, "the mask later only declares its table near: give its numbers in `tables`"),
    "unread": (causal, {"near": torch.ones(4)}, "the mask causal reads no table near, it reads none"),
    "floating": (LATER, {"near": torch.ones(4)}, "tables are whole numbers on cpu, and near is torch.float32 on cpu"),
    "axes": (
        LATER,
        {"near": torch.ones(4, 2).int()},
        "the mask later reads its table near by 1 indices, and what is given has 2 axes",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_do_not_fit_are_a_sentence(name: str) -> None:
    chosen, tables, sentence = TABLES[name]
    with pytest.raises(BadUsage) as caught:
        attention(Q, K, V, chosen, tables=tables)
    assert caught.value.what == sentence


def test_tables_take_the_place_of_the_masks_own() -> None:
    """Declared ones and others alike; the sizes of what is given are checked."""
    near = torch.tensor([1, 2, 3, 9])
    own = mask(lambda b, h, q, k: (k <= q) & (q - k < at("near", h)), "own", {"near": np.array([1, 1, 1, 1])})
    written = mask(lambda b, h, q, k: (k <= q) & (q - k < at("near", h)), "written", {"near": near.numpy()})
    for chosen in (LATER, own):
        torch.testing.assert_close(attention(Q, K, V, chosen, tables={"near": near}), attention(Q, K, V, written))
    with pytest.raises(ValueError, match="reads near of 3 query heads, and there are 4"):
        attention(Q, K, V, LATER, tables={"near": near[:3]})


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_a_sentence(name: str) -> None:
    given, options, sentence = REFUSED[name]
    with pytest.raises(BadUsage) as caught:
        attention(*given, **options)
    assert caught.value.what == sentence
    assert isinstance(caught.value, ReattnError)


def test_the_default_is_causal_with_the_usual_scale() -> None:
    given = tensors(5, 8)
    torch.testing.assert_close(attention(*given), oracle.attention(*given, causal, Options(0.25))[0])


def test_right_padding_gives_what_the_rows_alone_give() -> None:
    """As many queries as keys: both end where the row does, and what follows is zeros."""
    q, k, v = tensors(12, 12)
    got = attention(q, k, v, causal & window(3), lengths=torch.tensor([12, 7]))
    alone = attention(q[1:, :, :7], k[1:, :, :7], v[1:, :, :7], causal & window(3))
    torch.testing.assert_close(got[1:, :, :7], alone)
    assert not got[1, :, 7:].any()


def test_decoding_rows_of_unequal_length() -> None:
    """Fewer queries than keys: they stand at the end of each row's own keys."""
    q, k, v = tensors(2, 12)
    got = attention(q, k, v, lengths=torch.tensor([12, 7]))
    torch.testing.assert_close(got[1:], attention(q[1:], k[1:, :, :7], v[1:, :, :7]))


def test_a_pair_of_lengths_says_both() -> None:
    q, k, v = tensors(6, 12)
    got = attention(q, k, v, lengths=(torch.tensor([6, 4]), torch.tensor([12, 7])))
    torch.testing.assert_close(got[1:, :, :4], attention(q[1:, :, :4], k[1:, :, :7], v[1:, :, :7]))
    assert not got[1, :, 4:].any()


def test_alibi_is_its_bias() -> None:
    q, k, v = tensors(5, 8)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    back = torch.arange(3, 8)[:, None] - torch.arange(8)
    written = attention(q, k, v, bias=-slopes[:, None, None] * back)
    torch.testing.assert_close(attention(q, k, v, bias=Alibi(slopes)), written)


def test_queries_that_may_read_nothing_give_zeros_and_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in tensors(8, 5))
    o = attention(q, k, v)
    assert not o[:, :, :3].any()
    o.sum().backward()
    assert q.grad is not None
    assert not q.grad[:, :, :3].any()
    assert bool(torch.isfinite(q.grad).all())


@pytest.mark.parametrize("empty", [(0, 5), (3, 0)])
def test_no_tokens_are_no_error(empty: tuple[int, int]) -> None:
    o = attention(*tensors(*empty))
    assert o.shape == (2, 4, empty[0], 16)
    assert not o.any()


def test_the_name_stays_a_function() -> None:
    """A module of the same name would take its place in the package once it is imported."""
    assert rewrite.attention is attention
    assert not (Path(rewrite.__file__).parent / "attention.py").exists()
