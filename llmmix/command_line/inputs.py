"""The files and folders that arguments name: whether they can serve, seen before anything loads.

Rows and models are looked at by what finds them, in llmmix/rows/ and llmmix/checkpoints/.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DATA = ("dataset_name", "retain_dataset_name", "domains", "forget", "retain", "holdout", "facts")
MODELS = (
    *("model_name_or_path", "adapter", "checkpoints", "original", "retain_model"),
    "reference_model",
)
SETTINGS_FILES = ("deepspeed", "fsdp_config", "accelerator_config")


def check_inputs(given: Iterable[Any]) -> None:
    """Refuse folders that cannot be written to, files that are not there, and empty names.

    Names that are no file or folder here are left to what loads them.

    Args:
        given: Dataclasses of arguments.

    Raises:
        ValueError: An argument names a file or folder that cannot serve.
    """
    for arguments in given:
        if isinstance(folder := getattr(arguments, "output_dir", None), str):
            _check_output(folder)
        resumed = getattr(arguments, "resume_from_checkpoint", None)
        if resumed and str(resumed).lower() not in ("auto", "true", "false"):
            if not Path(resumed).is_dir():
                raise ValueError(
                    f"`resume_from_checkpoint`: no folder {resumed}. Give a checkpoint's folder, "
                    "or `auto` for the newest complete one."
                )
        _check_files(arguments)
    for argument, name in named_inputs(given):
        if not name:
            raise ValueError(f"`{argument}` has an empty name: give one, or leave the flag out.")


def named_inputs(given: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """The arguments that name rows or models, each with a name that it holds."""
    for arguments in given:
        for argument in (*DATA, *MODELS):
            value = getattr(arguments, argument, None)
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    yield (
                        argument,
                        name.partition("=")[2] or name if argument == "domains" else name,
                    )


def _check_files(arguments: Any) -> None:
    for argument in SETTINGS_FILES:
        name = getattr(arguments, argument, None)
        if isinstance(name, str) and name and not Path(name).is_file():
            raise ValueError(f"`{argument}`: no file {name}; or give the settings as a mapping.")
    template = getattr(arguments, "chat_template_path", None)
    if template is not None and not Path(template).exists() and template.count("/") != 1:
        raise ValueError(f"`chat_template_path`: no file or model's folder {template!r}.")
    optimizer = getattr(arguments, "optim_args", None) or "a=1"
    if not all(name and equals for name, equals, _ in map(_pair, optimizer.split(","))):
        raise ValueError(f"`optim_args` must be NAME=VALUE,NAME=VALUE, got {optimizer!r}.")


def _pair(text: str) -> tuple[str, str, str]:
    return text.strip().partition("=")


def _check_output(folder: str) -> None:
    if not folder.strip():
        raise ValueError("`output_dir` is empty: name a folder, or leave the flag out.")
    path = Path(folder).absolute()
    try:
        existing = next(place for place in (path, *path.parents) if place.exists())
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"`output_dir`: {folder[:80]!r} cannot be a folder: {reason}.") from error
    if not existing.is_dir():
        what = "is a file" if existing == path else f"cannot be made, since {existing} is a file"
        raise ValueError(f"`output_dir`: {folder} {what}. Name a folder, or a new one.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir`: {existing} cannot be written to. Name another folder.")
