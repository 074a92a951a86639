"""ONNX files of tiny models: every form, names, metadata, what else loads them, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn

from rewrite import GQA, MLA, BlockSparse, ReattnError, convert, export_onnx
from rewrite.cli import main
from rewrite.errors import BadUsage, CheckFailed, Refused
from rewrite.mask import streaming
from rewrite.onnx import export, genai, graph, names
from rewrite.onnx.caches import Slot
from rewrite.onnx.run import Decoder, generate
from rewrite.report import Report
from tests.contract import tiny

KV = {**tiny.LLAMA, "num_key_value_heads": 2, "num_hidden_layers": 1}
IDS = np.array([[5, 9, 12, 31, 7], [40, 3, 77, 21, 60]])
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def llama() -> Any:
    return tiny.settled(transformers.LlamaConfig(**KV), "LlamaForCausalLM")


@cache
def latent(form: Any = "absorbed") -> Any:
    return convert(llama(), MLA(cache=0.75, form=form), check=False, emit="own")


@cache
def sparse(window: int, sink: int) -> Any:
    return convert(llama(), BlockSparse(window=window, sink=sink), check=False)


def torch_text(model: Any, new: int) -> np.ndarray[Any, Any]:
    ids, mask = torch.from_numpy(IDS), torch.from_numpy(MASK)
    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    return model.float().generate(ids, attention_mask=mask, **settings).numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(name, model, **settings)` exports once in this file's tests."""
    top = tmp_path_factory.mktemp("onnx")

    def make(name: str, model: Callable[[], Any], **settings: Any) -> Path:
        if not (top / name).exists():
            export_onnx(model(), top / name, **settings)
        return top / name

    return make


