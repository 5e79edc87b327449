"""Run under torchrun by test_loader.py: mixtures on two processes; each writes what it read."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tests.mixing.runs import Moving, build, finish, mixed


def main(folder: Path) -> None:
    """Train with a mixture that moves and with one that stands still."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()  # its threads must not outlive it
