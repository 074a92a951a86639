"""What is finished is found by its hash, and by nothing else."""

from pathlib import Path

import pytest

from passes.stream import limit_of
from rewrite.errors import BadUsage
from rewrite.journal import Journal, hash_of


def put(journal: Journal, item: str, text: bytes) -> Path:
    def write(path: Path) -> str:
        path.write_bytes(text)
        return hash_of(path)

    return journal.put(item, write)


def test_another_process_finds_what_was_put(tmp_path: Path):
    path = put(Journal(tmp_path), "site-1", b"made")
    assert Journal(tmp_path).find("site-1") == path
    assert Journal(tmp_path).find("site-10") is None
    assert Journal(tmp_path).find("site") is None


def test_what_was_not_finished_is_not_found(tmp_path: Path):
    def dies(path: Path) -> str:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path).put("site-1", dies)
    assert Journal(tmp_path).find("site-1") is None
    assert put(Journal(tmp_path), "site-1", b"whole").read_bytes() == b"whole"


@pytest.mark.parametrize("damage", [b"", b"mad", b"made!", b"mede"])
def test_what_is_damaged_is_not_found_and_gone(damage: bytes, tmp_path: Path):
    path = put(Journal(tmp_path), "site-1", b"made")
    path.write_bytes(damage)
    assert Journal(tmp_path).find("site-1") is None
    assert not path.exists()


def test_files_elsewhere(tmp_path: Path):
    journal, file = Journal(tmp_path / "journal"), tmp_path / "model.safetensors"
    journal.folder.mkdir()
    file.write_bytes(b"whole")
    assert journal.noted(file) is None
    journal.note(file.name, hash_of(file))
    assert journal.noted(file) == hash_of(file)
    file.write_bytes(b"other")
    assert journal.noted(file) is None


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4e9), ("4 gb", 4e9), ("500MB", 5e8), ("1.5G", 1.5e9), ("2T", 2e12), ("123", 123)]
)
def test_amounts_of_memory(text: str, count: float):
    assert limit_of(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "4 parsecs", "1.2.3G", "nan"])
def test_what_is_no_amount(text: str):
    with pytest.raises(BadUsage, match="is no amount of memory"):
        limit_of(text)
