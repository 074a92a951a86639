"""What a target made of a site comes back from text and tensors bit by bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from passes import Target
from passes.find import find
from passes.gqa import GQA
from passes.mla import MLA
from passes.sparse import BlockSparse
from rewrite.capture import capture
from rewrite.checkpoint import require_checkpoint
from rewrite.data import digest
from rewrite.heads import Factor, Factors
from rewrite.layout import gather
from rewrite.site import Site
from rewrite.stored import narrowest, restored, stored

QWEN = Path(__file__).parents[2] / "examples" / "models" / "qwen3"


@pytest.fixture(scope="module")
def site() -> Site:
    return find(capture(QWEN, dynamic=False).static).sites[1]


def text(value: object) -> str:
    """Everything in a tree of dataclasses, tensors by their bits."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.numpy().tobytes().hex()}"
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, Site):
        return "".join(f"{n}={text(getattr(value, n))}" for n in value.__dataclass_fields__)
    return "".join(map(text, value)) if isinstance(value, tuple) else digest(value)


TARGETS = [GQA(3), MLA(cache=0.25), MLA(cache=0.25, form="rebuilt"), BlockSparse(density=0.5)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_there_and_back(target: Target, site: Site):
    made = target.rewrite(site, gather(site, lambda n: require_checkpoint(QWEN).tensor(n).float()), None)
    written, tensors = stored(made, site)
    again = restored(json.loads(json.dumps(written)), tensors, site)
    assert text(again) == text(made)
    assert again.site == made.site


def test_an_unchanged_site_is_the_source_itself(site: Site):
    weights = gather(site, lambda n: require_checkpoint(QWEN).tensor(n).float())
    made = replace(GQA(3).rewrite(site, weights, None), site=site, weights=weights, notes=("why",))
    written, tensors = stored(made, site)
    assert restored(written, tensors, site).site is site
    # what was left as it was takes no more room than in the checkpoint
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_what_is_one_tensor_stays_one(site: Site):
    down, up = torch.randn(2, 5, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    weights = gather(site, lambda n: require_checkpoint(QWEN).tensor(n).float())
    made = replace(GQA(3).rewrite(site, weights, None), factors=Factors(Factor(up, down), Factor(up + 1, down)))
    factors = restored(*stored(made, site), site).factors
    assert factors is not None
    assert factors.shared


def test_the_narrowest_type_that_loses_nothing():
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert narrowest(third).dtype == torch.float64
    assert narrowest(third.float().double()).dtype == torch.float32
    assert narrowest(third.bfloat16().double()).dtype == torch.bfloat16
    assert narrowest(torch.tensor([float("nan")], dtype=torch.float64)).dtype == torch.float64
