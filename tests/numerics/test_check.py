"""Check measures what it says: against figures computed another way, on models made to differ by a known amount."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from rewrite.compare import cache_bytes, check, generated_cache, interval, logits, lossless_limit, predicts_next


def llama(kv_heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text(rows: int = 2, tokens: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))


WINDOWS = [text(seed=s) for s in range(4)]


def shifted(model: nn.Module, by: float) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.lm_head.weight += by * torch.randn_like(made.lm_head.weight)
    return made


def test_a_model_against_itself():
    model = llama()
    seen = check(model, copy.deepcopy(model), windows=WINDOWS, max_loss=0.0, lossless=lambda: copy.deepcopy(model))
    assert seen.failures == ()
    assert seen.loss == seen.difference == seen.divergence == seen.lossless == 0.0
    assert seen.rise == (0.0, 0.0)
    assert seen.same_next == 1.0
    assert seen.tokens == 8 * 23


def test_figures_agree_with_the_models_own_loss():
    model, other = llama(), shifted(llama(), 0.05)
    seen = check(model, other, windows=WINDOWS)
    for made, want in ((seen.perplexity.before, model), (seen.perplexity.after, other)):
        with torch.no_grad():
            mean = sum(float(want(w, labels=w).loss) for w in WINDOWS) / len(WINDOWS)
        assert made == pytest.approx(math.exp(mean), rel=1e-5)
    assert seen.divergence > 0
    low, high = seen.rise
    assert low <= seen.loss <= high


def test_divergence_by_torch():
    model, other = llama(), shifted(llama(), 0.05)
    with torch.no_grad():
        a, b = (m(WINDOWS[0]).logits[:, :-1].double().log_softmax(-1) for m in (model, other))
    want = nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1).mean()
    assert check(model, other, windows=WINDOWS[:1]).divergence == pytest.approx(float(want), rel=1e-4)


def test_a_limit_fails_the_run():
    model, other = llama(), shifted(llama(), 1.0)
    seen = check(model, other, windows=WINDOWS, max_loss=0.01)
    assert seen.loss > 0.01
    assert any("limit 1 %" in f for f in seen.failures)
    assert check(model, other, windows=WINDOWS).failures == ()


def test_a_wrong_lossless_conversion_fails_the_run():
    model = llama()
    seen = check(model, model, windows=WINDOWS[:1], lossless=lambda: shifted(model, 1e-3))
    assert any("error of reattn" in f for f in seen.failures)


def test_not_a_number_fails_the_run():
    model, other = llama(), llama()
    with torch.no_grad():
        other.lm_head.weight[3] = math.nan
    seen = check(model, other, windows=WINDOWS)
    assert "no numbers" in seen.failures[0]
    assert seen.perplexity is None


def test_another_shape_fails_the_run():
    model, other = llama(), llama()
    other.lm_head = nn.Linear(32, 51, bias=False)
    assert "shape" in check(model, other, windows=WINDOWS).failures[0]


def test_cache_is_measured_on_tensors():
    seen = check(llama(4), llama(2), windows=WINDOWS[:1])
    tokens = 24 + 3
    assert seen.cache_tokens == tokens
    assert seen.cache.before == 2 * 2 * 4 * 8 * 4 * tokens
    assert seen.cache.after == seen.cache.before / 2


def test_an_encoder_decoder_cache_is_both_of_its_parts():
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, decoder_start_token_id=0)
    out = T5ForConditionalGeneration(config).generate(
        text(1, 9), max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, pad_token_id=0
    )
    decoder, encoder = 3, 9
    assert cache_bytes(out.past_key_values) == 2 * 2 * 4 * 4 * 4 * (decoder + encoder)


def test_who_predicts_the_next_token():
    torch.manual_seed(0)
    assert predicts_next(llama(), text())
    bert = BertModel(
        BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()
    assert not predicts_next(bert, text())

    class Sees(nn.Module):
        """Scores of the right shape that depend on the whole text."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 50)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return x + x.mean(1, keepdim=True)

    assert not predicts_next(Sees(), text())
    assert generated_cache(Sees(), text()) is None


def test_models_without_text_are_compared_on_examples():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bias += 0.25
    x = torch.randn(5, 4)
    seen = check(model, other, example=(x,))
    assert seen.difference == pytest.approx(0.25 / float(model(x).detach().abs().max()), rel=1e-4)
    assert seen.perplexity is None
    assert seen.failures == ()
    assert check(model, other, example={"input": x}).difference == seen.difference


def test_training_mode_and_weights_are_left_alone():
    model, other = llama().train(), llama()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    check(model, other, windows=WINDOWS[:1])
    assert all(m.training for m in model.modules())
    assert not any(m.training for m in other.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_interval():
    alike = [(10, 20.0, 21.0)] * 8
    assert interval(alike, 0) == pytest.approx((math.expm1(0.1), math.expm1(0.1)))
    assert interval(alike[:3], 0) is None
    spread = [(10, 20.0, 20.0 + i) for i in range(8)]
    low, high = interval(spread, 0)
    assert low < math.expm1(0.35) < high
    assert interval(spread, 0) == (low, high)


def test_limit_follows_the_type():
    assert lossless_limit(nn.Linear(2, 2)) == 1e-5
    assert lossless_limit(nn.Linear(2, 2).bfloat16()) == pytest.approx(8 * 2**-7)


def test_main_output():
    assert logits((torch.ones(1), torch.zeros(1))).item() == 1.0
