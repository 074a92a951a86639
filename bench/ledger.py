"""What a bench has measured on converted models, in a file of json lines where there is one: nothing is run twice."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.graph import Source
from bench.quality import MODELS, ROOT
from passes.tune import Tuning
from rewrite.site import Latent


@dataclass(frozen=True)
class Measured:
    """One converted model. `samples` windows of calibration (0: weights only), `windows` of text, `tune` steps."""

    model: str
    target: str
    samples: int
    windows: int
    ratio: float
    """Perplexity of the converted model over the original's"""
    rebuilt: bool
    seconds: float
    """Processor time of conversion and measuring"""
    tune: int = 0
    converting: float = 0.0
    """Of the conversion alone; 0 where it is not known"""
    sites: int = 0

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What makes it the same measurement."""
        return self.model, self.target, self.samples, self.windows, self.tune


class Ledger:
    """What has been measured."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text("utf-8").splitlines() if file is not None and file.exists() else []
        self.known = {m.key: m for m in (Measured(**json.loads(line)) for line in lines)}

    def measure(
        self, model: Source, target: Any, calibrated: bool = True, windows: int | None = None, tune: int = 0
    ) -> Measured:
        """The target on a model, from the file where it stands there; on the first `windows` of its text."""
        samples = sum(len(b["input_ids"]) for b in model.calibration) if calibrated else 0
        key = (model.name, repr(target), samples, windows or len(model.rows), tune)
        if key in self.known:
            return self.known[key]
        begun = time.process_time()
        changes = model.convert(target, calibrated, Tuning(tune) if tune else None)
        converting = time.process_time() - begun
        ratio = model.ratio(changes, windows)
        forms = [c.rewritten.site.form for c in changes.values()]
        rebuilt = any(isinstance(f, Latent) and f.rebuilt for f in forms)
        took = round(time.process_time() - begun, 1)
        made = Measured(*key[:4], ratio, rebuilt, took, tune, round(converting, 1), len(changes))
        self.known[key] = made
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(made)) + "\n")
        print(f"{key}: {ratio:.4f} ({made.seconds:.0f} s)", file=sys.stderr, flush=True)
        return made


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every bench on the shipped models can be told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "examples" / "models")
    parser.add_argument("--only", choices=MODELS, action="append")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--windows", type=int, help="windows of held-out text; all where it is not given")
    parser.add_argument("--results", type=Path, help="file of json lines to keep figures in and to go on from")
    return parser
