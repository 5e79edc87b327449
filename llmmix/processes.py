"""Several processes of one run: what one says for all."""

import logging
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

logger = logging.getLogger(__name__)

T = TypeVar("T")


def warn_once(message: str) -> None:
    """Log a warning once, not on every rank."""
    if PartialState().is_main_process:
        logger.warning(message)


def main_process_says(value: T) -> T:
    """The main process's value, on every rank: others may not see the same files."""
    return broadcast_object_list([value])[0]