FORMS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "attention.onnx": (llama, {"form": "attention"}),
    "shared.onnx": (llama, {"form": "shared"}),
    "contrib": (llama, {"form": "contrib"}),
    "latent": (latent, {"form": "shared"}),
    "rebuilt.onnx": (lambda: latent("rebuilt"), {}),
    "sink.onnx": (lambda: sparse(4, 2), {}),
    "window.onnx": (lambda: sparse(6, 0), {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_writes_the_same_text(name: str, made: Callable[..., Path]) -> None:
    """Two rows, one of them padded; a window of 6, and one of 4 with 2 first tokens, hold 5."""
    model, settings = FORMS[name]
    path = made(name, model, **settings)
    decoder = Decoder(path if path.suffix else path / "model.onnx", threads=1)
    text = generate(decoder, IDS, 12, attention_mask=MASK)
    assert np.array_equal(text, torch_text(model(), 12))
    tokens = 5 if name in ("sink.onnx", "window.onnx") else 16
    assert decoder.cache_bytes == 2 * tokens * 4 * sum(decoder.numbers)
    assert decoder.capacity == (17 if decoder.shared else tokens)


@pytest.mark.parametrize("name", ["sink.onnx", "window.onnx"])
def test_a_prompt_of_any_length_is_torchs(name: str, made: Callable[..., Path]) -> None:
    """At once and in pieces, with a padded row: tiles of 4 and 6 queries, the last one of them short or not."""
    model = FORMS[name][0]()
    decoder = Decoder(made(name, lambda: model), threads=1)
    assert "TiledAttention" in {f.name for f in onnx.load(str(made(name, lambda: model))).functions}
    ids = torch.randint(0, 99, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for steps in ((8,), (12,), (13,), (33,), (20, 9, 1, 17)):
        decoder.reset()
        done, got = 0, list[Any]()
        for count in steps:
            rows = slice(done, done + count)
            got.append(decoder.step(ids[:, rows].numpy(), mask[:, : done + count].numpy()))
            done += count
        real, places = mask[:, :done], (mask.cumsum(1) - 1).clamp(min=0)[:, :done]
        with torch.no_grad():
            wanted = model(input_ids=ids[:, :done], attention_mask=real, position_ids=places).logits.numpy()
        apart = np.abs(np.concatenate(got, 1) - wanted)[real.bool().numpy()].max()
        assert apart < 1e-4 * np.abs(wanted).max(), steps


def test_what_is_cached_is_written_in_place(made: Callable[..., Path]) -> None:
    decoder = Decoder(made("shared.onnx", llama, form="shared"), threads=1)
    decoder.reserve(1, 8)
    buffers = [held.data_ptr() for held in decoder.held]
    decoder.step(IDS[:1], np.ones((1, 5), np.int64))
    first = [held.numpy()[:, :, :5].copy() for held in decoder.held]
    decoder.step(IDS[:1, :3], np.ones((1, 8), np.int64))
    assert [held.data_ptr() for held in decoder.held] == buffers
    for held, before in zip(decoder.held, first, strict=True):
        assert np.array_equal(held.numpy()[:, :, :5], before)
        assert np.abs(held.numpy()[:, :, 5:]).min() > 0
    decoder.step(IDS[:1, :1], np.ones((1, 9), np.int64))
    assert decoder.capacity == 256, "a full buffer grows, and keeps what it held"
    assert np.array_equal(decoder.held[0].numpy()[:, :, :5], first[0])
    with pytest.raises(BadUsage, match=r"for 9 cached and 1 new tokens of 1 rows\n  give \(1, 10\)"):
        decoder.step(IDS[:1, :1], np.ones((1, 9), np.int64))


def test_names_axes_and_metadata(tmp_path: Path) -> None:
    made = convert(llama(), GQA(1, polish=0), check=False)
    export_onnx(made, tmp_path / "m.onnx")
    model = onnx.load(str(tmp_path / "m.onnx"))
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        "past_key_values.0.key": ["batch", 1, "past", 16],
        "past_key_values.0.value": ["batch", 1, "past", 16],
        "logits": ["batch", "sequence", 99],
        "present.0.key": ["batch", 1, "total", 16],
        "present.0.value": ["batch", 1, "total", 16],
    }
    assert "/" not in "".join(p.value for n in model.graph.node for p in n.metadata_props), "no paths of this machine"
    told = {p.key: p.value for p in model.metadata_props}
    assert told[names.FORM] == "matmul"
    assert told[names.RECIPE].startswith("gqa:")
    assert json.loads(told[names.CACHE]) == [32]
    assert Report.read(told[names.REPORT]) == made.rewrite_report


def test_a_folder_is_what_genai_and_optimum_read(made: Callable[..., Path]) -> None:
    out = made("contrib", llama, form="contrib")
    assert {p.name for p in out.iterdir()} >= {"model.onnx", "config.json", "genai_config.json"}
    told = json.loads((out / "genai_config.json").read_text())
    assert told["search"]["past_present_share_buffer"] is True
    decoder, inputs = told["model"]["decoder"], set[str]()
    for layer in range(decoder["num_hidden_layers"]):
        inputs |= {decoder["inputs"][n] % layer for n in ("past_key_names", "past_value_names")}
    model = onnx.load(str(out / decoder["filename"]))
    cached = [v for v in model.graph.input if v.name.startswith("past")]
    assert {v.name for v in cached} == inputs
    shape = {(v.type.tensor_type.shape.dim[1].dim_value, v.type.tensor_type.shape.dim[3].dim_value) for v in cached}
    assert shape == {(decoder["num_key_value_heads"], decoder["head_size"])}
    with pytest.raises(Refused, match="exists already"):
        export_onnx(llama(), out)


def test_a_latent_says_who_does_not_load_it(made: Callable[..., Path]) -> None:
    out = made("latent", latent, form="shared")
    slots = [Slot(((1, 40), (1, 8)), 40)]
    assert "a latent: rewrite.onnx.run decodes it" in str(genai.refuse(slots))
    assert "2 × 16, 4 × 16" in str(genai.refuse([Slot(((2, 16), (2, 16))), Slot(((4, 16), (4, 16)))]))
    assert not (out / "genai_config.json").exists()


def test_large_weights_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "INLINE", 1000)
    model = llama()
    done = export_onnx(model, tmp_path / "m.onnx", dtype="float16")
    assert [Path(f).name for f in done.files] == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx").stat().st_size < (tmp_path / "m.onnx.data").stat().st_size
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in done.files:
        Path(file).rename(moved / Path(file).name)
    text = generate(Decoder(moved / "m.onnx", threads=1), IDS, 2, attention_mask=MASK)
    assert text.shape == (2, 7)
    assert next(model.parameters()).dtype == torch.float32, "the given model is not touched"


class Lying(nn.Module):
    """Computes something else for the exporter than for everybody."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (2 if torch.onnx.is_in_onnx_export() else 3)


def test_what_differs_from_torch_is_never_there(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match=r"output differs by 0\.33 between ONNX Runtime and torch"):
        export_onnx(Lying(), tmp_path / "m.onnx", inputs=(torch.randn(2, 4, 6),))
    assert list(tmp_path.iterdir()) == []


class Frozen(nn.Module):
    """Holds for two rows alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(2.0)[:, None]


def test_a_size_that_is_fixed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReattnError, match="axis 0 of x stayed 2") as caught:
        export_onnx(Frozen(), tmp_path / "m.onnx", inputs=(torch.randn(2, 6),))
    assert caught.value.code == 3
    assert list(tmp_path.iterdir()) == []


def deepseek() -> Any:
    sizes = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": None}
    few = dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group"), 1)
    config = transformers.DeepseekV3Config(
        **{**tiny.LLAMA, "num_hidden_layers": 1}, **sizes, **few, first_k_dense_replace=1
    )
    return tiny.settled(config, "DeepseekV3ForCausalLM")


