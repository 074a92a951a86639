"""The count by execution judges the finder, so it is held to cases that are counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import BY_NAME, count_by_execution
from tests.zoo.hostile import Decoy
from tests.zoo.spellings import D
from tests.zoo.written import Model


class Unused(nn.Module):
    """A product and its softmax, which no product consumes."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1).sum(-1)


class Copied(nn.Module):
    """k is written into slices of a new tensor; the scores are scaled in place."""

    def forward(self, x: Tensor) -> Tensor:
        k = x.new_empty(x.shape)
        k[..., : D // 2].copy_(x[..., D // 2 :])
        k[..., D // 2 :].copy_(x[..., : D // 2])
        return (x @ k.mT).div_(8.0).softmax(-1) @ x


class Table(nn.Module):
    """Products with a parameter on one side, whatever is done to the parameter, are no scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, D))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ F.normalize(self.table * 2.0, dim=-1).T).softmax(-1) @ x


class Twice(nn.Module):
    """One softmax read by two products is one attention; the fused op is another."""

    def forward(self, x: Tensor) -> Tensor:
        p = (x @ x.mT).softmax(-1)
        return p @ x + p @ (2 * x) + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


@pytest.mark.parametrize(("module", "expected"), [(Unused, 0), (Copied, 1), (Table, 0), (Twice, 2)])
def test_counts_of_small_modules(module: type[nn.Module], expected: int):
    assert count_by_execution(module(), (torch.randn(2, 10, D),)) == expected


def test_a_router_is_no_attention():
    assert count_by_execution(Model(Decoy).eval(), (torch.randint(0, 97, (2, 10)),)) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NanoGPT", 2), ("HeadLoop", 8), ("LateDivide", 2), ("Library", 2), ("llama-sdpa", 2), ("bart-eager", 6),
     ("mixtral-eager", 2), ("diffllama-eager", 4), ("mamba-eager", 0), ("convbert-eager", 2)],
)  # fmt: skip
def test_counts_of_the_zoo(name: str, expected: int):
    assert count_by_execution(*BY_NAME[name].build()) == expected
