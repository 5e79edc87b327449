"""OUTPUT_DIR/mixture.jsonl: what a mixture run drew, measured and decided, one JSON object a line.

{"domains": [...], "targets": [...], "method": ..., "draws_a_step": ...}   first
{"step": s, "counts": [...]}                   rows drawn of each domain in step s
{"step": s, "measured": {"losses": [...]}}     what the controller was told after step s
{"step": s, "weights": [...], ...}             what it decided from step s + 1 on, and why
{"step": s, "final": [...]}                    validation losses at the end
{"step": s, "spent": {...}}                    last: what measuring cost

`llmmix.files.read_record` reads it, for the mixing and for the laws. A line that a killed run left
unfinished is dropped, and written again by the run that goes on.
"""

import json
from pathlib import Path

import numpy as np

from llmmix.files import RECORD, plain, read_record, write_whole


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
        self.lines = 1
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, _line(header))

    def write(self, entry: dict) -> None:
        """Append a line; a number that is not finite, as of a domain not drawn, becomes null."""
        self.lines += 1
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(entry))

    def go_on(self, lines: int, step: int, header: dict) -> None:
        """Drop the lines that were written after a checkpoint.

        A run that is resumed in another folder, or whose file was cut off within its header, begins
        a new file with the header.

        Args:
            lines: Number of lines when the checkpoint was written.
            step: Step of the checkpoint.
            header: First line of a new file.
        """
        try:
            first, entries = read_record(self._path.parent)
        except FileNotFoundError:
            self.start(header)
            return
        # In a folder that the run did not begin in there are fewer lines: go by the step as well
        kept = [entry for entry in entries[: lines - 1] if entry.get("step", 0) <= step]
        if self._writes:
            write_whole(self._path, "".join(map(_line, [first, *kept])))
        self.lines = 1 + len(kept)


def _line(entry: dict) -> str:
    return json.dumps(plain(entry), allow_nan=False) + "\n"


def drawn_shares(folder: str | Path) -> dict[str, float]:
    """The share of each domain among all rows that a run drew.

    Raises:
        FileNotFoundError: `folder` holds no record.
    """
    header, entries = read_record(folder)
    counts = np.sum([entry["counts"] for entry in entries if "counts" in entry], axis=0)
    return dict(zip(header["domains"], (counts / counts.sum()).tolist(), strict=True))
