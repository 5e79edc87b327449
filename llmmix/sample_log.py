"""Samples and verdicts on disk, a line each, appended as they come; and what they say of a model.

    samples.jsonl    {"problem": 3, "sample": 0, "completion": "...", "verdict": "right", ...}
    settings.json    what they were drawn with; samples of other settings are never mixed in

A killed run goes on from them. Several processes append to one file, each under a lock.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from llmmix.estimators import bootstrap_interval, maj_at_n, paired_difference, pass_at_n
from llmmix.verify import VERDICTS, stated_answer


class SampleLog:
    """The samples of one model under one setting.

    Args:
        folder: Where the two files are, or will be.
        settings: What decides the samples. Those found must have been drawn with the same.

    Raises:
        ValueError: The folder holds samples drawn otherwise, with the settings that differ.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.path = Path(folder) / "samples.jsonl"
        self._lock = FileLock(str(self.path) + ".lock")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = self.path.with_name("settings.json")
        settings = json.loads(json.dumps(settings))  # as it will be read back
        with self._lock:
            if not self.path.exists():
                document.write_text(json.dumps(settings, indent=1))
                self.path.touch()
            self._check(json.loads(document.read_text()), settings)
            self._drop_half_a_line()

    def _check(self, found: dict, settings: dict) -> None:
        differing = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        if differing:
            was = ", ".join(f"{key} {found.get(key)!r}" for key in differing)
            now = ", ".join(f"{key} {settings.get(key)!r}" for key in differing)
            raise ValueError(
                f"{self.path} holds samples drawn with {was}, not {now}. Name another "
                "`output_dir`, or remove that folder."
            )

    def _drop_half_a_line(self) -> None:
        """A process killed while it wrote leaves a line without an end."""
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
                file.truncate(end)

    def read(self) -> Iterator[dict]:
        """Every sample; of two of one number, the first."""
        seen = set()
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                key = record["problem"], record["sample"]
                if key not in seen:
                    seen.add(key)
                    yield record

    def append(self, records: list[dict]) -> None:
        """Write samples, and let them reach the disk."""
        if not records:
            return
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def replace(self, records: list[dict]) -> None:
        """Write all samples anew, as when they have been judged again."""
        beside = self.path.with_suffix(".tmp")
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self._lock:
            beside.write_text(lines, encoding="utf-8")
            beside.replace(self.path)


def prompt_id(prompt: str | list[dict]) -> str:
    """A short digest of a prompt, by which a sample knows its problem."""
    return hashlib.blake2b(json.dumps(prompt).encode(), digest_size=6).hexdigest()


def checkpoint_id(checkpoint: str, revision: str | None = None) -> str:
    """What tells a checkpoint from one trained anew under its name.

    Args:
        checkpoint: Folder or hub id.
        revision: Commit of a hub id.

    Returns:
        For a folder, a digest of its files' names, sizes and times; else the name and commit.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return f"{checkpoint}@{revision}" if revision else checkpoint
    weights = sorted(
        path
        for pattern in ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
        for path in folder.glob(pattern)
    )
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return hashlib.blake2b(json.dumps(stats).encode(), digest_size=8).hexdigest()


def summarize(
    records: Sequence[dict],
    problems: int,
    num_samples: int,
    n: Sequence[int],
    left_out: Sequence[int] = (),
    *,
    maj: bool = False,
) -> dict:
    """The estimates that samples and verdicts give.

    Samples whose verification failed are left out of a problem's n. A problem with fewer than N
    judged samples has no estimate of pass@N, and is left out of that one: `problems` says how many
    each estimate rests on.

    Args:
        records: Lines of a `SampleLog`.
        problems: Rows of the dataset.
        num_samples: Samples a problem; further ones in the records are not used.
        n: The N to report.
        left_out: Problems that could not be sampled.
        maj: Whether to estimate maj@N too.

    Returns:
        `pass_at_n`, `interval` (95%) and `problems` by N, `maj_at_n` and its interval if asked for,
        `verdicts`, `cut` (samples that reached the token limit), `mean_tokens`, and `n_judged` and
        `n_correct` of each problem.
    """
    used = [r for r in records if r["sample"] < num_samples and r["problem"] < problems]
    by_problem = [[] for _ in range(problems)]
    for record in used:
        by_problem[record["problem"]].append(record)
    verdicts = [Counter(r["verdict"] for r in rows) for rows in by_problem]
    judged = np.array([c.total() - c["failed"] for c in verdicts])
    correct = np.array([c["right"] for c in verdicts])
    result = {
        "estimator": "unbiased",
        "num_samples": num_samples,
        "rows": problems,
        "left_out": list(left_out),
        "verdicts": {v: sum(c[v] for c in verdicts) for v in VERDICTS},
        "cut": sum(not r["finished"] for r in used),
        "mean_tokens": float(np.mean([r["tokens"] for r in used])) if used else None,
        "n_judged": judged.tolist(),
        "n_correct": correct.tolist(),
    }

    def estimated(name: str, interval: str, values_of) -> None:
        result[name], result[interval] = {}, {}
        for k in n:
            rows = np.flatnonzero(judged >= k)
            values = values_of(rows, k)
            low, high = bootstrap_interval(values)
            result[name][str(k)] = float(values.mean()) if len(rows) else None
            known = len(rows) > 1
            result[interval][str(k)] = [float(low), float(high)] if known else None

    estimated("pass_at_n", "interval", lambda rows, k: pass_at_n(judged[rows], correct[rows], k))
    result["problems"] = {str(k): int((judged >= k).sum()) for k in n}
    if maj:
        votes = [_votes(rows) for rows in by_problem]
        estimated(
            "maj_at_n",
            "maj_interval",
            lambda rows, k: np.array([maj_at_n(n=k, seed=row, **votes[row]) for row in rows]),
        )
    return result


def _votes(records: list[dict]) -> dict:
    wrong, right, silent = Counter(), 0, 0
    for record in records:
        if record["verdict"] == "failed":
            continue
        given = stated_answer(record["completion"], record["verifier"])
        if record["verdict"] == "right":
            right += 1
        elif record["verdict"] == "unparsable" or given is None:
            silent += 1
        else:
            wrong[given] += 1
    return {"votes": list(wrong.values()), "n_right": right, "n_silent": silent}


def compare(results: dict[str, dict]) -> dict[str, dict]:
    """pass@N of each run minus that of the first, over the problems that both have estimates of."""
    first, *others = results
    differences = {}
    for name in others:
        a, b = results[name], results[first]
        differences[name] = {}
        for k in a["pass_at_n"]:
            judged = [np.array(x["n_judged"]) for x in (a, b)]
            both = np.flatnonzero((judged[0] >= int(k)) & (judged[1] >= int(k)))
            if len(both) < 2:
                continue
            values, baseline = (
                pass_at_n(np.array(x["n_judged"])[both], np.array(x["n_correct"])[both], int(k))
                for x in (a, b)
            )
            mean, low, high = paired_difference(values, baseline)
            differences[name][k] = {
                "difference": float(mean),
                "interval": [float(low), float(high)],
                "problems": len(both),
            }
    return differences
