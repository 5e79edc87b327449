"""OUTPUT_DIR/mixture.jsonl: what was drawn, measured and decided, a line each.

{"domains": [...], "targets": [...], "method": ..., "draws_a_step": ...}   first
{"step": s, "counts": [...]}                   rows drawn of each domain in step s
{"step": s, "measured": {"losses": [...]}}     what the controller was told after step s
{"step": s, "weights": [...], ...}             what it decided from step s + 1 on, and why
{"step": s, "spent": {...}}                    last: what measuring cost
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import Trainer

NAME = "mixture.jsonl"


class MixtureRecord:
    """Written by the main process."""

    def __init__(self, trainer: "Trainer"):
        self._path = Path(trainer.args.output_dir) / NAME
        self._writes = trainer.is_world_process_zero()
        self.lines = 0

    def start(self, header: dict) -> None:
        """Begin the file anew."""
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")
        self.lines = 0
        self.write(header)

    def write(self, entry: dict) -> None:
        """Append a line."""
        self.lines += 1
        if self._writes:
            with self._path.open("a") as file:
                file.write(json.dumps(_finite(entry), allow_nan=False) + "\n")

    def go_on(self, lines: int, step: int, header: dict) -> None:
        """Forget what was written after a checkpoint, which had so many lines and was of a step.

        Where the run is resumed in another folder, the header alone is known.
        """
        if not self._path.exists():
            self.start(header)
            return
        kept = self._path.read_text().splitlines(keepends=True)[:lines]
        # The lines of a second attempt, in a folder that the run did not begin in, are fewer
        kept = [line for line in kept if json.loads(line).get("step", 0) <= step]
        if self._writes:
            self._path.write_text("".join(kept))
        self.lines = len(kept)


def _finite(value):
    """What JSON has: null for a domain that a batch lacked, which is NaN."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: str | Path) -> tuple[dict, list[dict]]:
    """The first line of a run's record, and the others.

    Raises:
        FileNotFoundError: The folder holds none.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {NAME}: it is not the folder of a mixture run.")
    header, *entries = (json.loads(line) for line in path.read_text().splitlines())
    return header, entries


def drawn_shares(folder: str | Path) -> dict[str, float]:
    """The share of each domain among all rows that a run drew."""
    header, entries = read_record(folder)
    counts = np.sum([entry["counts"] for entry in entries if "counts" in entry], axis=0)
    return dict(zip(header["domains"], (counts / counts.sum()).tolist(), strict=True))
