"""The zoo: models to try everything on. `ENTRIES` is the table; an entry builds its model and inputs when asked."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.zoo.decoders import DECODERS
from tests.zoo.encoders import ENCODERS, SEQ2SEQS
from tests.zoo.entry import Call, Entry, settled
from tests.zoo.executed import count_by_execution
from tests.zoo.hostile import HOSTILE
from tests.zoo.senses import AUDIO, MULTIMODAL, VISION
from tests.zoo.spellings import D
from tests.zoo.written import SPELLINGS, Model

__all__ = ["BY_NAME", "ENTRIES", "REFUSED", "Entry", "count_by_execution", "settled"]


def _extra() -> dict[str, tuple[Tensor, ...]]:
    """What some spellings want beside the tokens."""
    return {
        "Cross": (torch.randn(2, 7, D),),
        "Documents": (torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3]),),
        "Padding": (torch.tensor([[1] * 10, [1] * 8 + [0] * 2]),),
        "CallersPositions": (torch.arange(10).expand(2, 10),),
    }


def _written(attention: type[nn.Module]) -> Call:
    torch.manual_seed(0)
    model = settled(Model(attention))
    return model, (torch.randint(0, 97, (2, 10)), *_extra().get(attention.__name__, ()))


ENTRIES: tuple[Entry, ...] = (
    *(Entry("hand-written", c.__name__, partial(_written, c)) for c in SPELLINGS),
    *DECODERS,
    *ENCODERS,
    *SEQ2SEQS,
    *VISION,
    *AUDIO,
    *MULTIMODAL,
)
"""Models whose attentions are to be found, as many as run."""

REFUSED: tuple[Entry, ...] = tuple(Entry("hostile", c.__name__, partial(_written, c)) for c in HOSTILE)
"""Models whose attentions no description holds: finding one in them would be wrong."""

BY_NAME = {entry.name: entry for entry in (*ENTRIES, *REFUSED)}
