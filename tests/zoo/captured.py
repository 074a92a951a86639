"""Models of the zoo with both of their graphs and their sites, traced once for all tests of a process."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from passes.find import Found, find
from rewrite.capture import capture
from rewrite.program import Program
from tests.zoo import BY_NAME


@cache
def captured(name: str) -> tuple[nn.Module, Any, Program, Found]:
    """The model, its inputs, its graphs and what is found in them: to be read, not changed."""
    model, inputs = BY_NAME[name].build()
    program = capture(model, inputs)
    return model, inputs, program, find(program.static)
