"""The plan of a large model needs its config alone: no weights, no memory for them."""

import json
import subprocess
import sys
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "dtype": "bfloat16", "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
SCRIPT = """
import sys
from pathlib import Path
from rewrite.cli import main
code = main(["plan", sys.argv[1], "--to", "gqa:8"])
# what getrusage says begins at the size of the process that started this one
peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, file=sys.stderr)
sys.exit(code)
"""


def test_a_7b_shape_is_planned_in_a_gigabyte(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "6.74 B parameters" in lines[0]
    row = next(line for line in lines if "{0..31}" in line)
    assert "dense 32 × 128" in row
    assert "grouped 8 of 32 × 128" in row
    assert "16 KiB → 4 KiB" in row
    assert int(done.stderr.split()[-1]) < 1_000_000_000
