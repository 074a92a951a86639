"""What this machine has free: memory and disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Bytes that are free now."""

    memory: int
    disk: int


def this_machine(place: Path) -> Machine:
    """Free memory, and free disk where `place` lies."""
    return Machine(_free_memory(), shutil.disk_usage(place).free)


def _free_memory() -> int:
    table = Path("/proc/meminfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # where the kernel has no such table, all of the memory stands in for what is free
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def anonymous() -> int:
    """Bytes of this process that no file backs: what a limit on memory is about. 0 where the kernel does not tell."""
    table = Path("/proc/self/status")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
