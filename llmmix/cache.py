"""Where things built once are kept: `$LLMMIX_CACHE`, else `~/.cache/llmmix`."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


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


def file_digest(*paths: Path) -> str:
    """SHA-256 over the content of files, in the order given; the first 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]
