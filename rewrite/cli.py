"""The command `reattn plan | convert | check | export`: tables on stdout, progress and errors on stderr.

Exit codes: 0 done, 1 check failed, 2 usage, 3 refused or nothing converted, 4 memory or disk. Nothing heavy is
imported before there is work to do, so help is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from rewrite.errors import BadUsage, OutOfSpace, ReattnError, Refused
from rewrite.verbs import run_check, run_convert, run_export, run_plan

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Errors in the shape of all others."""

    def error(self, message: str) -> NoReturn:
        raise BadUsage("usage", message, f"see: {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json, debug = "--json" in words, "--debug" in words
    try:
        options = parser().parse_args(words)
        run: Callable[[argparse.Namespace], tuple[str, int]] = options.run
        # libraries print where they like; stdout is for the result alone
        with redirect_stdout(sys.stderr):
            text, code = run(options)
        sys.stdout.write(text.rstrip("\n") + "\n" if text else "")
        return code
    except KeyboardInterrupt:
        print("stopped; nothing is left under the requested name, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return _show(as_refusal(error), as_json)


def as_refusal(error: Exception) -> ReattnError:
    """Any failure in the shape of ours: memory and disk by their own code, the rest as a defect of this tool."""
    if isinstance(error, ReattnError):
        return error
    no_room = isinstance(error, OSError) and error.errno in (28, 122)
    if no_room:
        return OutOfSpace("disk", "the disk is full", "free some, or write elsewhere")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return OutOfSpace(
            "memory",
            "the memory is full",
            str(error).splitlines()[0] if str(error) else "no more can be had",
            "a shorter --calibrate-length or fewer --calibrate-samples need less",
        )
    first = str(error).strip().splitlines()
    return Refused(
        "internal",
        f"something in reattn broke: {type(error).__name__}: {first[0] if first else 'no message'}",
        "the same command with --debug shows where; please report it",
    )


def _show(error: ReattnError, as_json: bool) -> int:
    print(error, file=sys.stderr)
    if as_json:
        from rewrite.record import to_json

        told = {"slug": error.slug, "what": error.what, "lines": error.lines}
        sys.stdout.write(to_json({"error": told, "exit": error.code}))
    return error.code


def parser() -> argparse.ArgumentParser:
    """The command line; options are in four groups: what, where, limits, dangerous."""
    top = _Parser(prog="reattn", description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for add in (_add_plan, _add_convert, _add_check, _add_export):
        add(verbs)
    return top


_TO = "what to make of the attention: gqa:3, mla:cache=0.25, sparse:window=4096,sink=4, sparse:density=0.5"
_FORMATTER = argparse.RawDescriptionHelpFormatter


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], tuple[str, int]], about: str) -> Any:
    made: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about, formatter_class=_FORMATTER)
    made.set_defaults(run=run)
    made.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    made.add_argument("--debug", action="store_true", help="the whole traceback of an error")
    return made


def _select(group: Any) -> None:
    group.add_argument("--only", metavar="GLOB", default="*", help="sites to convert (all)")
    group.add_argument("--skip", metavar="GLOB", action="append", default=[], help="sites to leave as they are")


def _add_plan(verbs: Any) -> None:
    verb = _verb(
        verbs, "plan", run_plan, "list every attention of a model and what a conversion would do; reads no weights"
    )
    what = verb.add_argument_group("What")
    what.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder, or a config.json")
    what.add_argument("--to", metavar="TARGET", action="append", default=[], help=_TO)
    _select(what)
    what.add_argument("--why", metavar="SITE", help="everything known about one site, or why it is none")
    limits = verb.add_argument_group("Limits")
    limits.add_argument("--context", metavar="TOKENS", type=_positive, default=32_768, help="size of the cache (32768)")


def _add_convert(verbs: Any) -> None:
    verb = _verb(
        verbs, "convert", run_convert, "convert a checkpoint folder, check the result, and write it to a new folder"
    )
    what = verb.add_argument_group("What")
    what.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder")
    what.add_argument("--to", metavar="TARGET", action="append", required=True, default=[], help=_TO)
    _select(what)
    what.add_argument(
        "--calibrate", metavar="FILE", type=Path, help="text to convert on; without it weights alone decide"
    )
    what.add_argument("--tune", metavar="STEPS", type=_positive, default=0, help="tune every site on its own (off)")
    where = verb.add_argument_group("Where")
    where.add_argument("out", metavar="OUT", type=Path, help="the new folder; it must not exist")
    where.add_argument("--text", metavar="FILE", type=Path, help="text to measure perplexity on")
    where.add_argument(
        "--emit", choices=("auto", "stock", "own"), default="auto", help="how a latent is written: for engines, or own"
    )
    limits = verb.add_argument_group("Limits")
    limits.add_argument("--calibrate-samples", metavar="N", type=_positive, default=128, help="windows of text (128)")
    limits.add_argument(
        "--calibrate-length",
        metavar="TOKENS",
        type=_positive,
        default=None,
        help="tokens a window (the model's context)",
    )
    limits.add_argument("--memory", metavar="SIZE", help="go site by site and hold at most this: 4GB (80%% of free)")
    limits.add_argument("--restart", action="store_true", help="discard what an interrupted run has finished")
    _limits(limits)
    verb.add_argument_group("Dangerous").add_argument(
        "--no-check", action="store_true", help="write the result without measuring what was lost"
    )


def _add_check(verbs: Any) -> None:
    verb = _verb(verbs, "check", run_check, "measure a converted folder against the model that it was made from")
    what = verb.add_argument_group("What")
    what.add_argument("out", metavar="OUT", type=Path, help="the converted folder")
    what.add_argument("--against", metavar="MODEL", type=Path, required=True, help="the original folder")
    where = verb.add_argument_group("Where")
    where.add_argument("--text", metavar="FILE", type=Path, help="text to measure perplexity on")
    _limits(verb.add_argument_group("Limits"))
    _trust(verb)


def _add_export(verbs: Any) -> None:
    verb = _verb(verbs, "export", run_export, "write a model as ONNX and run it against torch before it is there")
    what = verb.add_argument_group("What")
    what.add_argument("model", metavar="MODEL", type=Path, help="a folder, converted or not")
    what.add_argument(
        "--form",
        choices=("auto", "matmul", "attention", "shared", "contrib"),
        default="auto",
        help="how attention is written",
    )
    what.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="type of the weights (float32)"
    )
    verb.add_argument_group("Where").add_argument(
        "out", metavar="OUT", type=Path, help="a file that ends in .onnx, or a folder; it must not exist"
    )
    _trust(verb)


def _trust(verb: argparse.ArgumentParser) -> None:
    verb.add_argument_group("Dangerous").add_argument(
        "--trust-remote-code", action="store_true", help="run the modelling file that lies in the folder"
    )


def _limits(group: Any) -> None:
    group.add_argument(
        "--max-loss", metavar="SHARE", type=_share, help="fail where perplexity rises by more: 0.05, 5%%"
    )
    group.add_argument("--seed", metavar="N", type=int, default=0, help="seed of everything random (0)")


def _positive(text: str) -> int:
    digits = text.replace(",", "").replace("_", "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 up")
    return int(digits)


def _share(text: str) -> float:
    digits = text.removesuffix("%")
    if not digits.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no share; write 0.05 or 5%")
    return float(digits) / (100 if text.endswith("%") else 1)


if __name__ == "__main__":
    sys.exit(main())
