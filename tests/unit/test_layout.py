"""Weights by head and tensors of the checkpoint are two views of one thing, whatever the layout."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewrite.errors import Refused
from rewrite.heads import Heads, Weights
from rewrite.layout import axis_map, expanded, gather, kv_slots, repeats
from tests.sites import LAYOUTS, make_site


def fewer(weights: Weights, pick: list[int]) -> Weights:
    """The kv heads named in `pick` alone."""

    def cut(heads: Heads) -> Heads:
        return Heads(heads.weight[pick], None if heads.bias is None else heads.bias[pick], heads.gain[pick])

    return Weights(weights.q, cut(weights.k), cut(weights.v), weights.out, weights.out_bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_writing_what_was_read_changes_nothing(layout: str, bias: bool) -> None:
    site, tensors = make_site(layout, bias=bias)
    edits = expanded(site, gather(site, tensors.__getitem__), site.kv_of, tensors.__getitem__)
    assert {"o.weight"} < set(edits)
    for name, value in edits.items():
        assert torch.equal(value, tensors[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_repeats_the_new_heads_where_their_readers_look(layout: str) -> None:
    site, tensors = make_site(layout)
    weights = gather(site, tensors.__getitem__)
    new = fewer(weights, [2, 3])
    edits = tensors | expanded(site, new, (1, 0, 0, 1), tensors.__getitem__)
    again = gather(site, edits.__getitem__)
    assert torch.equal(again.k.weight, new.k.weight[[1, 0, 0, 1]])
    assert torch.equal(again.v.bias, new.v.bias[[1, 0, 0, 1]])
    assert torch.equal(again.q.weight, weights.q.weight)


def test_the_source_is_not_written_to() -> None:
    site, tensors = make_site("thirds")
    before = {n: t.clone() for n, t in tensors.items()}
    expanded(site, fewer(gather(site, tensors.__getitem__), [0, 1]), (0, 0, 1, 1), tensors.__getitem__)
    assert all(torch.equal(before[n], tensors[n]) for n in tensors)


@given(st.sampled_from(LAYOUTS), st.lists(st.integers(0, 1), min_size=4, max_size=4).map(lambda x: [0, 1, *x][:4]))
def test_repeats_point_to_equal_entries(layout: str, kv_of: list[int]) -> None:
    site, tensors = make_site(layout)
    new = fewer(gather(site, tensors.__getitem__), [0, 1])
    edits = expanded(site, new, kv_of, tensors.__getitem__)
    maps = repeats(site, kv_of, tensors.__getitem__)
    assert maps
    for name, first in maps.items():
        flat = edits[name].reshape(-1)
        assert torch.equal(flat, flat[torch.from_numpy(first)])
        gone = len(first) - len(np.unique(first))
        assert gone == (4 - len(set(kv_of))) * 4 * (12 if "weight" in name else 1) * (1 if layout == "separate" else 2)
        assert axis_map(first, tuple(edits[name].shape)) is not None


def test_query_heads_of_one_old_head_cannot_part() -> None:
    site, _ = make_site("separate", heads=4, kv_heads=2)
    assert kv_slots(site, (0, 0, 0, 0)) == [0, 0]
    with pytest.raises(Refused, match="kv head 0 would have to be 2 different heads"):
        kv_slots(site, (0, 1, 1, 1))
