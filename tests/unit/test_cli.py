"""The command line without a model: help, usage errors, and every failure in the shape of ours."""

import errno

import pytest

from rewrite.cli import as_refusal, main, parser
from rewrite.errors import BadUsage, Refused


@pytest.mark.parametrize("verb", ["", "plan", "convert", "check"])
def test_help(verb: str, golden, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    golden(capsys.readouterr().out)


@pytest.mark.parametrize("verb", ["plan", "convert", "check"])
def test_help_has_only_our_groups(verb: str):
    groups = {g.title for g in parser()._subparsers._group_actions[0].choices[verb]._action_groups if g._group_actions}
    assert groups <= {"What", "Where", "Limits", "Dangerous", "options"}
    assert {"What", "Limits"} <= groups


WRONG = {
    "no-verb": [],
    "verb": ["pln"],
    "no-model": ["plan"],
    "option": ["plan", "m", "--fast"],
    "no-target": ["convert", "m", "o"],
    "context": ["plan", "m", "--context", "0"],
    "share": ["check", "o", "--against", "m", "--max-loss", "much"],
    "negative": ["check", "o", "--against", "m", "--max-loss=-1"],
}


@pytest.mark.parametrize("kind", WRONG)
def test_usage(kind: str, golden, capsys: pytest.CaptureFixture[str]):
    assert main(WRONG[kind]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    golden(seen.err)


@pytest.mark.parametrize(("text", "share"), [("0.05", 0.05), ("5%", 0.05), ("0", 0.0)])
def test_share(text: str, share: float):
    options = parser().parse_args(["check", "o", "--against", "m", "--max-loss", text])
    assert options.max_loss == pytest.approx(share)


@pytest.mark.parametrize(
    ("error", "slug", "code"),
    [
        (BadUsage("x", "y"), "x", 2),
        (OSError(errno.ENOSPC, "No space left"), "disk", 4),
        (MemoryError(), "memory", 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory", 4),
        (KeyError("x"), "internal", 3),
    ],
)
def test_failures_have_a_slug_and_a_code(error: Exception, slug: str, code: int):
    ours = as_refusal(error)
    assert (ours.slug, ours.code) == (slug, code)


def test_json_tells_of_errors_too(capsys: pytest.CaptureFixture[str], tmp_path):
    assert main(["plan", str(tmp_path), "--json"]) == 3
    seen = capsys.readouterr()
    assert '"slug": "not-a-model"' in seen.out
    assert seen.err.startswith("error[not-a-model]")


def test_debug_shows_where(tmp_path):
    with pytest.raises(Refused):
        main(["plan", str(tmp_path), "--debug"])
