"""Every named mask against its rule in plain Python, with heads and rows, and its text read back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rewrite.mask import (
    Mask,
    all_,
    around,
    at,
    blocks,
    blocks_diagonal,
    causal,
    causal_top_left,
    chunk,
    dilated,
    documents,
    global_,
    h,
    longformer,
    mask,
    neighbourhood,
    parse,
    prefix,
    sharded,
    sink,
    streaming,
    strided,
    window,
)

Rule = Callable[[int, int, int, int, int], bool]
BLOCKS = np.random.default_rng(5).random((2, 3, 5)) < 0.5
WIDTHS = {"width": np.array([1, 4, 0])}


def of(lengths: list[int], x: int) -> int:
    """Which document a position stands in."""
    ends = np.cumsum(lengths)
    return int(np.searchsorted(ends, x, side="right"))


def edge(i: int, n: int) -> int:
    return min(max(i, 0), n - 1)


LIBRARY: dict[str, tuple[Mask, Rule]] = {
    "all": (all_, lambda b, h, q, k, o: True),
    "causal": (causal, lambda b, h, q, k, o: k <= q),
    "causal_top_left": (causal_top_left, lambda b, h, q, k, o: k <= q - o),
    "window": (window(3), lambda b, h, q, k, o: k > q - 3),
    "around": (around(2), lambda b, h, q, k, o: abs(q - k) < 2),
    "sink": (sink(2), lambda b, h, q, k, o: k < 2),
    "prefix": (causal | prefix(4), lambda b, h, q, k, o: k <= q or k < 4),
    "chunk": (chunk(4), lambda b, h, q, k, o: q // 4 == k // 4),
    "blocks_diagonal": (blocks_diagonal(3), lambda b, h, q, k, o: q // 3 == k // 3),
    "global": (global_(2), lambda b, h, q, k, o: q < 2 or k < 2),
    "longformer": (longformer(1, 3), lambda b, h, q, k, o: q < 1 or k < 1 or abs(q - k) < 3),
    "strided": (strided(3), lambda b, h, q, k, o: (q - k) % 3 == 0),
    "dilated": (dilated(2, 3), lambda b, h, q, k, o: (q - k) % 3 == 0 and q - k < 6),
    "sharded": (sharded(2, 2, 3), lambda b, h, q, k, o: q // 2 - k // 2 < 2 or (k // 2 + h) % 3 == 0),
    "neighbourhood": (
        neighbourhood((2, 1), (3, 4)),
        lambda b, h, q, k, o: abs(q // 4 - k // 4) < 2 and abs(q % 4 - k % 4) < 1,
    ),
    "neighbourhood 3-D": (
        neighbourhood((1, 2, 2), (2, 2, 3), first=1),
        lambda b, h, q, k, o: (
            min(q, k) >= 1
            and abs((q - 1) // 6 - (k - 1) // 6) < 1
            and abs((q - 1) // 3 % 2 - (k - 1) // 3 % 2) < 2
            and abs((q - 1) % 3 - (k - 1) % 3) < 2
        ),
    ),
    "documents": (documents([3, 0, 1, 5]), lambda b, h, q, k, o: of([3, 0, 1, 5], q) == of([3, 0, 1, 5], k)),
    "documents by row": (
        documents([[3, 6], [2, 2, 2]]),
        lambda b, h, q, k, o: of([[3, 6], [2, 2, 2]][b], q) == of([[3, 6], [2, 2, 2]][b], k),
    ),
    "streaming": (
        streaming([1, 0, 2], [2, None, 0]),
        lambda b, h, q, k, o: k <= q and (k < [1, 0, 2][h] or q - k < [2, 99, 0][h]),
    ),
    "blocks": (blocks(BLOCKS, 2), lambda b, h, q, k, o: bool(BLOCKS[edge(h, 2), edge(q // 2, 3), edge(k // 2, 5)])),
    "blocks of two sizes": (
        blocks(BLOCKS[0], (4, 2), first=1),
        lambda b, h, q, k, o: bool(BLOCKS[0, edge((q - 1) // 4, 3), edge(k // 2, 5)]),
    ),
    "user": (
        mask(lambda b, h, q, k: (abs(q - k) < at("width", h)) | ((q + h - 2 * k) // 3 == -1), tables=WIDTHS),
        lambda b, h, q, k, o: abs(q - k) < [1, 4, 0][h] or (q + h - 2 * k) // 3 == -1,
    ),
    "joined": (
        causal & ~(window(2) | sink(1)) | strided(5),
        lambda b, h, q, k, o: (k <= q and not (k > q - 2 or k < 1)) or (q - k) % 5 == 0,
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 11), (11, 5), (1, 6)])
def test_a_mask_is_its_rule(name: str, queries: int, keys: int) -> None:
    found, rule = LIBRARY[name]
    start = keys - queries
    for row in range(2):
        for head in range(3):
            expected = [[rule(row, head, i + start, j, start) for j in range(keys)] for i in range(queries)]
            assert found.table(queries, keys, head, row).tolist() == expected, (row, head)


@pytest.mark.parametrize("name", LIBRARY)
def test_text_reads_back(name: str) -> None:
    found = LIBRARY[name][0]
    again = parse(found.text, found.tables)
    assert again == found.named(found.text)
    assert again.keep == found.keep


def test_a_user_name_is_printed_and_the_text_still_reads_back() -> None:
    mine = mask(lambda b, h, q, k: (q - k) % 3 == 1, name="thirds")
    assert str(causal & mine) == "causal & thirds"
    assert (causal & mine).text == "(k <= q) & ((q - k) % 3 == 1)"
    assert parse((causal & mine).text).keep == (causal & mine).keep


def test_heads_and_rows_are_known_to_differ() -> None:
    assert streaming([1], [2]).per_head
    assert not streaming([1], [2]).per_row
    assert documents([[1], [1]]).per_row
    assert not (causal & window(3)).per_head


def test_tables_of_one_name_and_other_numbers_stay_apart() -> None:
    both = documents([4, 5]) & documents([2, 7])
    assert str(both) == "documents(document) & documents(document_2)"
    assert both.table(9, 9).tolist() == (documents([4, 5]).table(9, 9) & documents([2, 7]).table(9, 9)).tolist()
    widths = window(at("window", h), {"window": np.array([1, 2])})
    other = window(at("window", h), {"window": np.array([3, 1])})
    assert str(widths & other) == "window(window[h]) & window(window_2[h])"
    assert [(widths & other).table(9, 9, head).sum() for head in (0, 1)] == [45, 45]
    assert sorted((documents([4, 5]) | documents([4, 5])).tables) == ["document_first", "document_past"]


def test_equality_is_by_content_of_tables() -> None:
    assert streaming([1, 2], [3, 4]) == streaming([1, 2], [3, 4])
    assert hash(streaming([1, 2], [3, 4])) == hash(streaming([1, 2], [3, 4]))
    assert streaming([1, 2], [3, 4]) != streaming([1, 2], [3, 5])


def test_positions_broadcast_with_heads() -> None:
    found = streaming([1, 0], [1, 2])
    table = found.holds(np.arange(4)[:, None], np.arange(4), np.arange(2)[:, None, None])
    assert table.shape == (2, 4, 4)
    assert np.array_equal(table[1], found.table(4, 4, head=1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mask(lambda b, h, q, k: 0 <= k < q), "no truth value|cannot be read"),
        (lambda: mask(lambda b, h, q, k: q // 0 == k), "positive integer"),
        (lambda: mask(lambda b, h, q, k: q * 0.5 < k), "integers"),
        (lambda: mask(lambda b, h, q, k: k < at("far", h)), "reads table far by 1 indices, and it is not given"),
        (lambda: Mask("x", (causal & window(2)).keep, tables={"w": np.zeros(3)}), "does not read"),
        (lambda: parse("causal & windw(3)"), "no mask 'windw'"),
        (lambda: parse("causal &"), "cannot be read"),
        (lambda: parse("window(sum(k))"), "no integer expression"),
        (lambda: parse("documents(document)"), "not given"),
        (lambda: at("q", 1), "named"),
        (lambda: at("x0", 1), "named"),
        (lambda: at("for", 1), "named"),
        (lambda: streaming([1, 2], [3]), "2 and 1"),
        (lambda: chunk(0), "at least 1"),
    ],
)
def test_mistakes_are_said(make: Callable[[], object], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        make()


def test_spans_with_a_gap_are_refused() -> None:
    from rewrite.mask.library import spans

    good = documents([2, 3]).tables
    bad = {name: table.copy() for name, table in good.items()}
    bad["document_past"][0] = 1
    with pytest.raises(ValueError, match="no spans"):
        spans("document", bad)
