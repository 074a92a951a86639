"""Laws of every target on every kind of site: nothing is lost where nothing is taken away, and what is emitted computes
what was rewritten."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passes.assign import barred
from passes.convert import convert_sites, named_tensors
from passes.find import find
from passes.gqa import GQA
from passes.lower import lower
from rewrite import convert
from rewrite.capture import capture
from rewrite.layout import expanded
from tests.zoo import BY_NAME, ENTRIES
from tests.zoo.captured import captured

SPELLINGS = [e.name for e in ENTRIES if e.family == "hand-written"]
LIBRARY = ["qwen3-gqa-eager", "gemma2-eager", "bloom-eager", "gpt_oss-eager", "t5-eager", "whisper-eager", "bert-sdpa",
           "vit-eager"]  # fmt: skip


def main_output(result: object) -> Tensor:
    return next(x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point())


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("name", LIBRARY)
def test_all_heads_kept_changes_no_output(name: str):
    model, inputs = BY_NAME[name].build()
    own = None if hasattr(model, "config") else inputs
    found = find(capture(model, own, dynamic=False).static)
    made = convert(model, GQA(found.sites[0].kv_heads), inputs=own, check=False)
    assert made.rewrite_report.converted > 0
    with torch.no_grad():
        call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(*inputs))
        assert apart(main_output(call(model)), main_output(call(made))) <= 1e-5


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_graph_computes_what_was_rewritten(name: str):
    """At all heads the original; at fewer the original with the merged heads' weights in every place of the old."""
    model, inputs, program, found = captured(name)
    tensors, shared = named_tensors(model), barred(found)
    sites = {s.name: s for s in found.sites if s.name not in shared}
    if not sites:
        assert all("is also read by" in why for why in shared.values())
        return
    for fewer in (False, True):
        wanted = {
            n: GQA(s.k.heads // 2 if fewer else s.k.heads) for n, s in sites.items() if s.k.heads > 1 or not fewer
        }
        targets = {n: t for n, t in wanted.items() if t.refuse(sites[n]) is None}
        changes = convert_sites(program, found, targets, None, lambda _name, _done, _total: None)
        pairs = {n: (c.site, c.rewritten) for n, c in changes.items()}
        if not pairs:
            continue
        graph = lower(program.dynamic or program.static, pairs, tensors)
        reference = with_weights(model, pairs, tensors)
        with torch.no_grad():
            wanted_output, got = main_output(reference(*inputs)), main_output(graph(*inputs))
            assert apart(wanted_output, got) <= 1e-5
            loss = apart(main_output(model(*inputs)), got)
        assert (loss > 1e-4) if fewer else (loss <= 1e-5)
        if fewer:
            assert sum(p.numel() for p in graph.parameters()) < sum(p.numel() for p in model.parameters())


def with_weights(model: nn.Module, pairs: dict, tensors) -> nn.Module:
    """The module itself with every rewritten tensor at full width."""
    made = copy.deepcopy(model)
    table = dict(made.named_parameters(remove_duplicate=False)) | dict(made.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for site, rewritten in pairs.values():
            for name, value in expanded(site, rewritten.weights, rewritten.site.kv_of, tensors).items():
                table[name].copy_(value)
    return made
