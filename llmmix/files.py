"""The cache of what is built once, identities of files and checkpoints, and plain JSON.

The cache is in `$LLMMIX_CACHE`, else in `~/.cache/llmmix`.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

RECORD = "mixture.jsonl"  # in the folder of a mixture run, an object a line

# The files of a checkpoint folder that are the model itself, not its optimizer or its training
CHECKPOINT_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf"),
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json"),
    *("tokenizer*", "*.model", "vocab*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "*.jinja"),
)


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
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(folder)
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
        FileNotFoundError: `folder` holds no record.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RECORD}: it is not the folder of a mixture run."
        )
    header, *entries = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return header, entries


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
