"""The operator as compilers see it: opcheck, torch.compile, torch.export, vmap, gradients; and the oracle's own law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from codegen import ops, oracle
from codegen.options import Options
from codegen.select import Antidiagonal
from rewrite import Alibi, attention
from rewrite.mask import Mask, all_, causal, documents, mask, sink, streaming, window

torch.set_num_threads(1)
NEAR = causal & (window(9) | sink(2))
HEADS = streaming([1, 1, 2, 2], [4, None, 3, 9])
LONG = documents([7, 30, 600, 500])
"""Its tables are too large to be written out."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def compiling(model: Callable[..., Tensor]) -> tuple[Any, list[Any]]:
    """The model compiled for all lengths, and the graphs that come to be while it runs."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    return torch.compile(model, backend=backend, fullgraph=True, dynamic=True), graphs


def tensors(queries: int, keys: int) -> list[Tensor]:
    return [drawn(2, h, n, 16, seed=i) for i, (h, n) in enumerate(((4, queries), (2, keys), (2, keys)))]


def arguments(chosen: Mask, **more: Any) -> tuple[Any, ...]:
    options = Options(**{"scale": 0.25, **more})
    tables = [torch.from_numpy(chosen.tables[name]) for name in chosen.apart]
    lengths = options.lengths or (None, None)
    told = options.scale, options.softcap, options.bias, options.slopes, options.sinks, *lengths
    return *tensors(20, 30), chosen.spelled, ",".join(chosen.apart), tables, *told


@pytest.mark.parametrize(
    "given",
    [
        arguments(NEAR),
        arguments(HEADS, bias=drawn(1, 4, 20, 30), softcap=2.0),
        arguments(LONG, sinks=drawn(4), slopes=torch.ones(4)),
        arguments(causal, lengths=(torch.tensor([20, 3]), torch.tensor([30, 9]))),
    ],
    ids=["plain", "bias", "tables", "lengths"],
)
def test_the_operator_is_well_formed(given: tuple[Any, ...]) -> None:
    opcheck(ops.attention, given)
    o, lse = ops.attention(*given)
    before, rest = given[:3], given[3:]
    backward = torch.ones_like(o), *before, o.detach(), lse.detach(), rest[5] is not None, *rest
    opcheck(ops.attention_backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("options", [{"mask": NEAR}, {"mask": HEADS}, {"mask": LONG}, {"bias": Alibi([0.1] * 4)}])
def test_one_graph_serves_all_lengths(options: dict[str, Any]) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.sin(), k, v, **options).cos()

    compiled, graphs = compiling(model)
    for queries, keys in ((7, 9), (12, 30), (13, 50)):
        given = tensors(queries, keys)
        torch.testing.assert_close(compiled(*given), model(*given))
    assert len(graphs) == 1


def test_a_selection_in_a_compiled_model() -> None:
    """Tables are arguments of the graph: what is chosen for other tokens is read by the same one."""
    rule = Antidiagonal(0.6, 16, 4)

    def model(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attention(q, k, v, algebra, tables={"block": table})

    compiled, graphs = compiling(model)
    for tokens in (80, 96):
        q, k, v = tensors(tokens, tokens)
        found = rule(4 * q, k)
        algebra, table = found.selection.algebra, found.selection.tables["block"]
        wanted = torch.autograd.grad(attention(q, k, v, found.mask()).sin().sum(), (q, k, v))
        for each in (model, compiled):
            got = torch.autograd.grad(each(q, k, v, table).sin().sum(), (q, k, v))
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b)
        assert 0 < found.density < 1
    assert len(graphs) == 1


def test_tables_on_another_device_are_not_read() -> None:
    """The operator's mask declares them, by shape, and they go beside it; those on the CPU are part of it."""
    q, chosen = torch.zeros(2, 4, 32, 16), Antidiagonal(0.6, 16, 4)(drawn(2, 4, 32, 16), drawn(2, 2, 32, 16)).selection
    there = chosen.tables["block"].to("meta")
    found = ops._mask(q, chosen.algebra.spelled, "block", [there])
    assert found.declared == ("block",)
    assert found.keep == chosen.algebra.keep
    assert ops._mask(q, chosen.algebra.spelled, "block", [there.clone()]) is found
    assert ops._beside("block", [there]) == {"block": there}
    with pytest.raises(ValueError, match="reads block of 2 rows of the batch, and there are 3"):
        ops._mask(q[:1].expand(3, -1, -1, -1), chosen.algebra.spelled, "block", [there])
    here = ops._mask(q, chosen.algebra.spelled, "block", [chosen.tables["block"]])
    assert not here.declared
    assert ops._beside("block", [chosen.tables["block"]]) == {}


