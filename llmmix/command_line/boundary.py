"""Where an error reaches the command line: told in one line, or shown with its traceback.

An error is told in one line, with status 2, if the user can cause it and mend it:

- one of our own `raise` lines made it;
- it names a file (`OSError`), or memory ran out;
- a library that reads what users bring (`LIBRARIES`) refused it: with an error of its own class,
  with an `OSError`, `ValueError` or `ImportError` raised in its code, or in any way while it loads
  a checkpoint.
- a script of the user's is no Python.

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

from llmmix.command_line.inputs import DATA, MODELS, named_inputs

TRACEBACK = "LLMMIX_TRACEBACK"
LIBRARIES = {
    *("datasets", "pyarrow", "pandas", "fsspec", "yaml", "jinja2"),
    *("transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors", "gguf"),
    *("huggingface_hub", "httpx", "requests", "sentencepiece", "bitsandbytes", "vllm"),
}
READERS = {"datasets", "pyarrow", "pandas", "fsspec"}  # those that read rows
ERRORS = (OSError, ValueError, ImportError, re.error)
LOADERS = {  # functions that load what an argument names, and which of their variables names it
    "from_pretrained": ("pretrained_model_name_or_path", "model_id"),
    "resolve_checkpoint": ("name",),
    "load_splits": ("name",),
}
SHOWN = 300  # characters of a library's message
# A library's message in our words, which follow the name of the file, folder or model
TEMPLATE = "chat_template is not set"
NO_HUB = "is no file or folder here, and cannot be had from the Hub now: see to the connection"
OURS = {
    r"Repo id must": "is neither a file or folder here nor a name of the Hub, such as org/name",
    r"couldn't connect|Couldn't reach|offline mode|Cannot (reach|find the)": NO_HUB,
    r"not a valid model identifier|exist on the Hub|40[14] ": "is neither here nor on the Hub",
    r"Can't find 'adapter_config.json'": "is no adapter's folder: it has no adapter_config.json",
    r"ignore_mismatched_sizes": "has weights of other shapes than its config.json says",
    r"corresponds to no data": "has no rows",
    TEMPLATE: "has no chat template, which rows of messages need: name another "
    "model, or give rows of text",
}
# What a library's message is about, where it names no argument
ABOUT = {
    r"Target modules .*not found|modules were targeted|target_modules": "lora_target_modules",
    r"task type": "lora_task_type",
    r"[Oo]ptimizer|optim": "optim",
    r"8 bit and 4 bit|bitsandbytes": "load_in_4bit` or `load_in_8bit",
    r"repos/create": "push_to_hub",
    r"deepspeed": "deepspeed",
    r"liger": "use_liger_kernel",
    r"wandb|tensorboard|comet|mlflow|trackio|is not supported, only .* are supported": "report_to",
    r"attn_implementation|[Ff]lash ?[Aa]ttention": "attn_implementation",
    r"DynamoBackend": "torch_compile_backend",
    r"bf16|fp16": "bf16` or `fp16",
    r"tf32": "tf32",
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
    if isinstance(error, SyntaxError) and _is_users(error.filename, ours):
        return f"{error.filename}, line {error.lineno}: {error.msg}."
    cause = _cause(error)
    if "OutOfMemory" in type(cause).__name__ or isinstance(cause, MemoryError):
        return (
            f"memory ran out ({_one_line(str(cause), 120)}). Lower `per_device_train_batch_size`, "
            "`max_length` or `token_budget`."
        )
    if unknown := _unknown_key(cause):
        return unknown
    frames = [frame for frame in _frames(cause) if not _is_standard(frame)]
    origin = frames[-1] if frames else ""
    package, kind = origin.partition(".")[0], type(cause).__module__.partition(".")[0]
    loaded = _loaded(error) or _loaded(cause)
    rows = {package, kind} & READERS or any("datasets" in name.split(".") for name in frames)
    kinds = DATA if rows else MODELS if loaded or TEMPLATE in str(cause) else ()
    known = package in LIBRARIES and (isinstance(cause, ERRORS) or type(cause) is Exception)
    loading = loaded is not None and not rows and package != "llmmix"
    optional = origin.startswith("transformers.integrations") and isinstance(cause, RuntimeError)
    named = isinstance(cause, OSError) and cause.filename is not None
    if not (kind in LIBRARIES or known or loading or optional or named):
        return None
    text = _one_line(str(cause), SHOWN)
    if not (isinstance(cause, ERRORS) or kind in LIBRARIES):
        text = f"{type(cause).__name__}: {text}"
    return _told(text, kinds, loaded, package)


def _told(text: str, kinds: Sequence[str], loaded: str | None, package: str) -> str:
    """A library's message, in our words where we have them, with the argument that it is about.

    Args:
        text: The message.
        kinds: The arguments that name what was being read.
        loaded: The name of what was being loaded.
        package: The library.
    """
    where = "(--traceback shows where)"
    named = [(argument, name) for argument, name in named_inputs(_given) if name]
    near = [pair for pair in named if pair[1] in text or pair[1] == loaded]
    near = near or [pair for pair in named if pair[0] in kinds]
    one = near[0] if len({argument for argument, _ in near}) == 1 else None
    if one and (words := next((words for p, words in OURS.items() if re.search(p, text)), None)):
        return f"`{one[0]}`: {one[1]} {words}."
    if one and one[1] in text:
        return f"`{one[0]}`: {text} {where}"
    argument = _argument_of(text)
    if argument is None and _names_argument(text):
        return f"{text} {where}"
    about = (name for pattern, name in ABOUT.items() if re.search(pattern, text))
    argument = argument or next((name for name in about if _has(name.partition("`")[0])), None)
    if argument is None and package == "peft":
        argument = "lora_target_modules"
    if argument is None and one:
        return f"`{one[0]}`: {one[1]}: {text} {where}"
    return f"`{argument}`: {text} {where}" if argument else f"{text} {where}"


def _names_argument(text: str) -> bool:
    return any(_has(word) for word in re.findall(r"(?:`|--)(\w+)", text))


def _has(argument: str) -> bool:
    return any(hasattr(given, argument) for given in _given)


def _argument_of(text: str) -> str | None:
    """The argument whose value a message mentions, such as the name of a file."""
    for given in _given:
        for argument, value in vars(given).items():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, str) and len(part) > 2 and repr(part) in text:
                    return argument
    return None


def _is_users(file: str | None, ours: Sequence[Path]) -> bool:
    path = Path(file or "<string>").resolve()
    installed = "site-packages" in path.parts
    return (
        path.is_file() and not installed and not any(p == path or p in path.parents for p in ours)
    )


def _unknown_key(error: BaseException) -> str | None:
    """What is told of a key in a mapping of settings that the function it is for does not take."""
    found = re.search(r"[Uu]nexpected keyword arguments?:? '?(\w+)", str(error))
    if not isinstance(error, TypeError | ValueError) or not found:
        return None
    for given in _given:
        for name, value in vars(given).items():
            if isinstance(value, dict) and found[1] in value:
                return f"`{name}` has a key that is not known: {_one_line(str(error), SHOWN)}"
    return None


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


def _loaded(error: BaseException) -> str | None:
    """The checkpoint or dataset that was being loaded; None outside of loading."""
    place, found = error.__traceback__, None
    while place is not None:
        function, given = place.tb_frame.f_code.co_name, place.tb_frame.f_locals
        for name in LOADERS.get(function, ()):
            found = found or (str(given[name]) if given.get(name) else None)
        place = place.tb_next
    return found
