"""The files and folders that arguments name: whether they can serve, seen before anything loads.

`check_inputs` looks at what costs nothing: whether a folder can be written, a file is empty or of
another format, a model's folder has its parts. `fault_of_data` reads a file of rows to the end, to
say which line is broken once a library has refused it.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmmix.completeness import is_whole_safetensors

DATA = ("dataset_name", "retain_dataset_name", "domains", "forget", "retain", "holdout", "facts")
MODELS = ("model_name_or_path", "adapter", "checkpoints", "original", "retain_model")
SETTINGS_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf")
TOKENIZER = ("tokenizer*", "*.model", "vocab*", "spiece*", "*.tiktoken", "tekken.json")
TEXT = (".json", ".jsonl", ".csv", ".tsv")
START = 1 << 16  # bytes of a file that are looked at beforehand


def check_inputs(given: Iterable[Any]) -> None:
    """Refuse folders that cannot be written to, and files and models that cannot be what they name.

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
        path = Path(name).expanduser()
        fault = None
        if argument in DATA and path.is_file():
            fault = _fault_of_start(path)
        elif argument in MODELS:
            fault = fault_of_model(path, tokenizer=argument == "model_name_or_path")
        if fault:
            raise ValueError(f"`{argument}`: {name} {fault}.")


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


def _fault_of_start(path: Path) -> str | None:
    """What is wrong with the start of a file of rows, as the end of a sentence."""
    with path.open("rb") as file:
        start = file.read(START)
    if not start.strip():
        return "is empty"
    if path.suffix == ".parquet":
        return _fault_of_parquet(path, start)
    if path.suffix in TEXT and b"\0" in start and start[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return f"holds binary data, where {path.suffix} is text"
    first = start.removeprefix(b"\xef\xbb\xbf").strip()
    if path.suffix in (".json", ".jsonl") and not re.match(rb"\{|\[\s*(\{|$)", first):
        if first == b"[]":
            return "is empty"
        # pyarrow reads a lone `null` beyond its memory, which no error tells
        shown = first.split(b"\n")[0][:40].decode(errors="replace")
        return f"holds no JSON object in its first line: {shown!r}"
    return None


def _fault_of_parquet(path: Path, start: bytes) -> str | None:
    if start[:4] != b"PAR1":
        return "is no Parquet file (it does not begin with PAR1)"
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return None if file.read() == b"PAR1" else "is not whole: copy or download it again"


def fault_of_data(path: Path) -> str | None:
    """What is wrong with a file of rows, as the end of a sentence: its line, and why."""
    if fault := _fault_of_start(path):
        return fault
    if path.suffix not in TEXT:
        return None
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        place = content[: error.start].count(b"\n") + 1
        return f"is not UTF-8 (line {place}): save it in that encoding"
    if path.suffix not in (".json", ".jsonl"):
        return None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"is broken at line {error.lineno}: {error.msg}"
        return None
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"is broken at line {number}, which is no JSON object: {error.msg}"
        if not isinstance(row, dict):
            return f"holds no JSON object in line {number}, but {line.strip()[:40]}"
    return None


def fault_of_model(path: Path, *, tokenizer: bool = True, deep: bool = False) -> str | None:
    """What a model's file or folder lacks, as the end of a sentence; None for a name of the Hub.

    Args:
        path: What the argument names.
        tokenizer: Whether a folder needs a tokenizer.
        deep: Read the tokenizer too, which takes a while.
    """
    if path.is_file():
        return _fault_of_model_file(path)
    if path.is_dir():
        return next(_faults_of_folder(path, tokenizer, deep), None)
    given = str(path)
    if path.is_absolute() or given.count("/") > 1 or given.startswith("."):
        return "is neither a file nor a folder"
    return None


def _faults_of_folder(path: Path, tokenizer: bool, deep: bool) -> Iterator[str]:
    described = [path / name for name in ("adapter_config.json", "config.json")]
    described = [file for file in described if file.exists()]
    if not described:
        yield _fault_without_config(path)
    read = list(path.glob("tokenizer*.json")) if deep else []
    for file in (*described, *path.glob("*.safetensors.index.json"), *read):
        if fault := _fault_of_json(file):
            yield f"has a {file.name} that {fault}"
    if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
        yield "has no weights (model.safetensors)"
    for file in path.glob("*.safetensors"):
        if not is_whole_safetensors(file):
            yield f"has a {file.name} that is not whole: copy or download it again"
    for file in path.glob("*.safetensors.index.json"):
        shards = set(json.loads(file.read_bytes()).get("weight_map", {}).values())
        for name in sorted(name for name in shards if not (path / name).exists()):
            yield f"lacks {name}, which its {file.name} names"
    found = any(any(path.glob(name)) for name in TOKENIZER)
    if tokenizer and path / "config.json" in described and not found:
        yield "has no tokenizer (tokenizer.json): save the tokenizer into the same folder"


def _fault_without_config(path: Path) -> str:
    if not any(path.iterdir()):
        return "is an empty folder"
    if any(path.glob("*.gguf")):
        return "is a folder with a .gguf file: name the file itself"
    newest = max(path.glob("checkpoint-*"), key=os.path.getmtime, default=None)
    hint = f"; did you mean {newest}?" if newest else ""
    return f"has no config.json, so that it is no model's folder{hint}"


def _fault_of_model_file(path: Path) -> str | None:
    if path.suffix != ".gguf":
        return "is a file: name the model's folder, or a .gguf file"
    with path.open("rb") as file:
        start = file.read(24)
    if start[:4] != b"GGUF":
        return "is no GGUF file (it does not begin with GGUF)"
    return None if len(start) == 24 else "is not whole: copy or download it again"


def _fault_of_json(path: Path) -> str | None:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        return f"is no JSON ({error})"
    return None if isinstance(found, dict) else "holds no JSON object"
