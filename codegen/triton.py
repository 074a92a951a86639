"""From a `KernelSpec` to the readable source of its kernel: one file a kernel, its spec as header."""

from __future__ import annotations

from codegen.spec import Argument, KernelSpec
from codegen.triton_backward import backward_arguments, dkdv_source, dq_source
from codegen.triton_coarse import (
    antidiagonal_arguments,
    antidiagonal_source,
    columns_arguments,
    columns_source,
    mass_arguments,
    mass_source,
    means_arguments,
    means_source,
)
from codegen.triton_forward import forward_arguments, forward_source
from codegen.triton_lists import list_arguments, list_source
from codegen.triton_rows import combine_arguments, combine_source, delta_arguments, delta_source

_FORMS = {
    "forward": (forward_source, forward_arguments),
    "decode": (forward_source, forward_arguments),
    "combine": (combine_source, combine_arguments),
    "delta": (delta_source, delta_arguments),
    "dkdv": (dkdv_source, backward_arguments),
    "dq": (dq_source, backward_arguments),
    "antidiagonal": (antidiagonal_source, antidiagonal_arguments),
    "mass": (mass_source, mass_arguments),
    "means": (means_source, means_arguments),
    "columns": (columns_source, columns_arguments),
    "listk": (list_source, list_arguments),
    "listq": (list_source, list_arguments),
}


def source(spec: KernelSpec) -> str:
    """The kernel's file."""
    return _FORMS[spec.phase][0](spec)


def arguments(spec: KernelSpec) -> list[Argument]:
    """What the kernel's function takes, in order."""
    return _FORMS[spec.phase][1](spec)
