"""A dataset by its name: a built-in, a file, files by a pattern, a folder, or a hub id.

What exists on this machine is taken as it is called, brackets, `@` and `://` included; then a
pattern counts; a hub id comes last. NAME@CONFIG names a configuration.
"""

import glob
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError

from llmmix import builtin
from llmmix.files import built_once, cache_dir, is_main_process
from llmmix.rows.row_files import COMPRESSED, READERS, format_of, read_files

logger = logging.getLogger(__name__)

if "HF_UPDATE_DOWNLOAD_COUNTS" not in os.environ:
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it tells the Hub of local files too

FORMATS = (*READERS, ".parquet")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
ARCHIVES = (*COMPRESSED, ".zip", ".tar", ".xlsx", ".xls", ".arrow")


def load_splits(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    *,
    argument: str = "dataset_name",
) -> DatasetDict:
    """All splits of a dataset.

    Args:
        name: Built-in, file, pattern, folder or hub id; or NAME@CONFIG, whose configuration counts.
        config: Configuration of a hub dataset or folder, or of a built-in (see
            `llmmix.builtin.dataset`).
        streaming: Load an `IterableDataset` where the source allows it.
        argument: Name of `name` in error messages.

    Raises:
        FileNotFoundError: There is no such file or folder, nothing that fits the pattern, no such
            dataset on the hub, or no text of `builtin:domains` on this machine.
        ValueError: A file is broken, empty or of another format, or there is no such built-in or
            configuration.
    """
    name, own = split_name(name)
    config = own or config
    if name.startswith("builtin:"):
        return builtin.dataset(name, config, argument=argument)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _load_folder(Path(path), config, streaming, argument)
    if files := local_files(name):
        return load_files({"train": files}, argument, streaming)
    check_not_local(name, argument)
    return load_from_hub(argument, path=name, name=config, streaming=streaming)


def split_name(name: str) -> tuple[str, str | None]:
    """NAME@CONFIG as its two parts; the configuration is None where `@` belongs to the name."""
    if os.path.exists(os.path.expanduser(name)):
        return name, None
    for at in reversed([place.start() for place in re.finditer("@", name)]):
        if os.path.exists(os.path.expanduser(name[:at])):
            return name[:at], name[at + 1 :]
    source, _, config = name.partition("@")
    remote = source.startswith("builtin:") or (HUB_ID.fullmatch(source) and not _is_local(name))
    return (source, config or None) if remote else (name, None)


def local_files(name: str) -> list[Path]:
    """The file of a name, or else the files that fit it as a pattern, in order of their names."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return [Path(path)]
    if not glob.has_magic(path) or "\0" in path:
        return []
    here = next(part for part in [*Path(path).parents, Path()] if part.is_dir())
    pattern = os.path.join(glob.escape(str(here)), os.path.relpath(path, here))
    found = sorted(Path(file) for file in glob.glob(pattern, recursive=True))
    return [file for file in found if file.is_file()]


def check_not_local(name: str, argument: str) -> None:
    """Refuse a name that can only be that of a file or folder, which is not there.

    Raises:
        FileNotFoundError: The name has a path's beginning or a file's ending, or no hub id has it.
    """
    if re.match(r"\w+://", name):
        raise FileNotFoundError(
            f"`{argument}`: {name} is an address. Download it, or name it in a config file: "
            "`datasets: [{path: json, data_files: ADDRESS}]`."
        )
    if glob.has_magic(name):
        raise FileNotFoundError(f"`{argument}`: no file or folder fits {name}. Check the path.")
    if name in ("json", "csv", "text", "parquet", "arrow"):  # `datasets` would read any file here
        raise FileNotFoundError(f"`{argument}`: {name} is a format; name a file or a folder.")
    if _is_local(name) or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"`{argument}`: no file or folder {name!r}. Check the path.")


def _is_local(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    return name.startswith((".", "/", "~")) or suffix in FORMATS or suffix in ARCHIVES


def kind_of(path: Path) -> str | None:
    """The ending that tells a file's format, without that of a compression; None for others."""
    return ".parquet" if path.suffix.lower() == ".parquet" else format_of(path)


