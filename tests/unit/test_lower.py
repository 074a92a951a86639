"""A plain module's graph with fewer kv heads computes what the module with repeated heads computes, at any length."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from passes.lower import lower
from rewrite.heads import Heads, Rewritten, Weights
from rewrite.layout import expanded, gather
from rewrite.site import Grouped
from tests.sites import make_site

KV_OF = (0, 0, 1, 1)


class Fused(nn.Module):
    """Thirds of one projection; `transposed` holds its weight as Conv1D does."""

    def __init__(self, bias: bool, transposed: bool):
        super().__init__()
        self.qkv = nn.Linear(48, 12, bias=False) if transposed else nn.Linear(12, 48, bias=bias)
        if transposed:
            self.qkv.bias = nn.Parameter(torch.randn(48)) if bias else None
        self.o = nn.Linear(16, 12, bias=bias)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        u = self.qkv
        y = x @ u.weight if self.transposed else u(x)
        if self.transposed and u.bias is not None:
            y = y + u.bias
        q, k, v = y.view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, 16))


def halved(layout: str, module: nn.Module, bias: bool):
    """The site, its rewritten form with kv heads 0 and 2 alone, and the module with those heads repeated."""
    site, _ = make_site(layout, bias=bias)
    tensors = dict(module.named_parameters()).__getitem__
    w = gather(site, tensors)

    def cut(h: Heads) -> Heads:
        return Heads(h.weight[[0, 2]], None if h.bias is None else h.bias[[0, 2]], h.gain[[0, 2]])

    new = Weights(w.q, cut(w.k), cut(w.v), w.out, w.out_bias)
    repeated = copy.deepcopy(module)
    for name, value in expanded(site, new, KV_OF, tensors).items():
        repeated.get_parameter(name).data = value
    made = Rewritten(replace(site, form=Grouped(2), kv_of=KV_OF), new, (0, 1, 2, 3))
    return {"attn": (site, made)}, tensors, repeated


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_graph_equals_the_module_with_repeated_heads(bias: bool, transposed: bool):
    torch.manual_seed(0)
    module = Fused(bias, transposed)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(2, 7, 12),), dynamic_shapes=(dynamic,), strict=False)
    before = {n: p.clone() for n, p in module.named_parameters()}
    changes, tensors, repeated = halved("conv1d" if transposed else "thirds", module, bias)
    graph = lower(program.run_decompositions({}), changes, tensors)

    small = (12, 32) if transposed else (32, 12)
    assert graph.get_parameter("qkv.weight").shape == small
    for shape in ((2, 7, 12), (3, 19, 12)):
        x = torch.randn(shape)
        assert torch.equal(graph(x), repeated(x))
        assert torch.equal(graph(x=x), repeated(x))
        assert not torch.allclose(graph(x), module(x))
    graph(torch.randn(2, 5, 12)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in graph.parameters())
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters())
