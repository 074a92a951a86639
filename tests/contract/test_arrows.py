"""The import arrows of ARCHITECTURE.md, read from the sources, and what `import rewrite` and `--help` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("rewrite", "passes", "codegen")
FILES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_file_keeps_to_the_arrows(path: Path):
    ours, name = {i for i in imported(path) if i.split(".")[0] in PACKAGES}, module(path)
    if name.startswith("codegen"):
        wrong = {i for i in ours if not i.startswith(("codegen", "rewrite.site", "rewrite.mask", "rewrite.heads"))}
    elif name.startswith("rewrite") and name not in ("rewrite.api", "rewrite.__init__"):
        wrong = {i for i in ours if i.startswith("passes")}
    else:
        wrong = set()
    assert not wrong, f"{name} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_package_imports_what_stands_beside_it(path: Path):
    outside = {i for i in imported(path) if i.split(".")[0] in ("tests", "bench", "examples", "pytest", "hypothesis")}
    assert not outside


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_are_not_tried(path: Path):
    """What a run does must not hang on what happens to be installed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try) and any(isinstance(s, (ast.Import, ast.ImportFrom)) for s in node.body):
            names = {ast.unparse(h.type) for h in node.handlers if h.type is not None}
            assert not names & {"ImportError", "ModuleNotFoundError", "Exception"}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("statement", ["import rewrite", "import rewrite.cli; rewrite.cli.parser().format_help()"])
def test_no_torch_before_there_is_work(statement: str):
    script = f"import sys; {statement}; print([m for m in ('torch', 'transformers', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_is_shipped():
    """A folder with Python files that setuptools is not told of would be missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in {p.parent for p in FILES}:
        assert f'"{module(folder / "x.py").removesuffix(".x")}"' in text