def load_files(
    files: Mapping[str, Sequence[Path]], argument: str, streaming: bool = False
) -> DatasetDict:
    """The rows of files on this machine, by split.

    Raises:
        ValueError: A file is broken, empty or of no format that is read, or some are Parquet and
            some are not.
    """
    every = [path for paths in files.values() for path in paths]
    for path in every:
        if kind_of(path) is None:
            raise ValueError(
                f"`{argument}`: {path} is not one of {', '.join(FORMATS)}, nor one of these with "
                f"{', '.join(COMPRESSED)}; convert it first."
            )
    columnar = [kind_of(path) == ".parquet" for path in every]
    if not any(columnar):
        return _told(read_files(files, argument, streaming), every, argument)
    if not all(columnar):
        raise ValueError(f"`{argument}`: some files are Parquet and some are not. Name one kind.")
    plain = {split: [_plain_name(path) for path in paths] for split, paths in files.items()}
    try:
        found = datasets.load_dataset("parquet", data_files=plain, streaming=streaming)
        return _told(found, every, argument)
    except (DatasetGenerationError, ValueError, OSError) as error:
        # the cause is told by pyarrow
        raise ValueError(
            f"`{argument}`: {', '.join(map(str, every[:3]))} cannot be read as Parquet: "
            f"{_reason(error.__cause__ or error)}"
        ) from error


def _told(splits: DatasetDict, files: Sequence[Path], argument: str) -> DatasetDict:
    """The splits, after a line on what was read as what."""
    parts = []
    for split, rows in splits.items():
        count = f"{len(rows)} rows" if isinstance(rows, Dataset) else "a stream"
        parts.append(f"{split}: {count} of {', '.join(rows.column_names or [])}")
    several = f"{len(files)} files, {files[0]} to {files[-1]}"
    where = str(files[0]) if len(files) == 1 else several
    say(f"`{argument}`: read {where} ({'; '.join(parts)}).")
    return splits


def pick_split(
    splits: DatasetDict, name: str, argument: str, default: str = "train"
) -> Dataset | IterableDataset:
    """The split of a name; where the name was left at its default, the only split serves too.

    Raises:
        ValueError: There is no such split.
    """
    if name not in splits and name == default and len(splits) == 1:
        (only,) = splits
        say(f"`{argument}`: took {only!r}, the only split.")
        return splits[only]
    if name not in splits:
        raise ValueError(f"`{argument}`: no split {name!r}; the dataset has {list(splits)}.")
    return splits[name]


def say(message: str) -> None:
    """Log a line on the main process, seen by default: how rows were found and read."""
    if is_main_process():
        logger.warning(message)


def _load_folder(path: Path, config: str | None, streaming: bool, argument: str) -> DatasetDict:
    """A folder that `datasets` saved, or one of files, which `datasets` sorts into splits."""
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(_plain_name(path))
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        plain = str(_mirror(path))
        builder = datasets.load_dataset_builder(plain, name=config)
        named = (builder.config.data_files or {}).items()
        found = {str(split): [Path(file) for file in files] for split, files in named}
        every = [file for files in found.values() for file in files]
        if every and all(map(format_of, every)):
            return load_files(found, argument, streaming)
        splits = datasets.load_dataset(plain, name=config, streaming=streaming)
        return _told(splits, every or [path], argument)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"`{argument}`: the folder {path} has no files of rows: {', '.join(FORMATS)}."
        ) from error
    except DatasetGenerationError as error:
        reason = _reason(error.__cause__ or error)
        raise ValueError(f"`{argument}`: the folder {path} cannot be read: {reason}") from error


def load_from_hub(argument: str, **options: Any) -> Any:
    """What `datasets.load_dataset` returns, its errors told under an argument's name.

    Raises:
        FileNotFoundError: The hub does not give such a dataset.
        ValueError: It has no such configuration or split, or its files cannot be read.
    """
    try:
        return datasets.load_dataset(**options)
    except OSError as error:  # a connection that fails is one
        raise FileNotFoundError(
            f"`{argument}`: no file or folder {options['path']} is here, and the hub does not give "
            f"such a dataset: {_reason(error)}"
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        reason = _reason(error.__cause__ or error)
        raise ValueError(f"`{argument}`: {options['path']}: {reason}") from error


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _plain_name(path: Path) -> str:
    """A name for `datasets`, which takes brackets for a pattern and `::` for a chain of archives.

    It is the path itself, or else a link to it in the cache.
    """
    path = Path(os.path.abspath(path))  # a link to it keeps its ending
    if _is_plain(path):
        return str(path)
    link = cache_dir() / "names" / f"{_digest(str(path))}{path.suffix}"
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(path)
    except FileExistsError:
        pass  # its name says where it leads
    return str(link)


def _mirror(folder: Path) -> Path:
    """A folder under a plain name: itself, or one in the cache with links to its files.

    `datasets` follows a link to the folder, and then reads the pattern again.
    """
    folder = folder.resolve()
    if _is_plain(folder):
        return folder
    files = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)

    def link_all(out: Path) -> None:
        for file in files:
            link = out / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)

    return built_once(f"names/{_digest(*map(str, [folder, *files]))}", link_all)


def _is_plain(path: Path) -> bool:
    return re.fullmatch(r"[\w./ -]+", str(path)) is not None


def _digest(*names: str) -> str:
    return hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()[:24]
