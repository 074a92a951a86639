"""Every attention that a model of the zoo runs is found and proven; what is not is listed here, with its reason."""

import pytest

from passes.find import Found, find
from rewrite.capture import capture
from rewrite.errors import ReattnError
from tests.zoo import BY_NAME, ENTRIES, REFUSED, Entry, count_by_execution

QUICK = {
    "llama-sdpa", "llama-gqa-eager", "mistral-sdpa", "mixtral-eager", "qwen3-sdpa", "qwen3-gqa-eager", "gemma2-eager",
    "gemma3_text-sdpa", "phi3-sdpa", "gpt2-sdpa", "gpt2-eager", "gpt_neox-eager", "gptj-eager", "opt-sdpa",
    "bloom-eager", "mpt-eager", "gpt_bigcode-eager", "olmo2-sdpa", "cohere-eager", "granite-sdpa", "gpt_oss-eager",
    "bert-sdpa", "bert-eager", "deberta-v2-eager", "modernbert-sdpa", "nomic_bert-eager", "t5-eager", "t5-sdpa",
    "bart-sdpa", "vit-eager", "dinov2-sdpa", "swinv2-eager", "swin-sdpa", "wav2vec2-sdpa", "wavlm-eager",
    "whisper-eager", "clip-sdpa", "mamba-eager",
}  # fmt: skip
"""The rest is marked slow."""

BIASED = "the bias is computed from the query or from another activation"
SUMMED = "the scores are a sum over"
MISSES: dict[str, tuple[int, str]] = {
    "stablelm-sdpa": (0, "the gain of q is made of several parameters"),
    "stablelm-eager": (0, "the gain of q is made of several parameters"),
    "jetmoe-sdpa": (0, "q is computed on as many tokens as their values decide"),
    "jetmoe-eager": (0, "q is computed on as many tokens as their values decide"),
    "squeezebert-default-eager": (0, "q's projection is a convolution in 4 groups"),
    "doge-sdpa": (0, BIASED),
    "doge-eager": (0, BIASED),
    "xlnet-eager": (0, SUMMED),
    "deberta-eager": (0, SUMMED),
    "funnel-eager": (0, SUMMED),
    "pegasus_x-eager": (4, "k joins several streams of tokens"),
    "longt5-eager": (4, "rows of q do not hang on the projection"),
    "prophetnet-eager": (4, BIASED),
    "sam-vision-sdpa": (0, BIASED),
    "sam-vision-eager": (0, BIASED),
    "hiera-eager": (1, "q mixes tokens between projection and core"),
    "wavlm-eager": (0, BIASED),
    "wav2vec2-conformer-sdpa": (0, BIASED),
    "wav2vec2-conformer-eager": (0, SUMMED),
    "wav2vec2-bert-sdpa": (0, BIASED),
    "wav2vec2-bert-eager": (0, BIASED),
}
"""Name -> how many are proven all the same, and how the reason begins that the others are refused with."""

UNCAPTURED: dict[str, str] = {
    "longcat-sdpa": "torch.export stopped in model.layers.0.mlp.experts",
    "longcat-eager": "torch.export stopped in model.layers.0.mlp.experts",
    "longformer-eager": "torch.export stopped in encoder.layer.0.attention.self",
    "led-eager": "torch.export stopped in led.encoder.layers.0.self_attn.longformer_self_attn",
    "switch_transformers-eager": "torch.export stopped in encoder.block.1.layer.1.mlp.router.classifier",
    "vilt-eager": "torch.export stopped in embeddings",
}
"""Models that decide by a tensor's values, or change their own parameters, while they run: where the export stops."""


def found(entry: Entry) -> tuple[Found, int]:
    model, inputs = entry.build()
    own = None if hasattr(model, "config") else inputs
    return find(capture(model, own, dynamic=False).static), count_by_execution(model, inputs)


def marked(entry: Entry) -> object:
    quick = entry.family == "hand-written" or entry.name in QUICK
    return pytest.param(entry, id=entry.name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("entry", [marked(e) for e in ENTRIES if e.name not in UNCAPTURED])
def test_as_many_are_proven_as_are_run(entry: Entry):
    result, executed = found(entry)
    proven, reason = MISSES.get(entry.name, (executed, ""))
    why = [f"{r.name}: {r.refusal.reason}" for r in result.refused]
    assert len(result.sites) == proven, why
    assert len({s.name for s in result.sites}) == len(result.sites)
    if proven < executed:
        assert any(reason in text for text in why), why


@pytest.mark.slow
@pytest.mark.parametrize("name", UNCAPTURED)
def test_what_cannot_be_traced_says_where(name: str):
    model, _ = BY_NAME[name].build()
    with pytest.raises(ReattnError) as caught:
        capture(model, dynamic=False)
    assert caught.value.what == UNCAPTURED[name]
    assert any(line.startswith("at modeling_") for line in caught.value.lines)


@pytest.mark.parametrize("entry", REFUSED, ids=lambda e: e.name)
def test_what_no_description_holds_is_refused(entry: Entry):
    result, _ = found(entry)
    assert not result.sites
    for refused in result.refused:
        assert refused.refusal.reason[0].islower()
        assert refused.refusal.where.startswith("hostile.py:")


def test_the_tables_name_what_there_is():
    names = {e.name for e in ENTRIES}
    assert names >= {*QUICK, *MISSES, *UNCAPTURED}
    assert len(names) == len(ENTRIES)
    types = {e.name.removesuffix("-sdpa").removesuffix("-eager") for e in ENTRIES if e.family != "hand-written"}
    assert len(types) >= 80
    assert sum(e.family == "hand-written" for e in ENTRIES) >= 21