def uneven() -> Any:
    return convert(llama(), BlockSparse(streaming([1, 1, 0, 0], [2, 2, None, None])), check=False)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "form": (llama, {"form": "fast"}, "there is no form 'fast'"),
    "type": (llama, {"dtype": "bfloat16"}, "'bfloat16' is no type"),
    "pair": (lambda: tiny.bart()[0], {}, "an encoder and a decoder.*get_encoder"),
    "expanded": (deepseek, {}, r"caches 24 numbers a token and expands them to 160.*MLA\(cache=1.0\)"),
    "no-cache": (lambda: tiny.bart()[0].get_encoder(), {"form": "shared"}, "this model has none"),
    "latent": (latent, {"form": "contrib"}, "this model caches a latent.*form 'matmul' or 'shared'"),
    "uneven": (uneven, {}, "its heads have 2 masks, of which some drop tokens"),
    "in-place": (lambda: sparse(4, 2), {"form": "shared"}, "this cache drops tokens"),
    "itself": (lambda: convert(tiny.bloom()[0], MLA(cache=0.5), check=False), {}, "the original model can be written"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_a_sentence(name: str, tmp_path: Path) -> None:
    make, settings, words = REFUSED[name]
    model = make()
    before = model.config._attn_implementation
    with pytest.raises((Refused, BadUsage), match=f"(?s){words}"):
        export_onnx(model, tmp_path / "m.onnx", **settings)
    assert list(tmp_path.iterdir()) == []
    assert model.config._attn_implementation == before


def test_stock_latent_goes_by_way_of_the_absorbed_form(tmp_path: Path) -> None:
    """What the refusal of an expanding class advises is true."""
    source = deepseek()
    made = convert(source, MLA(cache=1.0), check=False, emit="own")
    assert export_onnx(made, tmp_path / "m.onnx").cache == (24,)
    text = generate(Decoder(tmp_path / "m.onnx", threads=1), IDS, 8, attention_mask=MASK)
    assert np.array_equal(text, torch_text(source, 8))


GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[b, 2, p, 8] "past_key_values.0.key", float[b, 2, s, 8] x, int64[5] shape) => (float[b, 2, t, 8] y) {{
    all = Concat <axis = 2> ("past_key_values.0.key", x)
    one = Constant <value_ints = [2]> ()
    {body}
}}"""
BODIES = {
    "Expand": "wide = Unsqueeze(all, one)\n many = Expand(wide, shape)\n y = Reshape(many, shape)",
    "Tile": "y = Tile(all, shape)",
    "Concat": "y = Concat <axis = 1> (all, all)",
    None: "turned = Transpose <perm = [0, 1, 3, 2]> (all)\n y = MatMul(x, turned)",
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_repeated_cache_is_seen(kind: str | None) -> None:
    text = GRAPH.format(body=BODIES[kind])
    proto = onnx.parser.parse_model(text.replace('"past_key_values.0.key"', "past"))
    for node in proto.graph.node:
        node.input[:] = ["past_key_values.0.key" if n == "past" else n for n in node.input]
    proto.graph.input[0].name = "past_key_values.0.key"
    found = graph.repeated(ir.serde.deserialize_model(proto))
    assert found is None if kind is None else (found is not None and f"by {kind}" in found)


BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "sympy"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from rewrite.onnx.run import Decoder, generate
print(*generate(Decoder(sys.argv[1], threads=1), [[5, 9, 12]], 4, stop=[int(w) for w in sys.argv[2:]])[0])
"""


def test_a_file_runs_without_torch(made: Callable[..., Path]) -> None:
    path = made("shared.onnx", llama, form="shared")

    def run(*stop: str) -> list[int]:
        words = [sys.executable, "-c", BARE, str(path), *stop]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
        return [int(word) for word in done.stdout.split()]

    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    wanted = llama().generate(torch.tensor([[5, 9, 12]]), **settings)[0].tolist()
    assert run() == wanted
    assert run(str(wanted[3])) == wanted[:4]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert().save_pretrained(tmp_path / "in")
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "m.onnx"), "--form", "shared"]) == 2
    assert "this model has none" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "m.onnx"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["form"], told["opset"], told["files"]) == ("matmul", 23, [str(tmp_path / "m.onnx")])


def vit() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return tiny.settled(transformers.ViTConfig(**sizes, image_size=32, patch_size=8), "ViTForImageClassification")


def bert() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return tiny.settled(transformers.BertConfig(**sizes, vocab_size=99), "BertForSequenceClassification")


ENCODERS = {
    "vit": (vit, GQA(2, polish=0), {"pixel_values"}),
    "bert": (bert, MLA(cache=0.25), {"input_ids", "attention_mask"}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, tmp_path: Path) -> None:
    make, target, wanted = ENCODERS[name]
    done = export_onnx(convert(make(), target, check=False), tmp_path / "m.onnx")
    model = onnx.load(str(tmp_path / "m.onnx"))
    assert {v.name for v in model.graph.input} == wanted
    assert [v.name for v in model.graph.output] == ["logits"]
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in model.graph.input} == {"batch"}
    assert done.worst < 1e-5
    assert done.cache == ()
