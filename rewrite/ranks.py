"""One conversion by several processes that see one disk: `torchrun --nproc-per-node N -m rewrite.cli convert ...`.

From the weights alone sites are shared out; with calibration its batches are, and what a site's mathematics does item
by item. What is made meets in the journal, and the first process writes the output. Nothing that is computed hangs on
how many there are: what is summed is sent item by item, and every process adds it in the same order.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rewrite.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Values = Sequence[Any]
"""Tensors and plain numbers: what one process can send to the others."""
Share = Callable[[Sequence[Any], Callable[[Any], Values]], Iterator[Values]]
"""`Ranks.share`."""
PATIENCE = timedelta(days=7)
"""How long one process may wait for another: one that dies is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among all."""

    rank: int = 0
    count: int = 1
    group: Any = None
    """The processes' group, where theirs is not the default one."""

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

        _finish(lambda: dist.barrier(group=self.group, async_op=True))

    def share(self, items: Sequence[T], work: Callable[[T], Values]) -> Iterator[Values]:
        """What `work` makes of every item, in order: each process works on its own items, and all get what all made.
        Every process must ask with the same items, and go on equally far."""
        for first in range(0, len(items), self.count):
            some = items[first : first + self.count]
            own = work(some[self.rank]) if self.rank < len(some) else ()
            for owner in range(len(some)):
                yield self.sent(owner, own)

    def sent(self, owner: int, values: Values) -> Values:
        """The values that `owner` has, at every process; tensors keep the layout of their numbers."""
        if self.count == 1:
            return values
        import torch

        data = packed(values) if self.rank == owner else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        self._give(length, owner)
        if self.rank == owner:
            self._give(data, owner)
            return values
        data = torch.empty(int(length), dtype=torch.uint8)
        self._give(data, owner)
        return unpacked(data)

    def _give(self, tensor: Tensor, owner: int) -> None:
        import torch.distributed as dist

        _finish(lambda: dist.broadcast(tensor, group=self.group, group_src=owner, async_op=True))


ALONE = Ranks()
"""One process."""


def _finish(start: Callable[[], Any]) -> None:
    """Do something together with the others; raises where one of them is gone."""
    try:
        waiting, pause = start(), 1e-5
        # asked, not waited for: a signal is heard between two questions
        while not waiting.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        waiting.wait()
    except RuntimeError as why:
        raise lost() from why


def packed(values: Values) -> Tensor:
    """(bytes,) uint8: what the values are as JSON, its length before it, then the tensors' numbers."""
    import torch

    told: list[Any] = []
    parts: list[Tensor] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            told.append(value)
            continue
        x = value.detach()
        # a repeated dim is sent once, others in the order in which they lie in memory: products read them alike
        order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
        once = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())].permute(order).contiguous()
        told.append([str(x.dtype).removeprefix("torch."), list(once.shape), order, list(x.shape)])
        parts.append(once.reshape(-1).view(torch.uint8))
    header = json.dumps(told).encode()
    words = torch.frombuffer(bytearray(len(header).to_bytes(8, "little") + header), dtype=torch.uint8)
    return torch.cat([words, *parts])


def unpacked(data: Tensor) -> list[Any]:
    """The inverse of `packed`."""
    import torch

    length = int.from_bytes(bytes(data[:8].tolist()), "little")
    at, values = 8 + length, list[Any]()
    for told in json.loads(bytes(data[8:at].tolist())):
        if not isinstance(told, list):
            values.append(told)
            continue
        name, shape, order, full = told
        dtype: torch.dtype = getattr(torch, name)
        end = at + dtype.itemsize * torch.Size(shape).numel()
        once = data[at:end].clone().view(dtype).view(shape)
        values.append(once.permute([order.index(d) for d in range(len(order))]).expand(full))
        at = end
    return values


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
    # what is sent lies in ordinary memory, which another back end may not reach
    group: Any = None if opened else dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield replace(ranks, group=group)
    finally:
        signal.signal(signal.SIGTERM, before)
        if opened:
            dist.destroy_process_group()
