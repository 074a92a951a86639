"""The shipped Llama as a DeepSeek-V3 checkpoint: `convert(..., emit="stock")`, read where this project is not."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from rewrite import MLA, convert
from tests import bare

LLAMA = Path(__file__).parents[2] / "examples" / "models" / "llama"
TOKENS = 100
CHILD = """
import torch, transformers
given = torch.load(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).float()
assert type(model).__name__ == "DeepseekV3ForCausalLM"
with torch.no_grad():
    logits = model(**given).logits
    out = model.generate(**given, do_sample=False, max_new_tokens=int(sys.argv[3]), min_new_tokens=int(sys.argv[3]),
                         return_dict_in_generate=True, pad_token_id=0)
held = {layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3]) for layer in out.past_key_values.layers}
torch.save({"logits": logits, "tokens": out.sequences, "held": held}, sys.argv[2] + ".out")
"""


def test_the_shipped_llama_as_deepseek(tmp_path: Path) -> None:
    target = MLA(cache=0.25, even=True)
    text = AutoTokenizer.from_pretrained(LLAMA)("def read_lines(path):\n", return_tensors="pt")
    given = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    torch.save(given, tmp_path / "given.pt")
    own = convert(LLAMA, target, check=False, emit="own").float()
    made = convert(LLAMA, target, check=False, emit="stock", out=tmp_path / "out")
    assert {row.form for row in made.rewrite_report.sites} == {"deepseek"}
    done = bare.run(CHILD, str(tmp_path / "out"), str(tmp_path / "given.pt"), str(TOKENS))
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(f"{tmp_path / 'given.pt'}.out", weights_only=False)
    settings = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(found["logits"], made.float()(**given).logits)
        assert torch.equal(found["tokens"], made.generate(**given, **settings))
        # both were rounded to the source's bfloat16, each in its own factors
        error = (found["logits"] - own(**given).logits).abs().max() / found["logits"].abs().max()
    assert error < 0.1
    assert found["held"] == {96}
    assert "DeepseekV3ForCausalLM.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
