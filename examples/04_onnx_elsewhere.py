"""An exported folder in other programs than ours: ONNX Runtime GenAI, or optimum's ORTModelForCausalLM.

    reattn export out folder
    python -m venv elsewhere && elsewhere/bin/pip install onnxruntime-genai torch "optimum-onnx[onnxruntime]"
    elsewhere/bin/python examples/04_onnx_elsewhere.py genai folder 464 2068 7586

It prints the tokens and the 40 greedy ones that follow. Nothing of reattn is imported; optimum needs a transformers of
its own, hence the second environment.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

program, folder, tokens = sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]]
NEW = 40
if program == "genai":
    og: Any = import_module("onnxruntime_genai")
    model = og.Model(folder)
    settings, length = og.GeneratorParams(model), len(tokens) + NEW
    settings.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = og.Generator(model, settings)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
else:
    torch: Any = import_module("torch")
    model = import_module("optimum.onnxruntime").ORTModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokens])
    greedy = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0].tolist()
print(*found)
