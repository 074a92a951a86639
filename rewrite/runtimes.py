"""Which programs load a result, by the form of its sites. Every line names the test that holds it true."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """A program that loads results whose sites all have one of `forms`."""

    forms: frozenset[str]
    line: str
    test: str
    """path::function of the test; a contract test checks that it exists."""


RUNTIMES = (
    Runtime(
        frozenset({"stock"}),
        "transformers, as an ordinary checkpoint: AutoModel classes load it, nothing else is needed",
        "tests/e2e/test_folder_bare.py::test_bare_process",
    ),
    Runtime(
        frozenset({"stock", "grouped", "view", "grouped or view", "latent", "factored", "sparse"}),
        "transformers with trust_remote_code=True: one generated modelling file lies beside the weights",
        "tests/e2e/test_folder_bare.py::test_bare_process",
    ),
    Runtime(
        frozenset({"deepseek"}),
        "transformers, as an ordinary DeepSeek-V3 checkpoint; vLLM and SGLang where the sizes are theirs",
        "tests/e2e/test_engines_replay.py::test_the_shipped_model",
    ),
    Runtime(
        frozenset({"graph"}),
        "Python, as an fx.GraphModule with the signature of the original",
        "tests/unit/test_lower.py::test_graph_equals_the_module_with_repeated_heads",
    ),
)


def runtimes(forms: Collection[str]) -> tuple[str, ...]:
    """The lines for a result that has these forms: the first that covers all of them."""
    known = {f for f in forms if f}
    if not known:
        return ()
    return next(((r.line,) for r in RUNTIMES if known <= r.forms), ())
