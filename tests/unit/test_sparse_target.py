"""The block-sparse target without a model: what it refuses, plans, spells, and what a cache needs under a mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.plan import make_plan
from passes.sparse import BlockSparse
from passes.sparse_shape import around_pairs, cost, held, mixture, pairs, static_mask, streaming_pairs, widest
from rewrite.emit.predicate import reach, tree
from rewrite.emit.runtime.sparse import holds
from rewrite.errors import BadUsage
from rewrite.mask import (
    Mask,
    all_,
    around,
    blocks,
    causal,
    chunk,
    dilated,
    documents,
    global_,
    neighbourhood,
    prefix,
    sharded,
    sink,
    streaming,
    strided,
    window,
)
from rewrite.report import Report
from rewrite.site import Sparse
from rewrite.spell import parse, spell
from tests.unit.synthetic import Model, found, program, site
from tests.unit.test_plan import HERE

ONE = site("model.layers.0.self_attn")
GROUPED = site("model.layers.1.self_attn", kv_heads=2)
ENCODER = site("encoder.0", encoder=True)
GRID = neighbourhood((7, 7), (9, 9))

atoms = st.one_of(
    st.builds(window, st.integers(1, 9)),
    st.builds(around, st.integers(1, 9)),
    st.builds(sink, st.integers(0, 6)),
    st.builds(prefix, st.integers(0, 6)),
    st.builds(global_, st.integers(0, 6)),
    st.builds(chunk, st.integers(1, 6)),
    st.builds(strided, st.integers(1, 4)),
    st.builds(dilated, st.integers(1, 4), st.integers(1, 3)),
    st.builds(sharded, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
    st.builds(lambda a, b: documents([a, b]), st.integers(1, 9), st.integers(1, 9)),
    st.builds(
        lambda rows: blocks(rows, 5),
        st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=4),
    ),
    st.builds(lambda a, b: streaming([a, b], [b, None]), st.integers(0, 4), st.integers(1, 9)),
    st.just(neighbourhood((2, 2), (4, 5), 1)),
)  # fmt: skip
masks = st.recursive(
    atoms, lambda some: st.one_of(st.builds(lambda a: ~a, some), st.builds(lambda a, b: a & b, some, some),
                                  st.builds(lambda a, b: a | b, some, some)), max_leaves=4
)  # fmt: skip


@given(mask=masks, head=st.integers(0, 1))
def test_the_runtime_reads_the_predicate_that_the_algebra_says(mask: Mask, head: int):
    q, k = torch.arange(24)[:, None], torch.arange(24)[None]
    read = holds(tree(mask, head), q, k).broadcast_to(24, 24).numpy()
    assert np.array_equal(read, mask.table(24, 24, head))


@given(mask=masks, head=st.integers(0, 1))
def test_no_query_reads_beyond_its_reach(mask: Mask, head: int):
    """A bound is a promise to the cache, which drops what lies beyond it; an exact one is read in full."""
    mask = causal & mask
    found = reach(tree(mask, head))
    if found is None:
        return
    q, k = np.arange(40)[:, None], np.arange(40)[None]
    bound = (k <= q) & ((k < found.sink) | (q - k < found.window))
    table = mask.table(40, 40, head)
    assert not (table & ~bound).any()
    if found.exact:
        assert np.array_equal(table, bound)


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (causal & (window(8) | sink(3)), (3, 8, True)),
        (causal & window(8), (0, 8, True)),
        (causal & window(8) & window(5), (0, 5, False)),
        (causal & chunk(4), (0, 4, False)),
        (causal & dilated(3, 2), (0, 6, False)),
        (causal & (window(8) | strided(4)), None),
        (causal, None),
        (all_, None),
    ],
    ids=str,
)
def test_reach(mask: Mask, wanted: tuple[int, int, bool] | None):
    found = reach(tree(mask, 0))
    assert (None if found is None else (found.sink, found.window, found.exact)) == wanted


def test_a_mask_that_hangs_on_more_than_positions_has_no_tree():
    with pytest.raises(ValueError, match="not on the positions"):
        tree(documents([[3, 4], [2, 5]]), 0)


REFUSALS = {
    "future": (ONE, BlockSparse(window(8) | sink(2))),
    "empty": (ONE, BlockSparse(causal & ~window(1))),
    "heads": (ONE, BlockSparse(streaming([1] * 4, [8] * 4))),
    "group": (GROUPED, BlockSparse(streaming([1] * 6, [8, 9] * 3))),
    "rows": (ONE, BlockSparse(causal & documents([[3, 4], [2, 5]]))),
    "narrower": (replace(ONE, mask=causal & window(4)), BlockSparse(causal & window(8))),
    "cross": (replace(ENCODER, cross=True), BlockSparse(window=8)),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals(kind: str, golden):
    one, target = REFUSALS[kind]
    reason = target.refuse(one)
    assert reason is not None
    golden(reason)


def test_what_is_not_refused():
    for target in (BlockSparse(window=8), BlockSparse(density=0.5), BlockSparse(causal & sharded(2, 2, 3))):
        assert target.refuse(ONE) is None
    assert BlockSparse(around(4)).refuse(ENCODER) is None
    assert BlockSparse(ONE.mask).refuse(ONE) is None
    # a window asked for by number is one of what the site reads
    assert BlockSparse(window=8).refuse(replace(ONE, mask=causal & chunk(4))) is None


WRONG: list[dict] = [{}, {"window": 3, "density": 0.5}, {"window": 0}, {"density": 1.5}, {"window": 3, "sink": -1}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_settings(wrong: dict):
    with pytest.raises(ValueError, match=r"give one|must be"):
        BlockSparse(**wrong)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("sparse:window=4096,sink=128", BlockSparse(window=4096, sink=128)),
        ("sparse:density=0.5", BlockSparse(density=0.5)),
        ("sparse:causal & (window(1024) | sink(64))", BlockSparse(causal & (window(1024) | sink(64)))),
        ("sparse:mask=neighbourhood((7, 7), (9, 9)),refit=false", BlockSparse(GRID, refit=False)),
    ],
)  # fmt: skip
def test_spellings(text: str, target: BlockSparse):
    assert parse(text, (BlockSparse,)) == target
    assert spell(target) == text


def test_a_slip_in_a_mask_is_told(golden):
    with pytest.raises(BadUsage) as caught:
        parse("sparse:causl & window(8)", (BlockSparse,))
    golden(str(caught.value))


@pytest.mark.parametrize("target", [BlockSparse(window=1024), BlockSparse(density=0.75)], ids=spell)
def test_plan(target: BlockSparse, golden):
    sites = [site(f"model.layers.{i}.self_attn") for i in range(4)]
    plan = make_plan(Model(), program(), found(*sites), {s.name: target for s in sites}, spelled=(spell(target),))
    golden(str(replace(plan, here=HERE)))


def test_what_a_mixture_holds():
    """Two of three kv heads drop tokens; the third holds all."""
    one = site("a", heads=6, kv_heads=3)
    mask = mixture(one, (4, 4, 0), (16, 32, None))
    assert held(one, mask) == (19, 35, None)
    new = replace(one, mask=mask, form=Sparse(3, held(one, mask)))
    assert new.cache_per_token == one.cache_per_token // 3
    assert new.cache_fixed == (19 + 35) * 2 * 32
    assert str(mask) == "streaming(4/4/0, 16/32/all)"
    assert "held=19,35,all" in str(new)


@given(tokens=st.integers(1, 40), sinks=st.integers(0, 6), width=st.one_of(st.none(), st.integers(1, 50)))
def test_pairs_are_counted(tokens: int, sinks: int, width: int | None):
    for one, count in ((ONE, streaming_pairs), (ENCODER, around_pairs)):
        mask = one.mask if width is None else static_mask(one, width, sinks)
        assert count(tokens, 0 if width is None else sinks, width) == mask.table(tokens, tokens).sum()
        assert round(pairs(mask, tokens, 6)) == mask.table(tokens, tokens).sum()


def test_costs_and_the_widest_window():
    assert cost(ONE, 256, 4, None) == 128
    assert cost(ONE, 256, 4, 75) == round(128 * streaming_pairs(256, 4, 75) / streaming_pairs(256, 0, None)) == 67
    wide = widest(ONE, 256, 4, 0.5)
    assert streaming_pairs(256, 4, wide) <= 0.5 * streaming_pairs(256, 0, None) < streaming_pairs(256, 4, wide + 1)
    local = replace(ONE, mask=causal & window(16))
    assert cost(local, 256, 0, None) == cost(local, 256, 0, 64) < cost(ONE, 256, 0, 64)


def test_the_setting_that_loses_nothing_is_the_sites_own_mask():
    for one in (ONE, ENCODER, replace(ONE, mask=causal & window(4))):
        target = BlockSparse(window=3).lossless(one)
        assert target.refuse(one) is None
        assert target.after(one).mask == one.mask


def test_reports_hold_what_is_fixed():
    row = make_plan(Model(), program(), found(ONE), {ONE.name: BlockSparse(window=8)}).rows[0]
    assert row.cache_after == 0
    assert row.cache_fixed == 6 * 11 * 64
    report = Report(1, "m", "M", "", ("sparse:window=8",), "*", (), 0, None, (row,), None, (), ())
    assert Report.read(report.json()) == report
