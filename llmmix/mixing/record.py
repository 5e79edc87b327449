"""OUTPUT_DIR/mixture.jsonl: what a mixture run drew, measured and decided, one JSON object a line.

{"domains": [...], "targets": [...], "method": ..., "draws_a_step": ...}   first
{"step": s, "counts": [...]}                   rows drawn of each domain in step s
{"step": s, "measured": {"losses": [...]}}     what the controller was told after step s
{"step": s, "weights": [...], ...}             what it decided from step s + 1 on, and why
{"step": s, "final": [...]}                    validation losses at the end
{"step": s, "spent": {...}}                    last: what measuring cost

`llmmix.files.read_record` reads it, for the mixing and for the laws.
"""

import json
from pathlib import Path

import numpy as np

from llmmix.files import RECORD, plain, read_record


class MixtureRecord:
    """The record of a run.

    Args:
        folder: Output folder of the run.
        writes: Whether this process writes the file; the others only count its lines.

    Attributes:
        lines: Number of lines so far.
    """

    def __init__(self, folder: str | Path, writes: bool = True):
        self._path, self._writes = Path(folder) / RECORD, writes
        self.lines = 0

    def start(self, header: dict) -> None:
        """Begin a new file."""
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")
        self.lines = 0
        self.write(header)

    def write(self, entry: dict) -> None:
        """Append a line; a number that is not finite, as of a domain not drawn, becomes null."""
        self.lines += 1
        if self._writes:
            with self._path.open("a") as file:
                file.write(json.dumps(plain(entry), allow_nan=False) + "\n")

    def go_on(self, lines: int, step: int, header: dict) -> None:
        """Drop the lines that were written after a checkpoint.

        A run that is resumed in another folder begins a new file with the header.

        Args:
            lines: Number of lines when the checkpoint was written.
            step: Step of the checkpoint.
            header: First line of a new file.
        """
        if not self._path.exists():
            self.start(header)
            return
        kept = self._path.read_text().splitlines(keepends=True)[:lines]
        # In a folder that the run did not begin in there are fewer lines: go by the step as well
        kept = [line for line in kept if json.loads(line).get("step", 0) <= step]
        if self._writes:
            self._path.write_text("".join(kept))
        self.lines = len(kept)


def drawn_shares(folder: str | Path) -> dict[str, float]:
    """The share of each domain among all rows that a run drew.

    Raises:
        FileNotFoundError: `folder` holds no record.
    """
    header, entries = read_record(folder)
    counts = np.sum([entry["counts"] for entry in entries if "counts" in entry], axis=0)
    return dict(zip(header["domains"], (counts / counts.sum()).tolist(), strict=True))
