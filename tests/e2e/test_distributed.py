"""Two processes make the bytes that one makes; where one dies the run ends with a sentence and can be taken up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def words(out: Path) -> list[str]:
    return ["convert", str(MODEL), str(out), "--to", "mla:cache=0.25", "--memory", "8GB", "--no-check"]


def together(script: str, place: Path) -> subprocess.CompletedProcess[str]:
    (place / "run.py").write_text(script)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*start, str(place / "run.py"), *words(place / "out")],
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
    done = together(COMMAND, tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == alone
    assert done.stdout.count("4 of 4 sites converted") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run.py"]


def test_a_process_that_dies_ends_the_run_and_the_next_goes_on(tmp_path: Path, alone: dict[str, bytes]):
    done = together(DYING, tmp_path)
    assert done.returncode != 0
    assert "error[process-lost]" in done.stderr
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial" / "journal").glob("site-00001.*.done"))
    assert main(words(tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == alone
