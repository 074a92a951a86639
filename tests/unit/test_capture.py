"""Capture: what goes in, what the graphs hold, and what is said where it cannot be done."""

import inspect
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram

from rewrite.capture import capture
from rewrite.errors import ReattnError
from rewrite.examples import propose

TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 0:
            return x * 2
        return x


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.linear(x))


class InPlace(nn.Module):
    """Writes into slices of a new tensor, which hides from where its value comes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape)
        y[..., :2].copy_(self.linear(x)[..., :2])
        y[..., 2:].copy_(x[..., 2:])
        return y.mul_(2)


class Fixed(nn.Module):
    """A table as long as the traced sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.place


class Many(nn.Module):
    """Takes any number of tensors, and a named one in a dict."""

    def forward(self, x: Tensor, *others: Tensor, more: dict[str, Tensor]) -> Tensor:
        return sum(others, x) + more["last"]


def config_file(folder: Path, **more: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**TINY, **more}))
    return folder


def plain(program: ExportedProgram) -> bool:
    schemas = [getattr(n.target, "_schema", None) for n in program.graph.nodes]
    nested = any(isinstance(n.target, HigherOrderOperator) for n in program.graph.nodes)
    return not nested and not any(s is not None and s.is_mutable for s in schemas)


def test_a_config_is_captured_without_parameters(tmp_path: Path):
    program = capture(config_file(tmp_path, architectures=["LlamaForCausalLM"], tie_word_embeddings=True))
    model = program.module
    assert type(model) is transformers.LlamaForCausalLM
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers()), "rope tables must hold their true values"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert program.dynamic is not None
    assert program.frozen is None
    for graph in (program.static, program.dynamic):
        assert plain(graph)
        assert all(t.is_meta for t in graph.state_dict.values())
        assert any(not t.is_meta for t in graph.constants.values())


def test_the_class_comes_from_the_config(tmp_path: Path):
    assert type(capture(config_file(tmp_path), dynamic=False).module) is transformers.LlamaModel
    with pytest.raises(ReattnError, match="names MadeUpForCausalLM, which transformers"):
        capture(config_file(tmp_path, architectures=["MadeUpForCausalLM"]))


def test_weights_are_loaded_when_asked_for(tmp_path: Path):
    torch.manual_seed(0)
    saved = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    saved.save_pretrained(tmp_path)
    program = capture(tmp_path, weights=True, dynamic=False)
    assert torch.equal(program.module.lm_head.weight, saved.lm_head.weight)
    assert program.dynamic is None
    assert program.frozen == "the dynamic graph was not asked for"


def test_the_dynamic_graph_runs_at_other_sizes():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    program = capture(model)
    assert program.dynamic is not None
    ids = torch.randint(0, 60, (3, 17))
    with torch.no_grad():
        got = program.dynamic.module()(input_ids=ids, use_cache=False)
        assert torch.allclose(got.logits, model(ids).logits, atol=1e-5)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model[1].eval()
    model[0].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, (torch.randn(2, 10, 4),), dynamic=False)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_writing_in_place_is_gone():
    model, x = InPlace().eval(), torch.randn(2, 10, 4)
    program = capture(model, (x,))
    assert plain(program.static)
    assert torch.equal(program.static.module()(x), model(x))


def test_a_batch_of_one_is_doubled():
    program = capture(nn.Linear(4, 4), (torch.randn(1, 10, 4),))
    assert program.args[0].shape == (2, 10, 4)
    assert program.dynamic is not None
    assert program.dynamic.module()(torch.randn(5, 3, 4)).shape == (5, 3, 4)


def test_a_fixed_size_is_told():
    program = capture(Fixed(), (torch.randn(2, 10, 4),))
    assert program.frozen == "the model fixes a size while it is traced: axis 1 of x stayed 10"
    assert program.dynamic is not None
    assert program.dynamic.module()(torch.randn(3, 10, 4)).shape[0] == 3


def test_any_structure_of_arguments_is_taken():
    x = torch.randn(2, 10, 4)
    program = capture(Many(), {"x": x, "more": {"last": x}})
    assert program.frozen is None
    assert capture(nn.Bilinear(4, 4, 3), (x, x)).frozen is None


def test_the_failure_names_module_and_line():
    with pytest.raises(ReattnError) as caught:
        capture(Branching(), (torch.randn(2, 10, 4),))
    assert caught.value.slug == "capture"
    assert caught.value.what == "torch.export stopped in inner"
    line = inspect.getsourcelines(Inner.forward)[1] + 1
    assert f"at test_capture.py:{line}: `if x.max() > 0:`" in caught.value.lines


def test_a_known_cause_has_its_remedy():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    mask = nn.Transformer.generate_square_subsequent_mask(10)
    with pytest.raises(ReattnError, match="pass is_causal=True"):
        capture(model, (torch.randn(2, 10, 8), mask))
    assert plain(capture(model, {"src": torch.randn(2, 10, 8), "mask": mask, "is_causal": True}).static)


@pytest.mark.parametrize(
    ("model", "inputs", "slug", "says"),
    [
        (nn.Linear(4, 4), None, "inputs", "inputs=(torch.randint"),
        (nn.Linear(4, 4), (1, 2, 3), "inputs", "its forward takes (input)"),
        (3, None, "not-a-model", "int is no torch.nn.Module"),
        ("no/such/folder", None, "not-a-model", "no/such/folder"),
    ],
)
def test_what_cannot_be_captured_is_an_error(model: object, inputs: object, slug: str, says: str):
    with pytest.raises(ReattnError) as caught:
        capture(model, inputs)  # type: ignore[arg-type]
    assert caught.value.slug == slug
    assert says in str(caught.value)


def test_examples_keep_off_special_tokens_and_equal_sizes():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=40, pad_token_id=7, eos_token_id=9, bos_token_id=8,
    )  # fmt: skip
    example = next(propose(transformers.BartForConditionalGeneration(config)))
    ids, targets = example.kwargs["input_ids"], example.kwargs["decoder_input_ids"]
    assert not set(ids.flatten().tolist()) & {7, 8, 9}
    assert len({*ids.shape, targets.shape[1]}) == 3
    assert example.kwargs["use_cache"] is False
