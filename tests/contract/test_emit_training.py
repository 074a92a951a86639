"""Training steps are compared where the original repeats its own, and what cannot be compared is said."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from rewrite.emit import emit
from rewrite.emit.validate import differs, unsteady
from rewrite.site import Site
from tests.contract.by_hand import changes
from tests.contract.tiny import ALL, inputs


class FromNumpy(LlamaForCausalLM):
    """Drops tokens in training, drawn from numpy and random as some speech models do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if self.training:
            out.logits = out.logits * (np.random.random() + random.random())
        return out


class FromAnywhere(LlamaForCausalLM):
    """Noise in training that no seed repeats."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if self.training:
            generator = torch.Generator()
            generator.seed()
            out.logits = out.logits + torch.randn(out.logits.shape, generator=generator)
        return out


class Counting(LlamaForCausalLM):
    """Keeps a running mean of what it was trained on, and uses it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("seen", torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if self.training:
            self.seen.mul_(0.9).add_(0.1 * out.logits.detach().abs().mean())
        out.logits = out.logits * self.seen
        return out


def made(kind: type[PreTrainedModel]) -> tuple[PreTrainedModel, list[Site]]:
    model, sites = ALL["llama"]()
    other = kind(model.config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other, sites


def test_every_generator_starts_anew_and_goes_on_where_it_was() -> None:
    model, sites = made(FromNumpy)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    emitted = emit(model, changes(model, sites, 2), inputs(model))
    assert set(emitted.forms.values()) == {"stock"}
    assert not any("training" in reason for why in emitted.why.values() for reason in why)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_what_no_seed_repeats_is_left_out_and_said() -> None:
    model, sites = made(FromAnywhere)
    emitted = emit(model, changes(model, sites, 2), inputs(model))
    assert set(emitted.forms.values()) == {"stock"}
    for name in emitted.forms:
        assert emitted.why[name][-1].startswith("training steps are not compared: the original's own differ")
    reference = emit(model, changes(model, sites, 4), inputs(model)).model
    assert differs(reference, emitted.model, inputs(model), training=False) is not None, "the rest is compared"


@pytest.mark.parametrize("kind", [LlamaForCausalLM, FromNumpy])
def test_what_repeats_itself_is_steady(kind: type[PreTrainedModel]) -> None:
    model, _ = made(kind)
    assert unsteady(model, inputs(model)) is None


def test_running_sums_stay_what_they_were() -> None:
    """Training steps of copies that share the original's tensors must not train the original."""
    model, sites = made(Counting)
    emitted = emit(model, changes(model, sites, 2), inputs(model))
    assert float(model.seen) == 1.0
    assert float(emitted.model.seen) == 1.0
