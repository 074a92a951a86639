"""Models as ONNX files: one graph for prefill and decoding, whose cache is as small as the model's.

export.py     the way from a model to a file, whole or absent
tracing.py    what the exporter is shown: tensors in, tensors out
stage.py      the model with our attention in place of its own, for as long as it is traced
caches.py     the cache while it is traced: grown by concatenation, or written in place
sparse.py     masks of a module's own, and what a cache that drops tokens holds
attention.py  attention over what is cached, query heads as rows, nothing repeated
functions.py  absorbed latents, and tiles under a window, as functions of the file in standard operators
graph.py      what is asked of the finished graph: axes, operators, no repeated cache
verify.py     the file in ONNX Runtime against the model in torch
names.py      names of inputs, outputs and metadata
genai.py      the config that ONNX Runtime GenAI reads, and who loads what
run.py        decoding with numpy and onnxruntime alone
"""
