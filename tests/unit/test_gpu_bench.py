"""The GPU bench where there is no GPU: its arguments, what it would measure, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu_cases import Shape, dense_shapes, mask_mod, sparse_masks, streaming_heads
from bench.gpu_page import page
from rewrite.mask import causal, streaming, window

DENSE = "dense 2x4096 heads 8/2 dim 64"


def test_arguments():
    told = gpu.parser().parse_args(["--parts", "dense,decode", "--minutes", "8", "--longest", "8192"])
    assert (told.parts, told.minutes, told.longest, told.cases, told.fresh) == ("dense,decode", 8.0, 8192, 60, False)


def test_a_part_that_does_not_exist(capsys: pytest.CaptureFixture[str]):
    assert gpu.main(["--parts", "dense,fast"]) == 2
    assert "no part is called fast; there are correct, ceiling, dense" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]):
    assert gpu.main([]) == 2
    assert "no GPU is at hand" in capsys.readouterr().out


def test_correctness_comes_first_and_keys_are_one_to_a_row():
    keys = [key for key, _ in gpu.tasks(gpu.PARTS, 8192, 10)]
    assert len(set(keys)) == len(keys)
    parts = [key.split()[0] for key in keys]
    assert parts == sorted(parts, key=gpu.PARTS.index)
    assert parts[0] == "correct"
    assert {key for key, _ in gpu.tasks(["decode"], 0, 1)} == {f"decode {n}" for n in gpu.CONTEXTS}


def test_dense_shapes_cover_the_goals():
    shapes = dense_shapes(65_536)
    assert {s.tokens for s in shapes} == {4096, 8192, 16_384, 32_768, 65_536}
    assert {(s.dim, s.heads // s.kv_heads) for s in shapes} == {(64, 1), (64, 4), (128, 1), (128, 4)}
    assert Shape(8, 8, 64, 4096).batch == 8
    assert Shape(1, 1, 1, 32_768).flops(0.5) == 2 * 2 * 32_768**2 / 2


def test_windows_keep_the_share_of_causal_pairs_that_they_say():
    tokens = 32_768
    shares = [float(m.density(tokens, tokens)) * 2 for m in list(sparse_masks(tokens).values())[:5]]
    for share, wanted in zip(shares, (0.5, 0.25, 0.1, 0.05, 0.03), strict=True):
        assert share == pytest.approx(wanted, abs=0.006)


def test_masks_as_flex_attention_takes_them():
    mask = streaming([2, 3], [None, 4])
    rule = mask_mod(mask, "cpu")
    at = torch.arange(12)
    for head in range(2):
        got = rule(torch.tensor(0), torch.tensor(head), at[:, None], at[None])
        assert torch.equal(got, torch.from_numpy(mask.table(12, 12, head=head)))
    got = mask_mod(causal & window(3), "cpu")(torch.tensor(0), torch.tensor(0), at[:, None], at[None])
    assert torch.equal(got, torch.from_numpy((causal & window(3)).table(12, 12)))


def test_half_of_the_heads_stream_and_groups_agree():
    shape = Shape(8, 2, 64, 4096)
    mask = streaming_heads(shape)
    tables = [mask.table(1, 3000, head=h) for h in range(8)]
    assert [int(t.sum()) == 3000 for t in tables] == [False] * 4 + [True] * 4


def test_what_fails_is_a_row_and_what_is_measured_is_kept(tmp_path: Path):
    path = tmp_path / "gpu.jsonl"
    book = gpu.Notebook(path, float("inf"))
    book.measure("a", lambda: {"forward": 1.0})
    book.measure("a", lambda: pytest.fail("measured twice"))
    book.measure("b", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    late = gpu.Notebook(path, 0.0)
    late.measure("c", lambda: pytest.fail("there was no time"))
    assert late.rows["a"]["forward"] == 1.0
    assert "ZeroDivisionError" in late.rows["b"]["failed"]
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_page():
    rows = [
        {"key": "correct prefill fp16 x", "errors": {"o": 0.5}},
        {"key": "correct decode fp16 y", "errors": {"o": 2.0}},
        {"key": "ceiling", "matmul": 800.0, "copy": 4.0},
        {"key": f"{DENSE} ours", "forward": 1.0, "backward": 2.0},
        {"key": f"{DENSE} cudnn", "forward": 0.5, "backward": 2.0},
        {"key": f"{DENSE} flex", "failed": "OutOfMemoryError: x"},
        {"key": "sparse causal ours", "forward": 10.0, "backward": 30.0, "density": 0.5},
        {"key": "sparse window(64) ours", "forward": 1.1, "backward": 3.0, "density": 0.05},
        {"key": "sparse window(64) flex", "forward": 2.0, "backward": 4.0},
    ]
    text, wrong = page(rows, "Test-GPU")
    assert wrong == ["correct decode fp16 y: o is off by 2.0 of its bound"]
    batch = Shape(8, 2, 64, 4096).batch
    work = 2 * 2 * batch * 8 * 4096**2 * 64 / 2 / 1e9
    assert f"| {work:.0f} |  | {2 * work:.0f} |  | 0.50 |  | {work / 800:.2f} |" in text
    assert "| window(64) | 0.100 | 1.100 | 1.10 | 2.000 | 3.000 | 1.00 | 4.000 |" in text
    assert "OutOfMemoryError" in text
    assert "At least 0.75 of cuDNN in 0" in text
