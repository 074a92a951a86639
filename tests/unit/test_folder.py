"""Output folders are whole or absent, whatever happens in between."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rewrite.errors import OutOfSpace, Refused
from rewrite.folder import draft, refuse_output

ROOT = Path(__file__).parents[2]

WRITER = """
import sys, time
from pathlib import Path
from rewrite.folder import draft
with draft(Path(sys.argv[1])) as d:
    (d.path / "a").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
    d.publish()
"""


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def fill(out: Path) -> None:
    with draft(out) as d:
        (d.path / "a").write_text("whole")
        (d.path / "sub").mkdir()
        (d.path / "sub" / "b").write_text("whole")
        (d.path / "a").chmod(0o600)
        d.publish()


def test_published_is_whole_and_alone(tmp_path: Path):
    fill(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a", "sub"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_nothing_under_the_name_until_it_is_whole(tmp_path: Path):
    with draft(tmp_path / "out") as d:
        (d.path / "a").write_text("x")
        assert not (tmp_path / "out").exists()


def test_not_published_is_gone(tmp_path: Path):
    with draft(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path: Path):
    def dies() -> None:
        with draft(tmp_path / "out") as d:
            (d.path / "a").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        dies()
    assert names(tmp_path) == []


def test_failed_keeps_its_own_name(tmp_path: Path):
    for want in ("out.failed", "out.failed-2", "out.failed-3"):
        with draft(tmp_path / "out") as d:
            assert d.fail().name == want
    assert names(tmp_path) == ["out.failed", "out.failed-2", "out.failed-3"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling-link", "full-folder"])
def test_what_exists_is_never_replaced(kind: str, tmp_path: Path):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling-link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "full-folder":
            (out / "mine").write_text("x")
    before = names(tmp_path)
    with pytest.raises(Refused) as caught:
        fill(out)
    assert caught.value.slug == "output-exists"
    assert names(tmp_path) == before


def test_a_folder_made_meanwhile_is_not_replaced(tmp_path: Path):
    def races() -> None:
        with draft(tmp_path / "out") as d:
            (tmp_path / "out").mkdir()
            d.publish()

    with pytest.raises(Refused, match="exists already"):
        races()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_a_missing_parent(tmp_path: Path, golden):
    with pytest.raises(Refused) as caught:
        refuse_output(tmp_path / "no" / "out")
    golden(str(caught.value).replace(str(tmp_path), "PLACE"))
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path: Path, golden):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused) as caught:
        refuse_output(tmp_path / "file" / "out")
    golden(str(caught.value).replace(str(tmp_path), "PLACE"))


def test_a_parent_where_nothing_can_be_made():
    """/proc takes no folders, not even from root."""
    with pytest.raises(Refused) as caught:
        refuse_output(Path("/proc/reattn-out"))
    assert caught.value.slug == "output-unwritable"


def test_inside_the_input(tmp_path: Path):
    with pytest.raises(Refused) as caught:
        refuse_output(tmp_path / "out", tmp_path)
    assert caught.value.slug == "output-inside-input"


def test_a_foreign_partial_is_not_touched(tmp_path: Path, golden):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(Refused) as caught:
        fill(tmp_path / "out")
    golden(str(caught.value).replace(str(tmp_path), "PLACE"))
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_a_full_disk_has_its_own_code(tmp_path: Path):
    with pytest.raises(OutOfSpace) as caught, draft(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert caught.value.code == 4
    assert names(tmp_path) == []


def start(out: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def test_killed_then_again(tmp_path: Path):
    writer = start(tmp_path / "out")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert names(tmp_path) == ["out.partial"]
    fill(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a", "sub"]
    assert (tmp_path / "out" / "a").read_text() == "whole"


def test_a_living_writer_is_not_disturbed(tmp_path: Path):
    writer = start(tmp_path / "out")
    try:
        with pytest.raises(Refused) as caught:
            fill(tmp_path / "out")
        assert caught.value.slug == "output-busy"
        assert (tmp_path / "out.partial" / "whole" / "a").read_text() == "half"
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("gone", ["whole", "mark-only", "empty"])
def test_death_at_any_point_of_cleaning_leaves_ours(gone: str, tmp_path: Path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    if gone != "empty":
        (partial / "reattn-partial").write_text("x")
    if gone == "whole":
        (partial / "whole").mkdir()
        (partial / "whole" / "a").write_text("half")
    fill(tmp_path / "out")
    assert names(tmp_path) == ["out"]
