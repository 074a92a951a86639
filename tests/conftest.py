"""Fixtures for every test: golden files, and one thread so that sums are the same everywhere."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# a loaded machine is slow to draw its first example, which says nothing about the strategy
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files; read the diff")
    parser.addoption("--elsewhere", help="the interpreter that has onnxruntime-genai and optimum-onnx")


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it again, nor as often as by default."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`golden(text)` compares with tests/golden/<file>/<test>.txt; --update-golden rewrites it."""
    name = re.sub(r"[^\w.=,+-]+", "-", request.node.name).strip("-")
    path = GOLDEN / Path(request.node.path).stem / f"{name}.txt"

    def compare(text: str) -> None:
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists():
            pytest.fail(
                f"no golden file {path.relative_to(GOLDEN.parent.parent)}; "
                f"run: pytest '{request.node.nodeid}' --update-golden   and read the diff"
            )
        assert text == path.read_text(encoding="utf-8")

    return compare
