"""Folders of models with low-rank projections load and compute where this project cannot be imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from passes.mla import MLA
from tests import bare
from tests.contract.test_factored import captured, made

CHILD = """
import pathlib, torch, transformers
for top in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    given = torch.load(top / "inputs.pt")
    auto = transformers.AutoModelForSeq2SeqLM if "decoder_input_ids" in given else transformers.AutoModel
    for place, then in ((top / "first", top / "again"), (top / "again", None)):
        model, info = auto.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), (top, info)
        with torch.no_grad():
            torch.save(model.eval()(**given)[0], f"{place}.out.pt")
        if then is not None:
            model.save_pretrained(then)
"""


def test_bare_process(tmp_path: Path) -> None:
    """Keys and values apart, one latent of both, packed, and beside a cache of latents; saved again by the child."""
    cases: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, target, full in (
        ("bert-sdpa", MLA(rank=20), False),
        ("bert-sdpa", MLA(rank=20), True),
        ("modernbert-sdpa", MLA(rank=20), False),
        ("t5-sdpa", MLA(cache=0.25), False),
    ):
        _, given, _, _ = captured(name)
        model, _ = made(name, target, full=full)
        cases[f"{name}-{full}"] = model, {n: v for n, v in given.items() if n != "use_cache"}
    bare.write(tmp_path / "models", cases, "first")
    done = bare.run(CHILD, str(tmp_path / "models"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (model, given) in cases.items():
        with torch.no_grad():
            expected = model(**given)[0]
        for place in ("first", "again"):
            assert torch.equal(torch.load(tmp_path / "models" / name / f"{place}.out.pt"), expected), (name, place)
