"""kill -9 at any moment of a conversion in pieces, and the same command again: every file has the same bytes."""

import json
from pathlib import Path

import pytest

from rewrite.cli import main
from tests.dying import die

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "llama"
# the first file that is given its name is the key
MOMENTS = {
    "first-site": ("rewrite.journal:os", "replace", 2),
    "third-site": ("rewrite.journal:os", "replace", 4),
    "half-a-site": ("rewrite.weights:os", "fsync", 2),
    "half-a-file": ("rewrite.shards", "write", 1),
    "file-not-noted": ("rewrite.journal:Journal", "noted", 1),
    "before-the-name": ("rewrite.save", "write_card", 1),
}


def words(out: Path) -> list[str]:
    return ["convert", str(MODEL), str(out), "--to", "gqa:3", "--memory", "8GB", "--no-check"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(words(out)) == 0
    return contents(out)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(moment: str, tmp_path: Path, undisturbed: dict[str, bytes]):
    die(words(tmp_path / "out"), *MOMENTS[moment])
    assert not (tmp_path / "out").exists()
    assert main(words(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_finished_sites_are_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    die(words(tmp_path / "out"), *MOMENTS["third-site"])
    capsys.readouterr()
    assert main(words(tmp_path / "out")) == 0
    told = capsys.readouterr().err
    assert "layers.3" in told
    assert not any(f"layers.{i}" in told for i in (0, 1, 2))


def test_a_damaged_piece_is_found_and_made_again(tmp_path: Path, undisturbed: dict[str, bytes]):
    die(words(tmp_path / "out"), *MOMENTS["third-site"])
    piece = next((tmp_path / "out.partial" / "journal").glob("site-00001.*"))
    raw = bytearray(piece.read_bytes())
    raw[-1] ^= 1
    piece.write_bytes(raw)
    assert main(words(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == undisturbed


def test_another_conversion_is_not_taken_up(tmp_path: Path, capsys: pytest.CaptureFixture[str], golden):
    die(words(tmp_path / "out"), *MOMENTS["first-site"])
    other = [*words(tmp_path / "out"), "--seed", "1"]
    other[other.index("gqa:3")] = "gqa:2"
    capsys.readouterr()
    assert main(other) == 3
    golden(capsys.readouterr().err.replace(str(tmp_path), "PLACE"))
    assert main([*other, "--restart"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2
