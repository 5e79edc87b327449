"""Files that are whole or absent, folders that one run has, the cache, identities, plain JSON.

What we write takes the place of the old file in one step, so that a kill or a full disk leaves the
old one or the new one. What an earlier version left half-written counts as absent, with a word.

The cache is in `$LLMMIX_CACHE`, else in `~/.cache/llmmix`.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

logger = logging.getLogger(__name__)

STALE = 86400.0  # seconds after which what a killed process was writing is removed
CLAIM = "_llmmix.lock"  # in the folder of a run; the Trainer uploads nothing that begins with "_"

RECORD = "mixture.jsonl"  # in the folder of a mixture run, an object a line

# The files of a checkpoint folder that are the model itself, not its optimizer or its training
CHECKPOINT_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf"),
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json"),
    *("tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "*.jinja"),
)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, beside `path`, whose file takes the place of `path` at the end.

    If the block fails, `path` stays as it was. What a killed process leaves beside it is hidden,
    is never read, and is removed when the same file is written a day later.
    """
    path = Path(path).resolve()  # of a link, the file that it leads to
    for old in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(OSError):  # another process may remove it first
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) in one step: a reader finds the old content, or all of the new.

    Raises:
        OSError: The folder is missing, or the disk is full: the old file is as it was.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: str | Path, absent: Any = None) -> Any:
    """The value in a JSON file; `absent` if there is no file, or one that is not whole."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return absent
    except ValueError:
        warn_not_whole(f"{path} is not whole and counts as absent")
        return absent


def read_json_lines(path: str | Path) -> list[dict]:
    """The objects of a file with one a line; lines that are not whole are left out, with a word.

    Raises:
        FileNotFoundError: There is no such file.
    """
    found, torn = [], []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(dict(json.loads(line).items()))
        except (ValueError, AttributeError):
            torn.append(number)
    if torn:
        shown = ", ".join(map(str, torn[:3])) + (" ..." if len(torn) > 3 else "")
        warn_not_whole(f"{path}: not whole and left out: line {shown}")
    return found


@cache  # said once, however often the file is read
def warn_not_whole(message: str) -> None:
    """Log on the main process, once, that a file is not whole."""
    if is_main_process():
        logger.warning("%s. A killed run or a full disk leaves such a file.", message)


def is_main_process() -> bool:
    """Whether this is the process of rank 0, known before anything of torch is set up."""
    return os.environ.get("RANK", "0") == "0"  # which torchrun and accelerate set


_claimed: dict[Path, BaseFileLock] = {}


def claim(folder: str | Path | None) -> Path:
    """Make the folder of a run, and keep other runs out of it until this process ends.

    The main process alone makes and claims it, again as often as it likes; the other ranks end with
    it, as the launcher sees to. A killed process holds nothing. Where the file system has no locks,
    a warning says so.

    Args:
        folder: Value of `--output_dir`; None is the current folder.

    Returns:
        The folder.

    Raises:
        ValueError: Another process has claimed the folder, or it cannot be made.
    """
    folder = Path(folder or ".")
    key = folder.resolve()
    if not is_main_process():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`--output_dir` {folder} cannot be made: {error.strerror}. Name another folder."
        ) from error
    if key in _claimed and (folder / CLAIM).exists():
        return folder
    lock = FileLock(folder / CLAIM)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"`--output_dir` {folder} is in use by another run, whose files would mingle with "
            "those of this one. Name another folder, or wait until that run has ended."
        ) from None
    except (OSError, NotImplementedError) as error:
        logger.warning(
            "`--output_dir` %s cannot be locked (%s): let no other run write into it.",
            folder,
            error,
        )
    _claimed[key] = lock
    return folder


def release(folder: str | Path) -> None:
    """Give up a claim, as before another program is started to go on in the folder."""
    if (lock := _claimed.pop(Path(folder).resolve(), None)) is not None:
        lock.release()


def cache_dir() -> Path:
    """The cache folder, which may not exist yet."""
    return Path(os.environ.get("LLMMIX_CACHE", "~/.cache/llmmix")).expanduser()


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, built by the first process that asks, while others wait.

    Args:
        name: Folder name, which must say everything that the content depends on.
        build: Fills the empty folder it is given. If it fails, nothing is kept.

    Returns:
        The complete folder.
    """
    folder = cache_dir() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process
            try:
                partial.mkdir()
                build(partial)
                partial.rename(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return folder


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, the first 16 hex digits."""
    stat = path.stat()
    return _digest_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest_of(path: str, size: int, changed: int) -> str:
    """The digest, computed once a process unless the size or the time of change differs."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def checkpoint_id(checkpoint: str, revision: str | None = None) -> str:
    """The identity of a checkpoint, which differs after it is trained again under the same name.

    Args:
        checkpoint: Folder or hub id.
        revision: Commit of a hub id.

    Returns:
        For a folder, a digest of the names and contents of weights, configuration, tokenizer and
        chat template: a copy has the same. Else the name and the commit.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return f"{checkpoint}@{revision}" if revision else checkpoint
    files = sorted({path for pattern in CHECKPOINT_FILES for path in folder.glob(pattern)})
    parts = [(path.name, file_digest(path)) for path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_record(folder: str | Path) -> tuple[dict, list[dict]]:
    """The first line of a mixture run's record, which has the names, and its other lines.

    `llmmix.mixing.record` says what they hold.

    Raises:
        FileNotFoundError: `folder` holds no record, or one that was cut off before its first
            line ended.
    """
    path = Path(folder).expanduser() / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RECORD}: it is not the folder of a mixture run."
        )
    lines = read_json_lines(path)
    if not lines or "domains" not in lines[0]:
        raise FileNotFoundError(f"{path} lacks its first line, which has the names: run it again.")
    return lines[0], lines[1:]


def plain(value: Any) -> Any:
    """The value in plain JSON types, with None for a number that is not finite.

    Args:
        value: JSON types, dataclasses, named tuples, arrays and tensors, nested in any way.
    """
    if is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
