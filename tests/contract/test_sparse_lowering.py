"""Masks in a captured graph: the original at its own mask; below it, a token moves just what may read it."""

import pytest
import torch
from torch import Tensor, nn

from passes.assign import barred
from passes.convert import convert_sites, named_tensors
from passes.find import find
from passes.lower import lower
from passes.lower_sparse import OPERATOR, SCORES, TABLE, backends
from passes.sparse import BlockSparse
from rewrite.capture import capture
from rewrite.mask import Mask, causal, sink, streaming, window
from tests.contract.test_limits import apart, main_output
from tests.zoo.captured import captured

SPELLED = {
    "NanoGPT": SCORES,
    "NanoGPTFlash": OPERATOR,
    "GroupedEinsum": SCORES,
    "Folded": SCORES,
    "EnableGQA": OPERATOR,
    "PerHead": OPERATOR,
    "Softcap": SCORES,
    "Window": TABLE,
    "Padding": SCORES,
    "RelativeBias": SCORES,
    "Conv1D": OPERATOR,
}
"""Hand-written attention -> what computes it with a mask."""
REFUSED = {
    "SinkLogits": "a column beside the keys",
    "ManualSoftmax": "0 softmaxes",
    "SeqFirst": "does not run over the last axis",
}


@pytest.mark.parametrize("name", SPELLED)
def test_its_own_mask_changes_nothing(name: str):
    model, inputs, program, found = captured(name)
    tensors = named_tensors(model)
    targets = {s.name: BlockSparse(s.mask) for s in found.sites if s.name not in barred(found)}
    assert all(targets[s.name].refuse(s) is None for s in found.sites if s.name in targets)
    changes = convert_sites(program, found, targets, None, lambda _name, _done, _total: None)
    pairs = {n: (c.site, c.rewritten) for n, c in changes.items()}
    graph = program.dynamic or program.static
    assert set(backends(graph, pairs).values()) == {SPELLED[name]}
    with torch.no_grad():
        assert apart(main_output(model(*inputs)), main_output(lower(graph, pairs, tensors)(*inputs))) <= 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_a_core_that_takes_no_mask_is_refused(name: str):
    _, _, program, found = captured(name)
    targets = {s.name: BlockSparse(window=2) for s in found.sites}
    changes = convert_sites(program, found, targets, None, lambda _name, _done, _total: None)
    told = backends(program.static, {n: (c.site, c.rewritten) for n, c in changes.items()})
    assert told
    assert all(why.startswith("refused: ") and REFUSED[name] in why for why in told.values())


HEADS, DIM, TOKENS = 4, 8, 14


class Attention(nn.Module):
    """One attention and nothing around it."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(4))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            z = (q @ k.mT * DIM**-0.5).masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.o(z.transpose(1, 2).flatten(2))


MASKS = (
    causal & (window(3) | sink(2)),
    streaming([1, 0, 2, 0], [2, None, 3, 5]),
)


@pytest.mark.parametrize("mask", MASKS, ids=["static", "by head"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "softmax"])
def test_a_token_moves_what_may_read_it(mask: Mask, fused: bool):
    """Each head alone, by an output projection that reads only it, at a length that was not captured."""
    torch.manual_seed(0)
    model = Attention(fused).eval()
    program = capture(model, (torch.randn(2, 9, HEADS * DIM),))
    found = find(program.static)
    targets = {s.name: BlockSparse(mask) for s in found.sites}
    for head in range(HEADS):
        with torch.no_grad():
            model.o.weight.zero_()
            part = slice(head * DIM, head * DIM + DIM)
            model.o.weight[part, part] = torch.eye(DIM)
        changes = convert_sites(program, found, targets, None, lambda _name, _done, _total: None)
        pairs = {n: (c.site, c.rewritten) for n, c in changes.items()}
        graph = lower(program.dynamic or program.static, pairs, named_tensors(model))
        x = torch.randn(1, TOKENS, HEADS * DIM)
        with torch.no_grad():
            before = graph(x)
            moved = [
                (graph(x + 3 * (torch.arange(TOKENS) == k)[:, None] * torch.randn(HEADS * DIM)) - before).abs().amax(-1)
                for k in range(TOKENS)
            ]
        reads = torch.stack([m[0] for m in moved], 1) > 1e-6
        assert torch.equal(reads, torch.from_numpy(mask.table(TOKENS, TOKENS, head)))


def test_the_graph_exports_and_trains():
    torch.manual_seed(0)
    model = Attention(True).eval()
    program = capture(model, (torch.randn(2, 9, HEADS * DIM),))
    found = find(program.static)
    targets = {s.name: BlockSparse(causal & window(3)) for s in found.sites}
    changes = convert_sites(program, found, targets, None, lambda _name, _done, _total: None)
    pairs = {n: (c.site, c.rewritten) for n, c in changes.items()}
    graph = lower(program.dynamic or program.static, pairs, named_tensors(model))
    x = torch.randn(2, 9, HEADS * DIM)
    exported = torch.export.export(graph, (x,), strict=False)
    assert apart(graph(x), exported.module()(x)) <= 1e-6
    graph(x).square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().max() > 0) for n, p in graph.named_parameters() if "k.bias" not in n
    )
