"""Dynamic selection against its definitions, written out with loops over small inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from codegen import oracle
from codegen.options import Options
from codegen.select import Antidiagonal, Blocks, Pooled, VerticalSlash
from rewrite import attention
from rewrite.mask import causal

torch.set_num_threads(1)


def drawn(tokens: int, keys: int | None = None, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, heads, tokens, 8, generator=make, dtype=torch.float64)
    return q, 2 * torch.randn(2, kv_heads, keys or tokens, 8, generator=make, dtype=torch.float64)


def prefix(scores: list[float], forced: list[int], threshold: float) -> list[int]:
    """The forced ones, then the best others, until they sum to the threshold."""
    order = forced + sorted(set(range(len(scores))) - set(forced), key=lambda j: -scores[j])
    taken, held = [], 0.0
    for j in order:
        if j not in forced and held >= threshold * sum(scores):
            break
        taken.append(j)
        held += scores[j]
    return sorted(taken)


def antidiagonal_by_hand(q: Tensor, k: Tensor, rule: Antidiagonal) -> list[list[int]]:
    """Blocks of every row for one head; tokens beyond the end are zeros, groups beyond it are not there."""
    s, cells, dim = rule.stride, rule.block // rule.stride, q.shape[-1]
    tokens = q.shape[0]
    groups = math.ceil(tokens / s)
    rows = math.ceil(tokens / rule.block)
    mass = torch.zeros(rows * cells, rows * cells, dtype=torch.float64)
    for i in range(groups):
        sums = []
        for j in range(i + 1):
            pairs = ((i * s + s - 1 - a, j * s + a) for a in range(s))
            sums.append(sum(float(q[x] @ k[y]) for x, y in pairs if max(x, y) < tokens))
        mass[i, : i + 1] = torch.softmax(torch.tensor(sums, dtype=torch.float64) / (dim**0.5 * s), -1)
    blocks = mass.reshape(rows, cells, rows, cells).sum((1, 3))
    return [prefix(blocks[i, : i + 1].tolist(), sorted({0, i}), rule.threshold) for i in range(rows)]


def rows_of(found: Blocks, batch: int, head: int) -> list[list[int]]:
    counts, index = found.counts[batch, head].tolist(), found.index[batch, head].tolist()
    return [row[:n] for row, n in zip(index, counts, strict=True)]


@pytest.mark.parametrize("tokens", [64, 151])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
def test_antidiagonal_scores(tokens: int, threshold: float) -> None:
    q, k = drawn(tokens)
    rule = Antidiagonal(threshold, block=16, stride=4)
    found = rule(q, k)
    for batch in range(2):
        for head in range(4):
            assert rows_of(found, batch, head) == antidiagonal_by_hand(q[batch, head], k[batch, head // 2], rule)


@pytest.mark.parametrize(("rule", "kept"), [(Pooled(count=3, block=8), 3), (Pooled(share=0.5, block=8), None)])
def test_pooled_takes_the_best_means(rule: Pooled, kept: int | None) -> None:
    q, k = drawn(68)
    found = rule(q, k)
    for i in range(9):
        own = slice(8 * i, 8 * i + 8)
        scores = [float(q[0, 3, own].mean(0) @ k[0, 1, 8 * j : 8 * j + 8].mean(0)) for j in range(i + 1)]
        forced = {0, i}
        count = kept or math.ceil(0.5 * (i + 1))
        others = sorted(set(range(i + 1)) - forced, key=lambda j: -scores[j])
        assert rows_of(found, 0, 3)[i] == sorted([*forced, *others[: max(0, count - len(forced))]])


def test_vertical_slash_takes_the_best_columns_and_diagonals() -> None:
    q, k = drawn(90)
    rule = VerticalSlash(vertical=9, slash=12, last=16, forced=4)
    found = rule(q, k)
    for batch, head in ((0, 0), (1, 3)):
        rows = range(74, 90)
        products = {
            (i, j): float(q[batch, head, i] @ k[batch, head // 2, j]) / 8**0.5 for i in rows for j in range(i + 1)
        }
        total = {i: sum(math.exp(products[i, j]) for j in range(i + 1)) for i in rows}
        column, diagonal = [0.0] * 90, [0.0] * 90
        for (i, j), s in products.items():
            column[j] += math.exp(s) / total[i]
            diagonal[i - j] += math.exp(s) / total[i]
        best = [
            {*range(4), *sorted(range(4, 90), key=lambda j, of=of: -of[j])[: count - 4]}
            for of, count in ((column, 9), (diagonal, 12))
        ]
        for i in range(90):
            expected = {j for j in range(i + 1) if j in best[0] or i - j in best[1]}
            assert (
                set(torch.tensor(found.mask().table(90, 90, head, batch))[i].nonzero().flatten().tolist()) == expected
            )


@pytest.mark.parametrize("rule", [Antidiagonal(0.6, 32, 8), Pooled(count=2, block=32)])
@pytest.mark.parametrize(("queries", "keys"), [(96, 96), (100, 164), (7, 39)])
def test_blocks_as_a_mask(rule: Antidiagonal | Pooled, queries: int, keys: int) -> None:
    """The mask reads what the blocks say, also for queries that stand behind a cache."""
    q, k = drawn(queries, keys)
    found = rule(q, k)
    table = found.table
    at_q = torch.arange(queries)[:, None] + keys - queries
    for head in range(4):
        wide = table[1, head].repeat_interleave(32, 0)[:queries].repeat_interleave(32, 1)[:, :keys]
        expected = wide & (torch.arange(keys) <= at_q)
        assert torch.equal(torch.from_numpy(found.mask().table(queries, keys, head, 1)), expected)
    assert 0 < found.density <= 1


def test_chunks_of_a_prompt_choose_what_the_whole_prompt_chooses() -> None:
    """The last queries alone over all keys give the last rows of the whole: no row hangs on another."""
    q, k = drawn(128)
    rule = Antidiagonal(0.7, 32, 8)
    whole, part = rule(q, k).table, rule(q[:, :, 64:], k).table
    assert torch.equal(whole[:, :, 2:], part)


def test_many_rows_are_scored_in_parts() -> None:
    """More rows of blocks than are held at once; a threshold of 1 keeps all, a count keeps no more than it says."""
    q, k = drawn(4 * 40)
    everything = Antidiagonal(1.0, 4, 2)(q, k)
    assert torch.equal(everything.table[0, 0], torch.ones(40, 40, dtype=torch.bool).tril())
    assert int(Pooled(count=5, block=4)(q, k).counts.max()) == 5


@pytest.mark.parametrize("rule", [Antidiagonal(0.5, 32, 8), Pooled(share=0.3, block=32), VerticalSlash(20, 30, 16, 8)])
def test_attention_over_a_selection(rule: Antidiagonal | Pooled | VerticalSlash) -> None:
    q, k = drawn(200)
    found = rule(q, k)
    chosen = found.mask()
    expected, _ = oracle.attention(q, k, k, chosen, Options(0.3))
    torch.testing.assert_close(attention(q, k, k, chosen, scale=0.3), expected)
    dense, _ = oracle.attention(q, k, k, causal, Options(0.3))
    assert not torch.allclose(expected, dense)


def test_what_cannot_be_chosen_is_refused() -> None:
    q, k = drawn(32, 40)
    with pytest.raises(
        ValueError, match="blocks of 16 must end where the queries begin: 32 queries over 40 keys begin at 8"
    ):
        Pooled(count=1, block=16)(q, k)
    with pytest.raises(ValueError, match="blocks of 10 are no multiple of the stride 4"):
        Antidiagonal(0.9, 10, 4)(q, k)
    with pytest.raises(ValueError, match="needs either a count of blocks or a share of them"):
        Pooled()(q, k)


def test_rules_describe_themselves() -> None:
    assert str(Antidiagonal(0.8)) == "antidiagonal(threshold=0.8, block=128, stride=16)"
    assert str(Pooled(share=0.25)) == "pooled(share=0.25, block=64)"
    assert str(VerticalSlash(30, 800)) == "vertical_slash(30, 800, last=64, forced=30)"
