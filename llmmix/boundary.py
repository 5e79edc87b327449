"""Where an error reaches the command line: told in one line, or shown with its traceback.

An error is told in one line, with status 2, if the user can cause it and mend it:

- one of our own `raise` lines made it;
- it names a file (`OSError`), or memory ran out;
- a library that reads what users bring (`LIBRARIES`) refused it: with an error of its own class, or
  with an `OSError`, `ValueError` or `ImportError` raised in its code. If an argument names a file
  or folder that turns out to be broken, that is what is told.

All else, such as a `TypeError` or a `KeyError`, or a `ValueError` that numpy raises in our code, is
a fault of the program and keeps its traceback. `--traceback` (or `LLMMIX_TRACEBACK=1`) shows it for
every error.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from llmmix.inputs import DATA, MODELS, fault_of_data, fault_of_model, named_inputs

TRACEBACK = "LLMMIX_TRACEBACK"
LIBRARIES = {
    *("datasets", "pyarrow", "pandas", "fsspec", "yaml", "jinja2"),
    *("transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors", "gguf"),
    *("huggingface_hub", "httpx", "requests", "sentencepiece", "bitsandbytes", "vllm"),
}
READERS = {"datasets", "pyarrow", "pandas", "fsspec"}  # those that read rows
ERRORS = (OSError, ValueError, ImportError)
SHOWN = 300  # characters of a library's message
# What a library's message is about, where it names no argument
ABOUT = {
    r"Target modules .* not found": "lora_target_modules",
    r"[Nn]o modules were targeted|target_modules": "lora_target_modules",
    r"wandb|tensorboard|comet|mlflow|trackio|is not supported, only .* are supported": "report_to",
    r"attn_implementation|[Ff]lash ?[Aa]ttention": "attn_implementation",
    r"bitsandbytes": "load_in_4bit` or `load_in_8bit",
    r"bf16|fp16": "bf16` or `fp16",
    r"tf32": "tf32",
    r"[Oo]ptimizer|optim": "optim",
    r"[Ll]earning rate scheduler|lr_scheduler|num_warmup": "lr_scheduler_type",
    r"chat template|chat_template": "chat_template_path",
}

_given: list[Any] = []  # the arguments of the script that runs


def keep_arguments(given: Sequence[Any]) -> None:
    """Keep the arguments of the script that runs, so that `explain` can say which one is at fault.

    Args:
        given: Dataclasses of arguments.
    """
    _given[:] = given


def shows_traceback() -> bool:
    """Whether the user has asked for the traceback of every error."""
    return os.environ.get(TRACEBACK, "").lower() not in ("", "0", "false", "no")


def explain(error: BaseException, ours: Sequence[Path]) -> str | None:
    """The one line that tells an error; None if it is a fault of the program.

    Args:
        error: What ended the script.
        ours: Files and folders of our own code.
    """
    if is_stated(error, ours):
        return _one_line(str(error), 4 * SHOWN)
    cause = _cause(error)
    frames = [frame for frame in _frames(cause) if not _is_standard(frame)]
    origin = frames[-1] if frames else ""
    if "OutOfMemory" in type(cause).__name__ or isinstance(cause, MemoryError):
        return (
            f"memory ran out ({_one_line(str(cause), 120)}). Lower `per_device_train_batch_size`, "
            "`max_length` or `token_budget`."
        )
    package, kind = origin.partition(".")[0], type(cause).__module__.partition(".")[0]
    read = {package, kind} & READERS or any("datasets" in name.split(".") for name in frames)
    if (package in LIBRARIES or kind in LIBRARIES) and (fault := _broken_input(bool(read), cause)):
        return fault
    known = package in LIBRARIES and (isinstance(cause, ERRORS) or type(cause) is Exception)
    optional = origin.startswith("transformers.integrations") and isinstance(cause, RuntimeError)
    named = isinstance(cause, OSError) and cause.filename is not None
    if not (kind in LIBRARIES or known or optional or named):
        return None
    text = _one_line(str(cause), SHOWN) or type(cause).__name__
    kinds = DATA if read else MODELS if _loads_model(cause) else ()
    return f"{_subject(text, kinds)}{text} (--traceback shows where)"


def is_stated(error: BaseException, ours: Sequence[Path]) -> bool:
    """Whether one of our own `raise` lines made this error: its message needs no traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(last.filename).resolve()
    is_ours = any(place == file or place in file.parents for place in ours)
    return is_ours and (last.line or "").startswith("raise ") and bool(str(error))


def _one_line(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _cause(error: BaseException) -> BaseException:
    """What a library's wrapper is about, such as `DatasetGenerationError`: the error below it."""
    while type(error).__name__.startswith("DatasetGeneration"):
        below = error.__cause__ or error.__context__
        if below is None:
            break
        error = below
    return error


def _frames(error: BaseException) -> Iterator[str]:
    """Names of the modules in an error's traceback, innermost last."""
    place: TracebackType | None = error.__traceback__
    while place is not None:
        yield str(place.tb_frame.f_globals.get("__name__", ""))
        place = place.tb_next


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _broken_input(rows: bool, error: BaseException) -> str | None:
    """What an argument names that is broken, if that explains a library's error."""
    for argument, name in named_inputs(_given):
        path = Path(name).expanduser()
        fault = None
        if rows and argument in DATA and path.is_file():
            fault = fault_of_data(path)
        elif not rows and argument in MODELS:
            fault = fault_of_model(path)
        if fault:
            return f"`{argument}`: {name} {fault}."
    return None


def _loads_model(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name in ("from_pretrained", "resolve_checkpoint") for frame in frames)


def _subject(text: str, kinds: Sequence[str]) -> str:
    """The argument that a library's message is about, as the start of a sentence, if it is known.

    Args:
        text: The message.
        kinds: The arguments one of which is likely.
    """
    if re.search(r"`\w+`|--\w+", text):
        mentioned = re.findall(r"\w+", text)
        if any(hasattr(given, word) for word in mentioned for given in _given):
            return ""
    named = list(named_inputs(_given))
    for argument, name in named:
        if name in text:
            return f"`{argument}`: "
    for pattern, argument in ABOUT.items():
        if re.search(pattern, text):
            return f"`{argument}`: "
    likely = [(argument, name) for argument, name in named if argument in kinds]
    return f"`{likely[0][0]}` {likely[0][1]}: " if len(likely) == 1 else ""
