"""Samples and verdicts on disk, a line each, appended as they come: a killed run goes on from them.

    samples.jsonl    {"problem": 3, "sample": 0, "completion": "...", "verdict": "right", ...}
    settings.json    what they were drawn with; samples of other settings are never mixed in

Several processes append to one file, each under a lock. A line that is not whole, as a killed
run or a full disk leaves it, is left out, and its sample is drawn again.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock

from llmmix.files import read_json, read_json_lines, warn_not_whole, write_whole

SECONDS_UNWRITTEN = 1.0  # what a killed run may lose, besides what waits for its verdict


class SampleLog:
    """The samples of one model under one setting.

    Args:
        folder: Where the two files are, or will be.
        settings: What decides the samples. Samples found must have been drawn with the same. The
            identity of a checkpoint folder among them goes by the contents of its files
            (`llmmix.files.checkpoint_id`), so that samples outlive a copy of the checkpoint or a
            new time of change, and are refused for one that was trained anew in its place.

    Raises:
        ValueError: The folder holds samples that were drawn with other settings, which are named,
            or samples whose settings are lost.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.path = Path(folder) / "samples.jsonl"
        self._lock = FileLock(str(self.path) + ".lock")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = self.path.with_name("settings.json")
        settings = json.loads(json.dumps(settings))  # as it will be read back
        with self._lock:
            self.path.touch()
            self._drop_half_a_line()
            if not self.path.stat().st_size and read_json(document) is None:
                write_whole(document, json.dumps(settings, indent=1))
            self._check(read_json(document), settings)

    def _check(self, found: dict[str, Any] | None, settings: dict[str, Any]) -> None:
        if found is None:
            raise ValueError(
                f"{self.path} holds samples, and settings.json beside it, which says what they "
                "were drawn with, is missing or not whole. Name another `output_dir`, or remove "
                "that folder."
            )
        differing = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        if differing:
            was = ", ".join(f"{key} {found.get(key)!r}" for key in differing)
            now = ", ".join(f"{key} {settings.get(key)!r}" for key in differing)
            raise ValueError(
                f"{self.path} holds samples drawn with {was}, not {now}. Name another "
                "`output_dir`, or remove that folder."
            )

    def _drop_half_a_line(self) -> None:
        """Remove the unfinished last line that a process killed while writing leaves."""
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            step, end = 2**16, size
            while end > 0:
                start = max(0, end - step)
                file.seek(start)
                if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                warn_not_whole(f"{self.path}: not whole and dropped: the last line")
                file.truncate(end)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield every sample; of two with the same numbers, the first."""
        with self._lock:
            records = read_json_lines(self.path)
        seen = set()
        for record in records:
            key = record["problem"], record["sample"]
            if key not in seen:
                seen.add(key)
                yield record

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write samples, and let them reach the disk."""
        if not records:
            return
        with self._lock:
            self._drop_half_a_line()  # as a full disk leaves it
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines(records))

    @contextmanager
    def writer(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A context with a function that takes one sample; they are written about every second."""
        unwritten: list[dict[str, Any]] = []
        written = time.perf_counter()

        def write(record: dict[str, Any]) -> None:
            nonlocal written
            unwritten.append(record)
            if time.perf_counter() - written > SECONDS_UNWRITTEN:
                self.append(unwritten)
                unwritten.clear()
                written = time.perf_counter()

        try:
            yield write
        finally:
            self.append(unwritten)

    def replace(self, records: list[dict[str, Any]]) -> None:
        """Write all samples anew, as when they have been judged again."""
        with self._lock:
            write_whole(self.path, _lines(records))

    def locked(self) -> BaseFileLock:
        """A context in which no other process writes."""
        return self._lock


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def prompt_id(prompt: str | list[dict[str, Any]]) -> str:
    """A short digest of a prompt, which ties a sample to its problem."""
    return hashlib.blake2b(json.dumps(prompt).encode(), digest_size=6).hexdigest()
