"""Run under torchrun by the fixture `two_ranks`: what must come out as on one process.

    two_ranks.py CHECKPOINT FOLDER

FOLDER holds the rows as `math.jsonl` and `preferences.jsonl`. The main rank writes logs and weights
of every method (tests/uneven.py). Mixtures and unlearning write into folders of their own. Last
comes the fused head with its weight spread over the ranks (tests/sharded.py).
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset

from llmmix import DCOConfig
from llmmix.training.resuming import checkpoint_to_resume
from tests import sharded, uneven
from tests.mixing import two_ranks as mixing
from tests.unlearning import two_ranks as unlearning


def main(checkpoint: str, folder: Path) -> None:
    """Train everything."""
    torch.set_num_threads(1)
    rows = {
        name: load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train")
        for name in ("math", "preferences")
    }
    uneven.on_two_ranks(checkpoint, folder, rows)
    mixing.run(checkpoint, folder / "mixing")
    resume_as_the_main_rank_does(folder)
    unlearning.run(checkpoint, folder / "unlearning")
    sharded.compare("fsdp2")


def resume_as_the_main_rank_does(folder: Path) -> None:
    """Each rank prints where it resumes, as if the main one alone saw the run's files."""
    here = folder / "mixing/moving" if PartialState().is_main_process else folder / "nowhere"
    for given in ("auto", "true"):
        config = DCOConfig(str(here), resume_from_checkpoint=given)
        print(f"resumed from {checkpoint_to_resume(config)}\n", end="")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()  # its threads must not outlive it
