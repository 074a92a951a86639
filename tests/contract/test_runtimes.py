"""Every line that a plan prints about what loads the result is held by a test; the generated file is whole."""

import ast
import inspect
from pathlib import Path

import pytest

from rewrite.emit.runtime import PARTS
from rewrite.runtimes import RUNTIMES, Runtime, runtimes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda r: r.line[:30])
def test_the_test_exists(runtime: Runtime):
    path, _, name = runtime.test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("forms", "trust"), [({"stock"}, False), ({"stock", "grouped"}, True), ({"view"}, True), ({"stock", "view"}, True)]
)
def test_code_in_the_folder_is_told(forms: set[str], trust: bool):
    assert ("trust_remote_code" in " ".join(runtimes(forms))) == trust


def test_nothing_is_claimed_for_what_is_not_known():
    assert runtimes(set()) == runtimes({""}) == runtimes({"new"}) == ()


def test_no_part_of_the_generated_file_hides_a_name_of_another():
    """The parts' texts stand one after the other in one file."""
    owners: dict[str, list[str]] = {}
    for part in PARTS:
        for node in ast.parse(inspect.getsource(part)).body:
            named = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            named += [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            for name in named:
                owners.setdefault(name, []).append(part.__name__)
    assert {name: parts for name, parts in owners.items() if len(parts) > 1} == {}
