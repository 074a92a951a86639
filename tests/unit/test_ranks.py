"""What one process sends to others comes back with its numbers and their layout; alone nothing is sent."""

import pytest
import torch

from rewrite.ranks import Ranks, packed, unpacked

TENSORS = {
    "plain": torch.arange(6, dtype=torch.float64).view(2, 3),
    "transposed": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    "expanded": torch.arange(3.0)[:, None].expand(2, 3, 5),
    "bfloat16": torch.arange(5.0).bfloat16(),
    "bool": torch.tensor([True, False]),
    "one number": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_keeps_its_layout(name: str):
    """Products read what lies otherwise in another order, and could round otherwise."""
    sent = TENSORS[name]
    (again,) = unpacked(packed([sent]))
    assert again.dtype == sent.dtype
    assert torch.equal(again, sent)
    assert again.stride() == sent.stride()


def test_numbers_stand_between_tensors():
    x = torch.randn(3, dtype=torch.float64)
    first, tensor, last = unpacked(packed([0.1 + 0.2, x, True]))
    assert first == 0.1 + 0.2
    assert torch.equal(tensor, x)
    assert last is True


def test_alone_items_are_worked_on_when_they_are_asked_for():
    done: list[int] = []
    shared = Ranks().share([1, 2, 3], lambda n: done.append(n) or (n * n,))
    assert next(shared) == (1,)
    assert done == [1]
    assert [*shared] == [(4,), (9,)]
