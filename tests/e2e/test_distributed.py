"""Several processes make the bytes that one makes; where one dies the run ends with a sentence and can be taken up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rewrite.calibration
from rewrite.cli import main

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "llama"
COMMAND = "import sys; from rewrite.cli import main; sys.exit(main(sys.argv[1:]))"
DYING = """
import os, signal, sys, time
from passes.saved import SavedChanges

whole = SavedChanges.__setitem__

def counted(self, name, change):
    whole(self, name, change)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

SavedChanges.__setitem__ = counted
from rewrite.cli import main
sys.exit(main(sys.argv[1:]))
"""
SMALL = "import rewrite.calibration; rewrite.calibration.TOKENS_A_BATCH = 256\n"
DYING_LATER = """
import os, signal
from passes.saved import SavedChanges

whole = SavedChanges.__getitem__

def counted(self, name):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, name)

SavedChanges.__getitem__ = counted
"""
"""All take the first site from the journal to go on with it; one dies there."""
CALIBRATION = [
    "--calibrate", str(MODEL.parent / "calibration.txt"), "--calibrate-samples", "12", "--calibrate-length", "64",
]  # fmt: skip
"""Three batches of four windows."""
CALIBRATED = {
    "heads": ["gqa:3,polish=1", *CALIBRATION],
    "latents with one total": ["mla:cache=0.5,polish=1", *CALIBRATION],
}
TWO_SITES = ["--only", "model.layers.[12].*"]


def words(out: Path, to: tuple[str, ...] = ("mla:cache=0.25", "--memory", "8GB")) -> list[str]:
    return ["convert", str(MODEL), str(out), "--no-check", "--to", *to]


def together(script: str, place: Path, given: list[str], count: int = 2) -> subprocess.CompletedProcess[str]:
    (place / "run.py").write_text(script)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*start, str(place / "run.py"), *given],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(words(out)) == 0
    return contents(out)


def test_two_processes_make_the_same_bytes(tmp_path: Path, alone: dict[str, bytes]):
    done = together(COMMAND, tmp_path, words(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == alone
    assert done.stdout.count("4 of 4 sites converted") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run.py"]


def test_a_process_that_dies_ends_the_run_and_the_next_goes_on(tmp_path: Path, alone: dict[str, bytes]):
    done = together(DYING, tmp_path, words(tmp_path / "out"))
    assert done.returncode != 0
    assert "error[process-lost]" in done.stderr
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial" / "journal").glob("site-00001.*.done"))
    assert main(words(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == alone


@pytest.mark.parametrize("name", CALIBRATED)
def test_batches_are_shared_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bytes of one process that holds the model in memory; a process that dies, and another number that goes on."""
    monkeypatch.setattr(rewrite.calibration, "TOKENS_A_BATCH", 256)
    to = (*CALIBRATED[name], *TWO_SITES)
    assert main(words(tmp_path / "alone", to)) == 0
    out = tmp_path / "out"
    done = together(SMALL + DYING_LATER + COMMAND, tmp_path, words(out, to))
    assert done.returncode != 0
    assert "error[process-lost]" in done.stderr
    assert not out.exists()
    assert [p.name.split(".")[0] for p in (tmp_path / "out.partial" / "journal").glob("*.done")] == ["site-00000"]
    done = together(SMALL + COMMAND, tmp_path, words(out, to), 3)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "alone")
