"""Specs of kernels, their text, the model of the chip, and what is refused."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codegen import chip, launch, tune
from codegen.chip import HOPPER, INSTINCT, Config
from codegen.compiled import written
from codegen.given import in_rows, strides, tensor_values
from codegen.loops import loops, pattern
from codegen.options import Options
from codegen.spec import KernelSpec, Phase, chunks
from codegen.triton import arguments, source
from rewrite.mask import Mask, all_, blocks, causal, documents, mask, sink, streaming, strided, window

PHASES: tuple[Phase, ...] = ("forward", "decode", "combine", "delta", "dkdv", "dq")
PLAIN = KernelSpec("forward", "bf16", 64, 64, pattern(causal), tiles=(128, 64), warps=8, stages=3)


@pytest.mark.parametrize(
    ("dim", "sizes"),
    [(64, [64]), (96, [64, 32]), (80, [64, 16]), (192, [128, 64]), (576, [512, 64]), (72, [64, 16]), (8, [16])],
)
def test_heads_are_cut_into_powers_of_two(dim: int, sizes: list[int]):
    found = chunks(dim)
    assert [c.size for c in found] == sizes
    assert [c.first for c in found] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert [c.ragged for c in found] == [False] * (len(sizes) - 1) + [sum(sizes) > dim]


def test_equal_specs_emit_equal_text_and_others_do_not():
    again = KernelSpec("forward", "bf16", 64, 64, pattern(causal), tiles=(128, 64), warps=8, stages=3)
    assert again == PLAIN
    assert source(again) == source(PLAIN)
    others = [replace(PLAIN, dv=96), replace(PLAIN, softcap=True), replace(PLAIN, group=2), replace(PLAIN, warps=4)]
    others += [replace(PLAIN, mask=pattern(causal & window(8))), replace(PLAIN, mask=pattern(causal & window(9)))]
    assert len({s.name for s in (PLAIN, *others)}) == 1 + len(others)


def test_a_spec_prints_on_a_line():
    assert str(PLAIN) == "forward bf16 dqk=64 dv=64 mask=k<=q tiles=128x64 warps=8 stages=3"
    more = replace(PLAIN, group=4, packed=True, sinks=True)
    assert str(more) == "forward bf16 dqk=64 dv=64 mask=k<=q group=4 packed sinks tiles=128x64 warps=8 stages=3"


def test_what_tables_hold_is_no_part_of_a_kernel():
    assert pattern(documents([3, 5])) == pattern(documents([4, 1, 9]))
    assert pattern(streaming([1, 2], [None, 4])) == pattern(streaming([0, 0], [7, 9]))
    assert pattern(causal & window(3)) != pattern(causal & window(4))


def test_tables_do_not_take_a_kernels_names():
    """A table may be called as any of the kernel's own variables is."""
    from rewrite.mask import at

    clash = mask(lambda b, h, q, k: k <= at("offset_of", h) + q, tables={"offset_of": torch.zeros(2).long().numpy()})
    names = [a.name for a in arguments(replace(PLAIN, mask=pattern(clash)))]
    assert "table_offset_of" in names
    assert "offset_of" not in names


MASKS: tuple[Mask, ...] = (
    all_, causal, causal & (sink(4) | window(9)), documents([3, 5]), causal & strided(8), streaming([1, 2], [None, 3]),
    blocks([[[True, False], [True, True]]], 16), ~causal,
)  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("index", range(len(MASKS)))
def test_text_is_python_and_reads_its_arguments(phase: Phase, index: int):
    """Whatever a kernel reads is an argument, a name of Triton, or assigned in it."""
    plain = KernelSpec(phase, "fp16", 96, 72, pattern(MASKS[index]))
    everything = replace(
        plain,
        group=3,
        packed=phase not in ("dkdv", "delta", "combine"),
        softcap=True,
        alibi=True,
        bias=True,
        lengths=True,
        sinks=phase in ("forward", "decode"),
        dbias=phase == "dq",
    )
    for spec in (plain, everything):
        function = ast.parse(source(spec)).body[-1]
        assert isinstance(function, ast.FunctionDef)
        taken = [a.arg for a in function.args.args]
        assert taken == [a.name for a in arguments(spec)]
        names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
        stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        read = {n.id for n in names if isinstance(n.ctx, ast.Load)}
        assert read <= stored | set(taken) | {"tl", "triton", "range", "float"}
        assert set(taken) <= read | {"scale", "N_all"}, "an argument is passed for nothing"


