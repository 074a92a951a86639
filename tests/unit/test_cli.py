"""The command line without a model: help, usage errors, and every failure in the shape of ours."""

import errno
import re

import pytest

from rewrite.cli import as_refusal, main, parser
from rewrite.errors import BadUsage, Refused

GROUPS = {
    "plan": {"What": {"MODEL", "--to", "--only", "--skip", "--why"}, "Limits": {"--context"}},
    "convert": {
        "What": {"MODEL", "--to", "--only", "--skip", "--calibrate", "--tune"},
        "Where": {"OUT", "--text", "--emit"},
        "Limits": {"--calibrate-samples", "--calibrate-length", "--memory", "--restart", "--max-loss", "--seed"},
        "Dangerous": {"--no-check"},
    },
    "check": {
        "What": {"OUT", "--against"},
        "Where": {"--text"},
        "Limits": {"--max-loss", "--seed"},
        "Dangerous": {"--trust-remote-code"},
    },
    "export": {"What": {"MODEL", "--form", "--dtype"}, "Where": {"OUT"}, "Dangerous": {"--trust-remote-code"}},
}


@pytest.mark.parametrize("verb", GROUPS)
def test_options_are_in_their_groups(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    parts = re.split(r"\n(\w+):\n", capsys.readouterr().out)
    shown = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(shown.pop("options").split()) >= {"--json", "--debug"}
    assert {title: {w for w in re.findall(r"^  (\S+)", text, re.M)} for title, text in shown.items()} == GROUPS[verb]


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.findall(r"^    (\w+) ", capsys.readouterr().out, re.M) == list(GROUPS)


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
def test_usage(kind: str, capsys: pytest.CaptureFixture[str]):
    """The sentence is argparse's own and differs between versions of Python; its shape is ours."""
    assert main(WRONG[kind]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert re.fullmatch(r"error\[usage\] .+\n  see: reattn( \w+)? --help\n", seen.err)


@pytest.mark.parametrize("words", [["--max-loss", "5%"], ["--max-loss", "5%", "--text", "x", "--no-check"]])
def test_a_limit_needs_something_to_measure(words: list[str], capsys: pytest.CaptureFixture[str], golden):
    assert main(["convert", "m", "o", "--to", "gqa:1", *words]) == 2
    golden(capsys.readouterr().err)


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
