"""Train the three small language models that ship with the project, from text every Python has.

Corpus: the sources of the Python standard library. Tokenizer: byte-level BPE of 4096 tokens, trained here.
`python examples/train_models.py llama` writes `examples/models/llama` in Hugging Face format (bf16 safetensors)
with `training.json`, which states tokens seen, CPU minutes and the held-out perplexities; `all` trains the three.
The held-out and the calibration text are written beside the models and never trained on.
"""

import argparse
import collections
import hashlib
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent / "models"
VOCAB, CONTEXT, BATCH = 4096, 256, 8
LEFT_OUT = {"test", "tests", "encodings", "pydoc_data", "idle_test", "turtledemo", "site-packages", "dist-packages"}
"""Folders of tests, tables and examples."""
END = "<|end|>"


def corpus() -> dict[str, str]:
    """Source files of the standard library by relative path, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    return {str(p.relative_to(root)): p.read_text("utf-8", "replace") for p in files}


def split(files: dict[str, str], size: int = 200_000) -> tuple[str, str, str]:
    """(train, calibration, held-out) text; a file's hash decides where it goes, no file is cut in two places."""
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for name in sorted(files, key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
        where = next((i for i in (2, 1) if sum(map(len, parts[i])) < size), 0)
        parts[where].append(files[name][:30_000] if where else files[name])
    train, calibration, held_out = parts
    return END.join(sorted(train)), END.join(calibration)[:size], END.join(held_out)[:size]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, which ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=CONTEXT)


def build(kind: str) -> PreTrainedModel:
    """One of the three models: 4 layers, 6 query heads of 32 dimensions, all kv heads separate."""
    torch.manual_seed(0)
    shared: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    shared |= {"vocab_size": VOCAB, "tie_word_embeddings": True}
    gated: dict[str, Any] = {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 6, "head_dim": 32, "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared, **gated))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shared, **gated))
    sizes: dict[str, Any] = {"n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": CONTEXT}
    return GPT2LMHeadModel(GPT2Config(**shared, **sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Held-out perplexity in windows of the context, every token but the first of a window predicted."""
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(16):
            total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
    return math.exp(total / len(windows))


def ngram_perplexities(train: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Unigram (add one) and bigram (interpolated with the unigram, Witten-Bell weights) perplexities."""
    ones = collections.Counter(train.tolist())
    twos = collections.Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    kinds = collections.Counter(a for a, _ in twos)
    total, bits1, bits2 = len(train), 0.0, 0.0
    pairs = list(zip(held_out[:-1].tolist(), held_out[1:].tolist(), strict=True))
    for a, b in pairs:
        unigram = (ones[b] + 1) / (total + VOCAB)
        back = kinds[a] / (kinds[a] + ones[a]) if ones[a] else 1.0
        bits1 -= math.log(unigram)
        bits2 -= math.log((1 - back) * (twos[a, b] / ones[a] if ones[a] else 0.0) + back * unigram)
    return {"unigram": math.exp(bits1 / len(pairs)), "bigram": math.exp(bits2 / len(pairs))}


def rate(step: int, steps: int, peak: float = 2.5e-3) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to a twentieth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(model: PreTrainedModel, ids: torch.Tensor, steps: int) -> None:
    """AdamW on random windows; biases, norms and embeddings without weight decay."""
    tables = ("emb", "wte", "wpe")
    decay = [p for n, p in model.named_parameters() if p.dim() == 2 and not any(t in n for t in tables)]
    rest = [p for p in model.parameters() if all(p is not q for q in decay)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    start = time.process_time()
    for step in range(steps):
        at = torch.randint(len(ids) - CONTEXT, (BATCH,), generator=generator)
        batch = torch.stack([ids[i : i + CONTEXT] for i in at])
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            minutes = (time.process_time() - start) / 60
            print(f"step {step}/{steps} loss {float(loss.detach()):.3f} cpu {minutes:.1f} min", flush=True)


def ship(kind: str, steps: int) -> None:
    """Train one model and write its folder."""
    train_text, calibration, held_out = split(corpus())
    HERE.mkdir(exist_ok=True)
    (HERE / "calibration.txt").write_text(calibration)
    (HERE / "held_out.txt").write_text(held_out)
    tokenizer = train_tokenizer(train_text)
    ids, unseen = (torch.tensor(tokenizer(t, verbose=False)["input_ids"]) for t in (train_text, held_out))
    print(f"{kind}: {len(ids)} training tokens, {len(unseen)} held out", flush=True)
    start = time.process_time()
    trained = build(kind)
    train(trained, ids, steps)
    minutes = (time.process_time() - start) / 60
    model: Any = trained
    model.to(torch.bfloat16)
    facts = {
        "parameters": model.num_parameters(), "corpus_tokens": len(ids), "tokens_seen": steps * BATCH * CONTEXT,
        "steps": steps, "cpu_minutes": round(minutes, 1), "held_out_tokens": len(unseen),
        "held_out_perplexity": {"model": perplexity(model.float().eval(), unseen), **ngram_perplexities(ids, unseen)},
    }  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(HERE / kind)
    tokenizer.save_pretrained(HERE / kind)
    (HERE / kind / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    for path in (HERE / kind).iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["llama", "qwen3", "gpt2", "all"])
    parser.add_argument("--steps", type=int, default=3400, help="optimiser steps of 2048 tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in ["llama", "qwen3", "gpt2"] if args.kind == "all" else [args.kind]:
        ship(kind, args.steps)