def test_a_kernel_to_read(golden: Callable[[str], None]):
    spec = KernelSpec(
        "forward", "bf16", 96, 64, pattern(causal & (sink(64) | window(1024))), group=4, packed=True, sinks=True
    )
    golden(source(spec))


def test_full_tiles_are_not_masked():
    text = source(PLAIN)
    full, masked = text.split("for i in range(")[1:]
    assert full.startswith("0, full_end)")
    assert masked.startswith("0, masked_end)")
    assert "mask=" not in full.split("for i")[0]
    assert "k <= q" not in full
    assert "k <= q" in masked


def test_loops_name_what_is_used_twice():
    found = loops(pattern(causal & (sink(4) | window(9))), "k")
    assert found.shared
    assert len(found.full.segments) >= 2
    assert not found.listed
    assert loops(pattern(MASKS[6]), "k").listed


def test_specs_that_make_no_sense():
    with pytest.raises(ValueError, match="tiles are powers of two of at least 16, and these are 24x64"):
        replace(PLAIN, tiles=(24, 64))
    with pytest.raises(ValueError, match="first 128 columns of keys that have 64"):
        replace(PLAIN, latent=True, dv=128)
    with pytest.raises(ValueError, match="gradient of a bias is written by dq, not by forward"):
        replace(PLAIN, dbias=True)


def test_shared_memory_over_the_limit_is_a_sentence():
    wide = KernelSpec("forward", "bf16", 256, 256, pattern(causal), tiles=(128, 64), warps=8, stages=2)
    assert chip.shared(wide) == 196_608
    assert chip.refuse(wide) is None
    over = replace(wide, stages=3)
    assert chip.refuse(over) == (
        "tiles of 128x64 with 3 stages need about 262,144 bytes of shared memory, and a block on sm_90 has 232,448: "
        "fewer stages or keys would fit"
    )


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("phase", ["forward", "decode", "dkdv", "dq"])
def test_default_tiles_fit(phase: Phase, dim: int):
    for dtype in ("bf16", "fp32"):
        for bias in (False, True):
            spec = KernelSpec(phase, dtype, dim, dim, pattern(causal), bias=bias)
            for rows in (1, 16, 17, 64, 65, 4096):
                placed = spec.with_config(chip.default(spec, rows, HOPPER))
                assert chip.refuse(placed) is None, str(placed)
                assert spec.with_config(chip.default(spec, rows, INSTINCT)).warps == 4


def test_few_rows_take_small_tiles():
    spec = KernelSpec("decode", "bf16", 128, 128, pattern(causal))
    assert [chip.default(spec, rows).rows for rows in (1, 16, 17, 33, 64, 65)] == [16, 16, 32, 64, 64, 128]
    assert [tune.bucket(rows) for rows in (1, 16, 17, 33, 64, 65, 9000)] == [16, 16, 32, 64, 64, 65, 65]


def test_candidates_begin_with_the_default_and_fit():
    for phase in ("forward", "decode", "dkdv", "dq"):
        spec = KernelSpec(phase, "bf16", 256, 256, pattern(causal))
        found = tune.candidates(spec, 4096)
        assert found[0] == chip.default(spec, 4096)
        assert len(set(found)) == len(found) > 1
        assert all(chip.refuse(spec.with_config(c)) is None for c in found)


