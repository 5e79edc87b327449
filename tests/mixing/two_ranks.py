"""Mixtures on two ranks, for tests/two_ranks.py: each rank writes what it read."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from tests.mixing.runs import Moving, build, finish, mixed


def run(checkpoint: str, folder: Path) -> None:
    """Train with a mixture that moves and with one that stands still."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for name, controller in (("moving", Moving()), ("still", None)):
        trainer = build(
            folder / name,
            tokenizer,
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
        )
        assert trainer.accelerator.num_processes == 2
        mixed(trainer, controller)
        log, _ = finish(trainer)
        found = {"read": trainer.steps_read, "log": log}
        (folder / f"{name}-{trainer.args.process_index}.json").write_text(json.dumps(found))
