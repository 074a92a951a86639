"""kill -9 at any moment of a conversion in pieces, and the same command again: every file has the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rewrite.cli import main

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "llama"
DYING = """
import os, signal, sys
import rewrite.{module} as there

whole, left = there.{name}, [{after}]

def counted(*args, **kwargs):
    made = whole(*args, **kwargs)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return made

there.{name} = counted
from rewrite.cli import main
sys.exit(main(sys.argv[1:]))
"""
# the first file that is given its name is the key
MOMENTS = {
    "first-site": ("journal.os", "replace", 2),
    "third-site": ("journal.os", "replace", 4),
    "half-a-site": ("weights.os", "fsync", 2),
    "half-a-file": ("shards", "write", 1),
    "file-not-noted": ("journal.Journal", "noted", 1),
    "before-the-name": ("save", "write_card", 1),
}


def words(out: Path) -> list[str]:
    return ["convert", str(MODEL), str(out), "--to", "gqa:3", "--memory", "8GB", "--no-check"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def die(out: Path, module: str, name: str, after: int) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = DYING.format(module=module, name=name, after=after)
    if "." in module:
        file, owner = module.split(".")
        script = script.replace(f"import rewrite.{module} as there", f"from rewrite.{file} import {owner} as there")
    done = subprocess.run(
        [sys.executable, "-c", script, *words(out)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(words(out)) == 0
    return contents(out)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(moment: str, tmp_path: Path, undisturbed: dict[str, bytes]):
    die(tmp_path / "out", *MOMENTS[moment])
    assert not (tmp_path / "out").exists()
    assert main(words(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_finished_sites_are_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    die(tmp_path / "out", *MOMENTS["third-site"])
    capsys.readouterr()
    assert main(words(tmp_path / "out")) == 0
    told = capsys.readouterr().err
    assert "layers.3" in told
    assert not any(f"layers.{i}" in told for i in (0, 1, 2))


def test_a_damaged_piece_is_found_and_made_again(tmp_path: Path, undisturbed: dict[str, bytes]):
    die(tmp_path / "out", *MOMENTS["third-site"])
    piece = next((tmp_path / "out.partial" / "journal").glob("site-00001.*"))
    raw = bytearray(piece.read_bytes())
    raw[-1] ^= 1
    piece.write_bytes(raw)
    assert main(words(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == undisturbed


def test_another_conversion_is_not_taken_up(tmp_path: Path, capsys: pytest.CaptureFixture[str], golden):
    die(tmp_path / "out", *MOMENTS["first-site"])
    other = [*words(tmp_path / "out"), "--seed", "1"]
    other[other.index("gqa:3")] = "gqa:2"
    capsys.readouterr()
    assert main(other) == 3
    golden(capsys.readouterr().err.replace(str(tmp_path), "PLACE"))
    assert main([*other, "--restart"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
