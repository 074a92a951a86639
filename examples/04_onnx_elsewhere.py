"""An exported folder in other programs than ours: ONNX Runtime GenAI, or optimum's ORTModelForCausalLM.

    reattn export out folder
    python -m venv elsewhere && elsewhere/bin/pip install onnxruntime-genai torch "optimum-onnx[onnxruntime]"
    elsewhere/bin/python examples/04_onnx_elsewhere.py genai folder --new 40 464 2068 7586

It prints the tokens and the greedy ones that follow. Nothing of reattn is imported; optimum needs a transformers of its
own, hence the second environment.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any


def genai(folder: str, tokens: list[int], new: int) -> list[int]:
    """By ONNX Runtime GenAI."""
    og: Any = import_module("onnxruntime_genai")
    model = og.Model(folder)
    settings = og.GeneratorParams(model)
    length = len(tokens) + new
    settings.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = og.Generator(model, settings)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def optimum(folder: str, tokens: list[int], new: int) -> list[int]:
    """By optimum."""
    torch: Any = import_module("torch")
    model = import_module("optimum.onnxruntime").ORTModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokens])
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new
    )
    return text[0].tolist()


PROGRAMS = {"genai": genai, "optimum": optimum}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("folder")
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--new", type=int, default=40)
    given = parser.parse_args()
    print(*PROGRAMS[given.program](given.folder, given.tokens, given.new))
