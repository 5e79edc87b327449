"""Several processes of one run: where they run, what the main one says, what any of them saves."""

import logging
import os
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_model
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")


def warn_once(message: str) -> None:
    """Log a warning on the main process alone."""
    if PartialState().is_main_process:
        logger.warning(message)


@cache
def say_once(message: str) -> None:
    """`warn_once`, of a message that may come again: a process logs it the first time alone."""
    warn_once(message)


def main_process_says(value: T) -> T:
    """The main process's value, on every rank: others may not see the same files."""
    return broadcast_object_list([value])[0]


def save_on_any_rank(model: PreTrainedModel, folder: Path) -> None:
    """Save a whole model from the process that has it.

    In a run of several processes `save_pretrained` writes on rank 0 alone, and the first process to
    ask for a cached checkpoint is any of them.

    Args:
        model: The model, not spread over processes.
        folder: Folder that gets its weights and configurations.
    """
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def evaluation_state() -> PartialState:
    """The processes of an evaluation: on a GPU where there is one, and slow to give up waiting.

    Apple's GPUs are passed over: the sampling engine draws in fp64, which they lack.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # Processes finish their shares at different times, and must wait for each other
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    options = {"timeout": timedelta(days=30)} if several else {}
    return PartialState(cpu=accelerator is None or accelerator.type == "mps", **options)
