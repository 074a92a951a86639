"""Local tuning: less error on windows that did not fit, the same numbers from run to run, nothing outside the site."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from passes import tune, tune_heads, tune_latent, tune_lots, tune_scene
from passes.convert import convert_sites
from passes.factor import LowRank
from passes.find import Found, find
from passes.gqa import GQA
from passes.mla import MLA
from passes.sparse import BlockSparse
from passes.tune import Tuning
from rewrite.calibration import Windows, batches
from rewrite.capture import capture
from rewrite.heads import Change
from rewrite.mask import causal, window
from rewrite.opened import open_model
from rewrite.program import Program
from rewrite.site import Site

MODELS = Path(__file__).parents[2] / "examples" / "models"
FIRST = "model.layers.0.self_attn"
TARGETS = (GQA(2, polish=0), MLA(cache=0.125, polish=0), LowRank(MLA(rank=48)))


@cache
def opened(kind: str) -> tuple[Program, Found, list[Any]]:
    """A shipped model and a few windows of its calibration text."""
    model = open_model(MODELS / kind)
    program = capture(model.working, None)
    windows = batches(MODELS / "calibration.txt", {"input_ids": 0}, Windows(64, 32), model.tokenizer)
    return program, find(program.static), windows


def converted(kind: str, target: Any, tuning: Tuning | None) -> Change:
    """The first attention of the model, from few windows."""
    program, found, windows = opened(kind)
    return convert_sites(program, found, {FIRST: target}, windows, lambda *_: None, tuning)[FIRST]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_tuning_lowers_the_error(kind: str, target: Any) -> None:
    plain, tuned = converted(kind, target, None), converted(kind, target, Tuning(40))
    assert plain.error is not None
    assert tuned.error is not None
    assert tuned.error < plain.error


def test_tuning_is_the_same_every_time_and_hangs_on_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = MLA(cache=0.125, polish=0)
    monkeypatch.setattr(tune_lots, "TOKENS", 256)
    once, again, other = (converted("llama", target, Tuning(10, seed)) for seed in (0, 0, 1))
    assert once.rewritten.latents is not None
    assert again.rewritten.latents is not None
    assert other.rewritten.latents is not None
    assert torch.equal(once.rewritten.latents.down, again.rewritten.latents.down)
    assert not torch.equal(once.rewritten.latents.down, other.rewritten.latents.down)


def test_a_tiny_step_leaves_heads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps and frames that tuning starts from give back the closed form's own matrices."""
    monkeypatch.setattr(tune, "RATES", (1e-4,))
    plain, tuned = converted("llama", GQA(2, polish=0), None), converted("llama", GQA(2, polish=0), Tuning(1))
    for which in ("q", "k", "v"):
        a, b = (getattr(c.rewritten.weights, which).weight for c in (plain, tuned))
        assert 0 < float((a - b).norm() / a.norm()) < 1e-3
    assert tuned.error is not None
    assert plain.error is not None
    assert tuned.error < plain.error


def test_steps_that_help_nobody_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that throws everything about gives way to a smaller one, and where none is left nothing changes."""
    target = GQA(2, polish=0)
    plain = converted("llama", target, None)
    monkeypatch.setattr(tune, "RATES", (1e3, 1e-2))
    assert (converted("llama", target, Tuning(8)).error or 1.0) < (plain.error or 0.0)
    monkeypatch.setattr(tune, "RATES", (1e3,))
    left = converted("llama", target, Tuning(8)).rewritten
    assert torch.equal(left.weights.out, plain.rewritten.weights.out)
    assert any("tuning left out" in note for note in left.notes)


def test_a_mask_has_nothing_to_learn() -> None:
    plain, tuned = (converted("llama", BlockSparse(causal & window(8)), tuning) for tuning in (None, Tuning(40)))
    assert tuned.error == plain.error
    assert any("not tuned, a mask holds no numbers to fit" in note for note in tuned.rewritten.notes)


@pytest.mark.parametrize("target", [*TARGETS, MLA(cache=0.125, form="rebuilt", polish=0)], ids=str)
def test_one_table_of_positions_gives_what_probabilities_give(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel on a mask for all windows learns what the general form learns."""
    fused = converted("llama", target, Tuning(8))
    assert tune_scene.fuses(fused.site)

    def never(_: Site) -> bool:
        return False

    for module in (tune_scene, tune_heads, tune_latent):
        monkeypatch.setattr(module, "fuses", never)
    general = converted("llama", target, Tuning(8))
    # axes of alike gradients may stand in any direction, so that weights agree less than what they give
    assert fused.error == pytest.approx(general.error, rel=3e-3)


def test_a_step_in_pieces_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    target = MLA(cache=0.125, polish=0)
    whole = converted("llama", target, Tuning(4))
    monkeypatch.setattr(tune_lots, "SCORES", 1)
    pieces = converted("llama", target, Tuning(4))
    assert pieces.error == pytest.approx(whole.error, rel=1e-3)
