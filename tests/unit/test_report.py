"""The report as text, JSON, TOML, card and page; what is written reads back."""

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rewrite.card import card, command, page, recipe, write_card
from rewrite.report import Calibration, Checked, Pair, Report, SiteRow

CHECKED = Checked(
    tokens=32704,
    perplexity=Pair(5.47, 5.81),
    rise=(0.056, 0.069),
    same_next=0.913,
    divergence=0.041,
    difference=0.12,
    lossless=2e-6,
    lossless_limit=1e-5,
    parameters=Pair(6.74e9, 5.93e9),
    cache=Pair(64 * 1024, 16 * 1024),
    kind="float32",
    cache_tokens=63,
    max_loss=None,
)


def row(i: int, error: float | None = 0.01, after: str = "grouped 3 of 6 × 32") -> SiteRow:
    return SiteRow(
        f"model.layers.{i}.self_attn", True, "dense 6 × 32", after, 384, 192, 147456, 110592, "stock", "", error
    )


REPORT = Report(
    version=1,
    model="./llama",
    architecture="LlamaForCausalLM",
    fingerprint="9f2c",
    target=("gqa:3",),
    only="*",
    skip=("model.layers.3.*",),
    seed=0,
    calibration=Calibration("wiki.txt", "41aa", 65536, 128, 512),
    sites=(
        row(0, 0.083),
        row(1, 0.071),
        row(2, 0.01),
        replace(row(3, None, "dense 6 × 32"), converted=False, note="left out"),
    ),
    checked=CHECKED,
    notes=("a note with <tags> & signs",),
    made_by=(("reattn", "0.1.0"), ("torch", "2.13.0")),
)


def test_text(golden):
    golden(str(REPORT))


def test_text_of_a_failure(golden):
    golden(replace(REPORT, checked=replace(CHECKED, max_loss=0.05)).text())


def test_text_without_calibration_or_language(golden):
    bare = replace(CHECKED, tokens=0, perplexity=None, rise=None, same_next=None, divergence=None, cache=None)
    sites = tuple(replace(s, error=None) for s in REPORT.sites)
    golden(replace(REPORT, calibration=None, checked=bare, sites=sites).text())


def test_json_reads_back():
    assert Report.read(REPORT.json()) == REPORT
    assert Report.read(replace(REPORT, checked=None, calibration=None).json()).checked is None


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("seed",), "0", "seed is '0', not int"),
        (("sites",), {}, "not a list"),
        (("sites", 0, "name"), 3, r"sites\[0\].name is 3, not str"),
        (("checked", "perplexity"), 3, "not an object"),
        (("checked", "rise"), [1.0], "holds 1 items, not 2"),
        (("extra",), 1, "has the unknown field extra"),
    ],
)
def test_json_that_is_no_report(path: tuple[str | int, ...], value: object, why: str):
    raw = json.loads(REPORT.json())
    at = raw
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=why):
        Report.read(json.dumps(raw))


def test_what_is_no_number_is_written_as_null():
    text = replace(REPORT, checked=replace(CHECKED, divergence=math.nan)).json()
    assert Report.read(text).checked == replace(CHECKED, divergence=None)


def test_recipe(golden):
    golden(recipe(REPORT))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
@pytest.mark.parametrize("name", ["./llama", 'a "b" \\ c', "línea\n\t\x7f\x00", "模型"])
def test_recipe_is_toml(name: str):
    import tomllib

    read = tomllib.loads(recipe(replace(REPORT, model=name, skip=(name,))))
    assert read["model"] == {"path": name, "sha256": "9f2c"}
    assert read["skip"] == [name]
    assert read["calibration"]["length"] == 512


def test_card(golden):
    golden(card(REPORT, "apache-2.0"))


def test_card_says_when_code_is_run(tmp_path: Path):
    write_card(tmp_path, REPORT)
    assert "trust_remote_code" not in (tmp_path / "README.md").read_text()
    maps = {"AutoConfig": "m.C", "AutoModel": "m.B", "AutoModelForCausalLM": "m.A"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": maps}))
    write_card(tmp_path, REPORT)
    want = 'AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)'
    assert want in (tmp_path / "README.md").read_text()


def test_command_repeats_every_setting():
    text = command(replace(REPORT, only="model.*", seed=7, target=("gqa:3", "toy:1")))
    assert text == (
        "reattn convert ./llama OUT --to gqa:3 --to toy:1 --calibrate wiki.txt --calibrate-samples 128 "
        "--calibrate-length 512 --only 'model.*' --skip 'model.layers.3.*' --seed 7"
    )


class Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_escapes_and_needs_no_network():
    seen = Outline()
    seen.feed(page(REPORT))
    assert seen.links == []
    assert "a note with <tags> & signs" in "".join(seen.text)


def test_equal_reports_leave_equal_bytes(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, Report.read(REPORT.json()), "mit")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert set(one) == {"reattn.toml", "report.json", "report.html", "README.md"}


def test_failures():
    assert CHECKED.failures == ()
    assert "perplexity rose 6.2 %, limit 5 %" in replace(CHECKED, max_loss=0.05).failures
    assert replace(CHECKED, max_loss=0.07).failures == ()
    assert "this is an error of reattn" in replace(CHECKED, lossless=1e-3).failures[0]
    assert replace(CHECKED, lossless=math.nan).failures
    assert replace(CHECKED, perplexity=Pair(5.0, math.nan), max_loss=0.05).failures
    assert "perplexity was not measured" in replace(CHECKED, perplexity=None, max_loss=0.05).failures[0]
    assert replace(CHECKED, perplexity=None).failures == ()
    assert replace(CHECKED, broken="the output holds 3 values that are no numbers").failures


def test_what_was_not_measured_is_not_claimed():
    text = replace(CHECKED, lossless=None, perplexity=None, cache=None).text()
    assert not any(word in text for word in ("lossless", " ok", "perplexity", "kv cache"))


def test_suggestion_names_the_worst():
    assert "--skip 'model.layers.0.self_attn' --skip 'model.layers.1.self_attn'" in REPORT.suggestion()
    assert replace(REPORT, sites=REPORT.sites[:2]).suggestion() == ""
