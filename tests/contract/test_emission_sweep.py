"""Every type of the zoo at half the kv heads: what is emitted is right, and what is not ends in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from bench.emission import Reader, entries, halved, measure, plain
from passes.find import find
from rewrite import GQA
from rewrite.capture import capture
from rewrite.emit import emit
from rewrite.site import Output
from tests.zoo import ENTRIES, Entry

pytestmark = pytest.mark.slow
SILENT = [e for e in ENTRIES if e.family not in ("hand-written", "decoder", "seq2seq")]
"""Most of these generate no text."""


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Reader() as running:
        yield running


@pytest.mark.parametrize("entry", entries(), ids=plain)
def test_no_emission_is_wrong(entry: Entry, reader: Reader, tmp_path: Path) -> None:
    row = measure(entry, tmp_path)
    if row is None:
        pytest.skip("generates no text")
    assert not row.note.startswith("RuntimeError"), row.note
    if row.forms:
        reader.load(row, tmp_path)
        assert row.right, row


@pytest.mark.parametrize("entry", SILENT, ids=lambda e: e.name)
def test_what_generates_nothing_is_emitted_or_refused(entry: Entry) -> None:
    model, _ = entry.build()
    if not isinstance(model, PreTrainedModel) or model.can_generate():
        pytest.skip("generates text" if isinstance(model, PreTrainedModel) else "no PreTrainedModel")
    program = capture(model, dynamic=False)
    sites = [s for s in find(program.static).sites if s.k.heads % 2 == 0 and isinstance(s.out, Output)]
    changes = {s.name: (s, halved(s, model)) for s in sites if GQA(s.k.heads // 2).refuse(s) is None}
    if not changes:
        pytest.skip("nothing to convert")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    made = emit(model, changes, program.kwargs)
    assert set(made.forms) | set(made.refused) == set(changes)
    assert all(made.refused.values())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "the original was written to"