def test_gradients_of_a_compiled_model() -> None:
    torch._dynamo.reset()
    bias, sinks = drawn(1, 4, 20, 30), drawn(4, seed=5)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k * 2, v, HEADS, bias=bias, sinks=sinks).square()

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    given = tensors(20, 30)
    wanted = [*given, bias, sinks]
    one, other = (torch.autograd.grad(f(*given).sum(), wanted) for f in (compiled, model))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_another_mask_in_the_same_place_is_another_graph() -> None:
    """A compiled model must not keep the mask that it saw first."""

    class Model(torch.nn.Module):
        chosen = mask(lambda b, h, q, k: k <= q, "mine")

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, self.chosen)

    torch._dynamo.reset()
    model, given = Model(), tensors(9, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(*given)
    model.chosen = mask(lambda b, h, q, k: k < q, "mine")
    torch.testing.assert_close(compiled(*given), attention(*given, causal & window(99) & model.chosen))
    assert not torch.equal(before, compiled(*given))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_take_other_lengths(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, HEADS)

    queries, keys = torch.export.Dim("queries"), torch.export.Dim("keys")
    program = torch.export.export(
        Model(), tuple(tensors(20, 30)), dynamic_shapes=({2: queries}, {2: keys}, {2: keys}), strict=strict
    )
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "reattn.attention.default" in targets
    given = tensors(13, 14)
    torch.testing.assert_close(program.module()(*given), attention(*given, HEADS))


def test_vmap_maps_over_any_argument() -> None:
    q, k, v = (x.detach() for x in (drawn(2, 4, 3, 9, 16), drawn(2, 2, 9, 16), drawn(2, 2, 9, 16, seed=2)))
    q, sinks = q.requires_grad_(), drawn(3, 4)
    mapped = torch.vmap(lambda q, s: attention(q, k, v, HEADS, sinks=s), (2, 0))(q, sinks)
    one_by_one = torch.stack([attention(q[:, :, i], k, v, HEADS, sinks=sinks[i]) for i in range(3)])
    torch.testing.assert_close(mapped, one_by_one)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (q, sinks)) for x in (mapped, one_by_one)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_agree_with_differences() -> None:
    q, k, v = (x.detach()[:1, :, :, :3].double().requires_grad_() for x in tensors(2, 4))
    bias, sinks = (drawn(*shape, seed=7).detach().double().requires_grad_() for shape in ((2, 4), (4,)))

    def model(*given: Tensor) -> Tensor:
        return attention(*given[:3], NEAR, softcap=3.0, bias=given[3], sinks=given[4])

    assert torch.autograd.gradcheck(model, (q, k, v, bias, sinks), atol=1e-6)


def test_the_oracle_is_softmax() -> None:
    """Where there is nothing special it is torch's own attention."""
    q, k, v = tensors(30, 30)
    o, lse = oracle.attention(q, k, v, causal, Options(0.25))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(o, theirs)
    scores = 0.25 * q[:, 3] @ k[:, 1].mT
    torch.testing.assert_close(lse[:, 3, -1], scores[:, -1].logsumexp(-1))
    assert oracle.kept(all_, 1, 3, [(2, 4)], 5)[0, 0].tolist() == [[True] * 4 + [False]] * 2 + [[False] * 5]


@pytest.mark.parametrize("count", [3, 5])
def test_a_table_of_another_number_of_heads_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"reads (sink|window) of {count} query heads, and there are 4"):
        attention(*tensors(5, 5), streaming([1] * count, [4] * count))
