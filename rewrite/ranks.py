"""One conversion by several processes that see one disk: `torchrun --nproc-per-node N -m rewrite.cli convert ...`.

Sites are shared out, what is made of them meets in the journal, and the first process writes the output. Nothing that
is computed hangs on how many there are.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from rewrite.errors import Refused

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long one process may wait for another: one that dies is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among all."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process opens the output, writes it and says how it went."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share."""
        return items[self.rank :: self.count]

    def meet(self) -> None:
        """Wait for all others; raises where one of them is gone."""
        if self.count == 1:
            return
        import torch.distributed as dist

        try:
            waiting: Any = dist.barrier(async_op=True)
            # asked, not waited for: a signal is heard between two questions
            while not waiting.is_completed():
                time.sleep(0.02)
            waiting.wait()
        except RuntimeError as why:
            raise lost() from why


def lost() -> Refused:
    """The error of a process whose companion died."""
    return Refused(
        "process-lost",
        "another process of this run has ended, so this one stops",
        "what is finished is kept beside the output: the same command goes on from there",
    )


def here() -> Ranks:
    """The place that torchrun gave this process; alone where there is no torchrun."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def together() -> Generator[Ranks]:
    """Meet the other processes, where there are some, and part from them at the end."""
    ranks = here()
    if ranks.count == 1:
        yield ranks
        return
    import torch.distributed as dist

    def stop(_number: int, _frame: Any) -> None:
        raise lost()

    before = signal.signal(signal.SIGTERM, stop)
    opened = not dist.is_initialized()
    if opened:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        signal.signal(signal.SIGTERM, before)
        if opened:
            dist.destroy_process_group()
