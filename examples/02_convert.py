"""A smaller cache for a loaded model; the original is untouched, generate() works as before."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from rewrite import GQA, convert

MODELS = Path(__file__).parent / "models"

model: Any = AutoModelForCausalLM.from_pretrained(MODELS / "llama", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(MODELS / "llama")
new = convert(model, GQA(kv_heads=3), calibration=MODELS / "calibration.txt")

ids = tokenizer("import os\n\ndef ", return_tensors="pt")["input_ids"]
for name, each in (("before", model), ("after", new)):
    out = each.generate(ids, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    print(f"{name}: {cache} bytes of cache\n{tokenizer.decode(out.sequences[0])}\n")
