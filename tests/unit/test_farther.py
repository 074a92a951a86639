"""The second length: what changes with the length is refused with the numbers, what does not is proven at two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from passes.find import Found, find
from passes.find.farther import confirm
from passes.find.roots import NotLifted
from passes.find.validate import validate
from rewrite import plan
from rewrite.capture import capture
from rewrite.errors import ReattnError
from tests.contract import lifted as z

FAR = 1 << 20
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 60, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def found(model: nn.Module) -> Found:
    return find(capture(model, dynamic=False).static)


def longrope(long_factor: list[float]) -> nn.Module:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": long_factor}
    rope = {**rope, "original_max_position_embeddings": 16}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**TINY, rope_parameters=rope)).eval()


def test_a_plain_rope_is_proven_at_two_lengths() -> None:
    result = found(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)))
    assert [s.proof.lengths for s in result.sites] == [(10, FAR)]


def test_long_rope_is_refused_where_its_two_sets_of_frequencies_differ() -> None:
    result = found(longrope([1.0] * 7 + [1.5]))
    assert not result.sites
    reason = result.refused[0].refusal.reason
    assert reason.startswith("q changes with the length: read off 10 tokens, its description is off by ")
    assert f"in a text of {FAR}" in reason
    assert [s.proof.lengths for s in found(longrope([1.0] * 8)).sites] == [(10, FAR)]


def test_frequencies_that_python_computes_from_the_length_stop_the_capture() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, rope_parameters=rope))
    with pytest.raises(ReattnError) as caught:
        plan(model)
    assert caught.value.what == "torch.export stopped in model.rotary_emb"
    assert any("if seq_len > max_seq_len_cached" in line for line in caught.value.lines)
    assert "rope_type with fixed ones" in caught.value.lines[-1]


def test_a_frequency_a_little_off_passes_in_few_tokens_and_is_caught_far_out() -> None:
    told = z.described(z.rotated)
    rope = told.site.q.rope
    assert rope is not None
    wrong = replace(told.site.q, rope=replace(rope, frequencies=rope.frequencies * (1 + 3e-7)))
    with torch.no_grad():
        assert confirm(told.setting, told.site).proof.lengths == (10, FAR)
        validate(told.setting, replace(told.site, q=wrong), told.law, told.factor)
        with pytest.raises(NotLifted, match="q changes with the length"):
            confirm(told.setting, replace(told.site, q=wrong))


def turned_by(at: Tensor, base: Tensor | float, x: Tensor) -> Tensor:
    angles = at[:, None] * base ** (-torch.arange(0, z.D, 2) / z.D)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def scaled(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The base grows with the largest position, beyond 64: dynamic NTK without a branch."""
    at = torch.arange(z.T)
    base = 100.0 * (at.max() + 1).clamp(min=64) / 64
    return z.plain(m, turned_by(at, base, q), turned_by(at, base, k), v)


def tabled(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Angles from a table of 48 positions."""
    at = torch.arange(48)[torch.arange(z.T)]
    return z.plain(m, turned_by(at, 100.0, q), turned_by(at, 100.0, k), v)


def saturated(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positions stop at 64."""
    at = torch.arange(z.T).clamp(max=64)
    return z.plain(m, turned_by(at, 100.0, q), turned_by(at, 100.0, k), v)


def warmed(m: z.Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries grow with their position, from the 64th on."""
    grown = 1 + 0.1 * torch.log1p(torch.floor((torch.arange(z.T) + 1) / 64))
    return z.plain(m, z.turn(q) * grown[:, None], z.turn(k), v)


@pytest.mark.parametrize("middle", [scaled, saturated])
def test_what_hangs_on_far_positions_is_not_frozen(middle: z.Middle) -> None:
    result = z.lifted(middle)
    assert not result.sites
    assert "q changes with the length" in result.refused[0].refusal.reason


def test_a_table_is_followed_as_far_as_it_goes() -> None:
    (site,) = z.lifted(tabled).sites
    assert site.proof.lengths == (10, 32)


def test_without_positions_there_is_one_length() -> None:
    (site,) = z.lifted(z.plain).sites
    assert site.proof.lengths == (10,)


def test_a_factor_that_begins_far_out_is_named() -> None:
    (site,) = z.lifted(warmed).sites
    assert site.proof.lengths == (10, FAR)
    assert site.q.token_gain is not None
    assert site.q.token_gain.tolist() == [1.0] * 10
    assert site.k.token_gain is None


class Routed(nn.Module):
    """Queries from one of two projections, as a router chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.k, self.v, self.o = (nn.Linear(z.C, z.C) for _ in range(5))
        self.router = nn.Linear(z.C, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, z.C)
        first = self.router(flat)[:, 0] > 0
        order = first.to(torch.int64).argsort()
        few, many = flat[order].split(torch.stack([(~first).sum(), first.sum()]).tolist())
        q = torch.zeros_like(flat).index_add(0, order, torch.cat([self.a(few), self.b(many)])).view(x.shape)
        q, k, v = (y.view(*x.shape[:2], z.H, z.D).transpose(1, 2) for y in (q, self.k(x), self.v(x)))
        return self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_sizes_that_the_data_decide_are_refused_in_words() -> None:
    torch.manual_seed(0)
    with pytest.raises(ReattnError, match="q is computed on as many tokens as their values decide") as caught:
        plan(Routed(), inputs=(torch.randn(z.B, z.T, z.C),))
    assert caught.value.slug == "no-attention"
    assert "test_farther.py:" in str(caught.value)
