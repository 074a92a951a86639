"""What a target would make of a model, before any weight is read."""

from pathlib import Path

from rewrite import GQA, plan

MODEL = Path(__file__).parent / "models" / "qwen3"

print(plan(MODEL))
print()
print(plan(MODEL, GQA(kv_heads=3), context=4096))
