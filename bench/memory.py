"""The process's memory as the kernel counts it (Linux)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

MMAP_THRESHOLD = -3
"""glibc's M_MMAP_THRESHOLD"""


def give_back() -> None:
    """From here on blocks of 64 KiB and more go back to the kernel when they are freed, so that a peak is one of the
    call that is measured. It makes allocating slower: not while times are taken."""
    ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, 1 << 16)


def memory(name: str) -> int:
    """Bytes: VmRSS, what is held now; VmHWM, the most that was since `reset_peak`."""
    return status()[name]


def status(process: int | str = "self") -> dict[str, int]:
    """All figures of a process in bytes; none of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text("utf-8").splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.endswith(" kB"))
    return {row[0].removesuffix(":"): int(row[1]) * 1024 for row in rows}


def reset_peak() -> int:
    """What is held now; the kernel forgets the peak before it."""
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return memory("VmRSS")


def added(run: Callable[[], object]) -> int:
    """Bytes that a call needs beyond what was held before it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = reset_peak()
    run()
    return memory("VmHWM") - before
