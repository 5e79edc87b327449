"""Recipes that are killed at random and go on with `--resume_from_checkpoint auto`.

A server imports torch and the recipes once, and forks a process for each attempt. Half of the kills
hit at a change of a file under the output folder, mostly in the midst of saving, and the seed says
at which; some of these cut the file that was just written, as a kill within a write does. The other
half hit when the process has worked for a random time. A life is made of attempts, until one ends
by itself: what it leaves must be what a run that was never stopped leaves. Lives begin anew until
there were enough kills.
"""

import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import torch

from llmmix import builtin, cli
from llmmix.files import RECORD, read_record
from tests.checkpoint import save_random_checkpoint

SMALL = (
    "--save_steps 1 --logging_steps 1 --max_steps 4 --learning_rate 1e-3 --use_cpu true "
    "--per_device_train_batch_size 2 --disable_tqdm true --report_to none"
).split()
MIXED = "--validation_rows 4 --measured_rows 4".split()
SAMPLED = "--max_new_tokens 4 --solve_samples 2 --unfiltered_steps 1 --refresh_every 2".split()
RETAIN = ["--retain_dataset_name", "retain.jsonl"]
LORA = "--use_peft --lora_target_modules q_proj v_proj".split()
KEEP_ONE, KEEP_TWO = (["--save_total_limit", limit] for limit in ("1", "2"))
RUNS: dict[str, list[str]] = {  # recipe, rows and flags; rows are files that `prepare` writes
    "dco": ["dco", "math", "--n_samples", "8", *KEEP_ONE],
    "filter": ["dco", "math", "--n_samples", "8", "--likelihood_threshold", "1e-9"],
    "dco_cot": ["dco_cot", "math", *SAMPLED],
    "lora": ["dco", "math", *LORA, *KEEP_TWO],
    "sftmix": ["sftmix", "math", "--num_checkpoints", "2"],
    "rpo": ["rpo", "preferences"],
    "flat": ["flat", "forget"],
    "npo": ["unlearn", "forget", *RETAIN, *KEEP_ONE],
    "pdu": ["unlearn", "forget", *RETAIN, "--loss", "pdu", "--epsilon", "0.1"],
    "mixture": ["mixture", "", *MIXED, *KEEP_TWO],
    "aioli": ["aioli", "", *MIXED],
    "doremi": ["aioli", "", *MIXED, "--method", "doremi", "--max_steps", "3", *KEEP_ONE],
    "sweep": ["mixture_sweep", "", *MIXED, "--mixtures", "2", "--save_strategy", "steps"],
}
PRELOADED = ["tests.kills", "matplotlib.pyplot", "pytest"]
PRELOADED += sorted({f"llmmix.recipes.{recipe}" for recipe, *_ in RUNS.values()})
# What differs between two runs that are the same: times, and a mean over the steps of one process
UNEQUAL = ("runtime", "per_second", "train_loss")


