"""The main job on a real pretrained model: plan, convert to a half and to a third of the cache, check, generate."""

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from rewrite import GQA, convert, plan

HERE = Path(__file__).parent
SOURCE, CALIBRATION, HELD_OUT = (HERE / "models" / n for n in ("llama", "calibration.txt", "held_out.txt"))
OUT = Path("demo")
PROMPT = "def read_lines(path):\n    with open(path"


def complete(folder: Path) -> str:
    """Forty greedy tokens after the prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0])


def main() -> None:
    """Everything goes to ./demo, which is made anew."""
    start, held_out = time.monotonic(), HELD_OUT.read_text()[:80_000]
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for heads in (3, 2):
        folder = OUT / f"llama-gqa{heads}"
        print(plan(SOURCE, GQA(kv_heads=heads)), end="\n\n")
        new = convert(SOURCE, GQA(kv_heads=heads), calibration=CALIBRATION, samples=64, text=held_out, out=folder)
        print(new.rewrite_report, end="\n\n")
    for folder in (SOURCE, OUT / "llama-gqa3", OUT / "llama-gqa2"):
        print(f"--- {folder}\n{complete(folder)}\n")
    print(f"done in {time.monotonic() - start:.0f} s; the converted models are in {OUT}/")


if __name__ == "__main__":
    main()