def test_the_fastest_is_taken_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REATTN_CACHE", str(tmp_path))

    class OutOfResources(Exception):
        """As Triton's."""

    def run(configs: dict[str, Config]) -> Config:
        if configs["forward"].keys == 128:
            raise OutOfResources
        ran.append(configs["forward"])
        return ran[-1]

    def clock(again: Callable[[], Config]) -> float:
        return abs(again().keys - 32) + again().warps

    ran: list[Config] = []
    best = tune.fastest(PLAIN, 4096, run, clock, {})  # type: ignore[arg-type]
    assert (best.keys, best.warps) == (32, 4)
    tune.store(PLAIN, 4096, best)
    assert tune.tuned(replace(PLAIN, tiles=(64, 64), warps=4), 70) == best, "tiles and lengths are no part of the key"
    assert tune.tuned(PLAIN, 16) is None
    assert tune.tuned(replace(PLAIN, dv=128), 4096) is None


def test_files_are_written_once_and_named_by_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REATTN_CACHE", str(tmp_path))
    path = written(PLAIN)
    before = path.stat().st_mtime_ns
    assert path.read_text() == source(PLAIN)
    assert written(PLAIN) == path
    assert path.stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tensors_that_kernels_cannot_take():
    q = torch.zeros(1, 3, 4, 16, dtype=torch.float16)
    k = torch.zeros(1, 2, 4, 16, dtype=torch.float16)
    options = Options(scale=1.0)
    assert "run on a GPU, and the queries are on cpu" in str(launch.refuse(q, k, k, options))
    assert "generated for fp16, bf16 and fp32" in str(launch.refuse(q.double(), k.double(), k.double(), options))
    assert "of one type" in str(launch.refuse(q, k.float(), k, options))
    with pytest.raises(ValueError, match="the CPU has its own back end"):
        launch.forward(q, k, k, causal, options)


def test_a_broadcast_bias_is_not_copied():
    q, k = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 7, 16)
    bias = torch.zeros(2, 1, 1, 7)
    values = tensor_values(q, k, k, Options(1.0, bias=bias))
    assert values["bias"].data_ptr() == bias.data_ptr()
    assert [values[f"bias_{axis}"] for axis in "bhq"] == [7, 0, 0]
    one = tensor_values(q, k, k, Options(1.0, bias=torch.zeros(1, 4, 5, 1)))["bias"]
    assert one.stride(-1) == 1


def test_heads_of_eight_are_read_in_eights():
    """What the text promises of strides is made true before a launch, and an axis of one has no stride."""
    text = source(KernelSpec("dq", "fp16", 72, 64, pattern(causal)))
    assert "k_n = tl.multiple_of(k_n, 8)" in text
    assert "v_n = tl.multiple_of" not in text
    odd = torch.zeros(1, 2, 5, 73)[..., :72]
    assert in_rows(odd).stride() == (720, 360, 72, 1)
    even = torch.zeros(1, 5, 2, 72).transpose(1, 2)
    assert in_rows(even) is even
    assert strides("k", "bhn", even) == {"k_b": 0, "k_h": 72, "k_n": 144}


def test_lists_of_rows_of_other_lengths():
    """Each row's tiles are those of its own lengths; a row without queries has none."""
    table = [[[True, False, True], [False, True, True], [True, True, False]]]
    listed = causal & blocks(table, 16)
    q, k = torch.zeros(3, 1, 48, 16), torch.zeros(3, 1, 48, 16)
    spec = KernelSpec("forward", "fp16", 16, 16, pattern(listed), tiles=(16, 16), lengths=True)
    lengths = torch.tensor([48, 16, 0]), torch.tensor([48, 32, 20])
    found = launch.Call(q, k, k, listed, Options(1.0, lengths=lengths), {}).lists(spec)
    assert found["list_b"] == 3
    assert (found["full_counts"] + found["masked_counts"]).flatten().tolist() == [1, 1, 2, 1, 0, 0, 0, 0, 0]
    alone = launch.Call(q, k, k, listed, Options(1.0), {}).lists(spec)
    assert alone["list_b"] == alone["list_h"] == 0
