"""Sizes, folded rows and globs: the small parts of every table."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.errors import BadUsage
from rewrite.select import select
from rewrite.table import change, columns, fold, memory, number, ranges, size


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (size(13_476_000_000), "13.5 GB"),
        (size(512), "512 B"),
        (size(999_960), "1000 kB"),
        (memory(16 * 2**30), "16 GiB"),
        (memory(1536), "1.5 KiB"),
        (number(6_738_000_000), "6.74 B"),
        (number(41_943_040), "41.9 M"),
        (number(96), "96"),
        (change(16, 4), "−75 %"),
        (change(5.47, 5.81), "+6.2 %"),
        (change(1, 1), "±0 %"),
        (change(0, 1), ""),
        (ranges([3, 1, 2, 7, 9, 10]), "1..3,7,9..10"),
        (columns([["a", "", "c"], ["long", "", "d"]]), "  a     c\n  long  d"),
    ],
)
def test_text(text: str, want: str):
    assert text == want


@pytest.mark.parametrize(
    ("names", "contents", "want"),
    [
        ([f"m.layers.{i}.attn" for i in range(4)], "aaaa", ["m.layers.{0..3}.attn"]),
        ([f"m.layers.{i}.attn" for i in range(4)], "aaba", ["m.layers.{0..1,3}.attn", "m.layers.2.attn"]),
        ([f"m.layers.{i}.attn" for i in range(4)], "abab", ["m.layers.{0,2}.attn", "m.layers.{1,3}.attn"]),
        (["a.0.self", "a.0.cross", "a.1.self", "a.1.cross"], "xyxy", ["a.{0..1}.self", "a.{0..1}.cross"]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0", "s.1.b.1"], "xxxx", ["s.{0..1}.b.{0..1}"]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0"], "xxx", ["s.{0..1}.b.0", "s.0.b.1"]),
        (["block.0.layer.0.A", "block.1.layer.0.A"], "xx", ["block.{0..1}.layer.0.A"]),
        (["attn#1", "attn#2"], "xx", ["attn#1", "attn#2"]),
        (["conv1.attn", "conv2.attn"], "xx", ["conv1.attn", "conv2.attn"]),
        (["attn"], "x", ["attn"]),
        ([], "", []),
    ],
)
def test_fold(names: list[str], contents: str, want: list[str]):
    assert [name for name, _ in fold(names, list(contents))] == want


def unfold(name: str) -> list[str]:
    hit = re.search(r"\{([^}]*)\}", name)
    if hit is None:
        return [name]
    found: list[str] = []
    for part in hit[1].split(","):
        first, _, last = part.partition("..")
        for n in range(int(first), int(last or first) + 1):
            found += unfold(name[: hit.start()] + str(n) + name[hit.end() :])
    return found


paths = st.tuples(st.integers(0, 3), st.sampled_from(["self", "cross"]), st.integers(0, 3))


@given(rows=st.dictionaries(paths, st.sampled_from("ab"), max_size=16))
def test_folded_rows_stand_for_exactly_the_given_ones(rows: dict[tuple[int, str, int], str]):
    names = [f"layers.{a}.{b}.{c}" for a, b, c in rows]
    contents = list(rows.values())
    of_name = dict(zip(names, contents, strict=True))
    folded = fold(names, contents)
    spread = [n for name, _ in folded for n in unfold(name)]
    assert sorted(spread) == sorted(names)
    assert all(of_name[n] == contents[at] for name, at in folded for n in unfold(name))


NAMES = [f"model.layers.{i}.self_attn" for i in range(12)]


def test_select():
    assert select(NAMES) == set(NAMES)
    assert select(NAMES, "*.1?.*") == set(NAMES[10:])
    assert select(NAMES, "*", ["model.layers.[01].*", "*.11.*"]) == set(NAMES[2:11])
    assert select([], "*") == set()


@pytest.mark.parametrize("glob", ["model.layer.0.*", "layers.0.*", "model.layers.0.attn", "zzz", "model.layers.12.*"])
def test_a_glob_that_matches_nothing(glob: str, golden):
    with pytest.raises(BadUsage) as caught:
        select(NAMES, skip=[glob], label="./llama")
    golden(str(caught.value))


def test_an_only_that_matches_nothing(golden):
    with pytest.raises(BadUsage) as caught:
        select(NAMES, "decoder.*", label="./llama")
    golden(str(caught.value))