def prepare(folder: Path) -> None:
    """A random checkpoint and the rows of all recipes, in the folder that the runs are made in."""
    save_random_checkpoint(folder / "checkpoint", builtin.train_tokenizer())
    builtin.dataset("builtin:math", "1")["train"].take(12).to_json(folder / "math.jsonl")
    preferences = builtin.dataset("builtin:preferences", "1")["train"].take(12)
    preferences.to_json(folder / "preferences.jsonl")
    for role in ("forget", "retain"):
        rows = [{"question": f"Who wrote {role} {n}?", "answer": f"Author {n}."} for n in range(10)]
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("sums", "products"):
        rows = [
            {"text": f"{n}+{n}={2 * n}" if name == "sums" else f"{n}*3={3 * n}"} for n in range(16)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(run: str, out: str) -> list[str]:
    """The arguments of `llmmix` for a run into the folder `out`."""
    recipe, rows, *flags = RUNS[run]
    data = ["--dataset_name", f"{rows}.jsonl"]
    if not rows:
        data = ["--domains", "sums=sums.jsonl", "products=products.jsonl"]
    argv = ["run", recipe, "--model_name_or_path", "checkpoint", "--output_dir", out, *data]
    return [*argv, "--resume_from_checkpoint", "auto", *SMALL, *flags]


KILLED = (-signal.SIGKILL, -signal.SIGPROF)


def attempt(
    folder: Path, argv: list[str], out: str, kill_at: int, cut: float, kill_after: float
) -> None:
    """Run a command in a process of its own, to its end or until it is killed.

    Args:
        folder: Where it runs.
        argv: Arguments of `llmmix`.
        out: Output folder. At the end, `out.work` says how many of its files were changed and how
            long the process worked.
        kill_at: Number of the change before which the process dies; 0 for never.
        cut: Share that is then kept of the file that was just written to a checkpoint.
        kill_after: Seconds of work after which the process dies; 0 for never.
    """
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    cached = str(folder / f"{out}.cache")
    os.environ.update(LLMMIX_CACHE=cached, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    datasets.config.HF_DATASETS_CACHE = Path(cached)
    torch.set_num_threads(1)
    gc.freeze()  # else each trainer goes through what was imported
    changes, root = 0, str(folder / out)

    def note(event: str, given: tuple) -> None:
        nonlocal changes
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        if event == "open" and not (given[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        place = place_of(-1 if event == "open" else given[-1])
        if os.path.join(place, str(given[0])).startswith(root):
            changes += 1
            if changes == kill_at:
                cut_newest(Path(root), cut)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)
    signal.setitimer(signal.ITIMER_PROF, kill_after)  # SIGPROF ends a process as SIGKILL does
    status = cli.main(argv)
    Path(f"{out}.work").write_text(json.dumps([changes, time.process_time()]))
    sys.stdout.flush()
    os._exit(status)


def place_of(descriptor: int) -> str:
    """The folder of a relative path: rotation deletes the files of one that it has opened."""
    opened = Path(f"/proc/self/fd/{descriptor}")
    return str(opened.resolve()) if opened.exists() else os.getcwd()


def cut_newest(folder: Path, share: float) -> None:
    """Cut the file that was written last, if it is of a checkpoint: a kill within its write."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is not None and newest.parent.name.startswith("checkpoint-"):
        os.truncate(newest, int(newest.stat().st_size * share))


def left_by(out: Path) -> dict[str, Any]:
    """What a run leaves that another must leave too, digit by digit."""
    left: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if any(part.startswith("checkpoint-") for part in path.parts):
            continue
        if path.suffix == ".safetensors":
            left[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "trainer_state.json":
            history = json.loads(path.read_text())["log_history"]
            left[name] = [
                {key: value for key, value in entry.items() if not key.endswith(UNEQUAL)}
                for entry in history
            ]
        elif path.name == RECORD:
            header, entries = read_record(path.parent)
            left[name] = [header, *(entry for entry in entries if "spent" not in entry)]
        elif path.suffix in (".csv", ".jsonl"):
            left[name] = path.read_text()
    return left


class Killer:
    """Kills a run again and again.

    Args:
        folder: The folder that `prepare` filled.
        run: A name in `RUNS`.
        seed: Seed of the kills.

    Attributes:
        kills: Number of kills so far.
        never_stopped: What the run leaves when nothing kills it.
        run_again: What it leaves when its command is given again.
    """

    def __init__(self, folder: Path, run: str, seed: int):
        self.folder, self.run = folder, run
        self.random = random.Random(f"{run} {seed}")
        self.kills, self.lives = 0, 0
        self.processes = get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOADED)
        self.attempt("first")  # fills the caches, so that the next works as long as those to come
        self.never_stopped = self.attempt("never_stopped")
        work = (folder / f"{run}-never_stopped.work").read_text()
        self.changes, self.seconds = json.loads(work)
        self.run_again = self.attempt("never_stopped")

    def life(self) -> dict[str, Any]:
        """Attempts until one ends by itself; what it leaves."""
        self.lives += 1
        left = None
        while left is None:
            when = self.random.uniform(0, 0.6)
            kill_at, kill_after = 1 + int(when * self.changes), when * self.seconds
            by_time = self.random.random() < 0.5
            kill_at, kill_after = (0, kill_after) if by_time else (kill_at, 0.0)
            cut = self.random.choice((0.0, 0.5, 1.0))
            left = self.attempt(f"life_{self.lives}", kill_at, cut, kill_after)
        shutil.rmtree(self.folder / f"{self.run}-life_{self.lives}")
        return left

    def attempt(
        self, out: str, kill_at: int = 0, cut: float = 1.0, kill_after: float = 0.0
    ) -> dict[str, Any] | None:
        """One attempt: what it leaves, or None if it was killed."""
        name = f"{self.run}-{out}"
        given = (self.folder, command(self.run, name), name, kill_at, cut, kill_after)
        process = self.processes.Process(target=attempt, args=given)
        process.start()
        process.join()
        if process.exitcode in KILLED:
            self.kills += 1
            return None
        log = (self.folder / f"{name}.log").read_text()
        assert process.exitcode == 0, f"Ended after {self.kills} kills:\n{log}"
        return left_by(self.folder / name)


def differences(left: dict, expected: dict) -> str:
    """Where two results differ."""
    names = sorted(left.keys() | expected.keys())
    told = [name for name in names if left.get(name) != expected.get(name)]
    return "\n".join(f"{n}: {left.get(n)}\n  in place of {expected.get(n)}" for n in told)
