"""Several processes of one run: where they run, and what the main one says for all."""

import logging
import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

logger = logging.getLogger(__name__)

T = TypeVar("T")


def warn_once(message: str) -> None:
    """Log a warning on the main process alone."""
    if PartialState().is_main_process:
        logger.warning(message)


def main_process_says(value: T) -> T:
    """The main process's value, on every rank: others may not see the same files."""
    return broadcast_object_list([value])[0]


def evaluation_state() -> PartialState:
    """The processes of an evaluation: on a GPU where there is one, and slow to give up waiting.

    Apple's GPUs are passed over: the sampling engine draws in fp64, which they lack.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # Processes finish their shares at different times, and must wait for each other
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    options = {"timeout": timedelta(days=30)} if several else {}
    return PartialState(cpu=accelerator is None or accelerator.type == "mps", **options)
