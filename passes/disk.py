"""Calibration of a model that is never held: weights are read when a node asks for them, and what waits between two
sites lies in files, whose pages the kernel keeps in memory only while there is room.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rewrite.heads import Change
from rewrite.site import Tensors

SMALL = 1 << 16
"""Bytes below which a value is not worth a file."""


@dataclass(frozen=True, eq=False)
class Disk:
    """Where a conversion reads weights, keeps what waits, and puts the sites that it has converted."""

    read: Tensors
    room: int
    """Bytes of weights that may be held at once."""
    place: Path
    changes: MutableMapping[str, Change]

    def state(self, names: Mapping[Node, str]) -> Reading:
        """The values of placeholders, read when they are asked for."""
        return Reading(names, self.read, self.room, OrderedDict())

    def spilled(self, value: Any) -> Any:
        """A tensor with its numbers in a file that has no name any more, so that nothing is left when this process
        ends, however it does. Others are given back as they are: another layout could be computed in another order."""
        if not isinstance(value, Tensor) or value.nbytes < SMALL or not value.is_contiguous():
            return value
        if value.untyped_storage().filename is not None:
            return value
        handle, path = tempfile.mkstemp(dir=self.place)
        os.close(handle)
        made = torch.from_file(path, shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        os.unlink(path)
        return made.copy_(value.detach())


class Reading(dict[Node, Any]):
    """Node -> value. What was set stays; parameters beside it are read, and the last ones read are kept."""

    def __init__(self, names: Mapping[Node, str], read: Tensors, room: int, recent: OrderedDict[str, Tensor]) -> None:
        super().__init__()
        self.names, self.read, self.room, self.recent = names, read, room, recent

    def __missing__(self, node: Node) -> Tensor:
        name = self.names[node]
        if name not in self.recent:
            self.recent[name] = self.read(name)
        self.recent.move_to_end(name)
        while len(self.recent) > 1 and sum(t.nbytes for t in self.recent.values()) > self.room:
            self.recent.popitem(last=False)
        return self.recent[name]

    def __contains__(self, node: object) -> bool:
        return super().__contains__(node) or node in self.names

    def copy(self) -> Reading:
        """Another one whose values may be set apart from this one's."""
        made = Reading(self.names, self.read, self.room, self.recent)
        made.update(self)
        return made

    def forget(self, node: Node) -> None:
        """Let go of a value that was set, where nobody reads it any more."""
        if node in self.names:
            self.pop(node, None)
