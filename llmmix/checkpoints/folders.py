"""Where a checkpoint is, and what its folder holds: told from the files, before anything loads.

A model is a hub id, a folder, a `.gguf` file or `builtin:tiny`.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import has_file

from llmmix.training.completeness import fault_of

MODEL = "model_name_or_path"  # the argument that names a model, where no other does
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "spiece*")
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")  # a folder of them alone is not read
LOCAL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


_origins: dict[str, str] = {}  # what folders of the cache were made from


def made_from(origin: str, folder: str | Path) -> str:
    """The folder as text, from which `origin_of` then tells what it was made from."""
    _origins[str(folder)] = origin
    return str(folder)


def origin_of(checkpoint: str) -> str:
    """What a checkpoint that `resolve_checkpoint` returned was made from; else itself.

    The name of a built-in or the path of a `.gguf` file, which hold on another machine, or after
    the cache is emptied, where a folder of the cache does not.
    """
    return _origins.get(checkpoint, checkpoint)


def local_path(name: str | os.PathLike[str], argument: str = MODEL) -> Path | None:
    """The folder or file that a name stands for; None if it is the Hub's.

    Args:
        name: Hub id, folder or file; `~` is the home folder.
        argument: Name of `name` in error messages.

    Raises:
        FileNotFoundError: The name is none that a model of the Hub can have, or begins with a
            folder that is here, and there is no such file or folder.
    """
    given = os.fspath(name)
    path = Path(given).expanduser()
    if given and path.exists():
        return path
    hint = ""
    if HUB_ID.fullmatch(given) and path.suffix not in LOCAL_SUFFIXES:
        first, _, second = given.partition("/")
        if (
            not second
            or not Path(first).is_dir()
            or has_file(given, "config.json", local_files_only=True)
        ):
            return None
        hint = f" For a model of the Hub, go where there is no folder {first}."
    raise FileNotFoundError(f"`{argument}`: no file or folder {given or repr('')}.{hint}")


def check_checkpoint(
    name: str, argument: str = MODEL, *, safetensors: bool = True, tokenizer: bool = True
) -> None:
    """Refuse a folder that would not load, or would load with weights that are new.

    Of the weights only the headers are read. A hub id is left to transformers.

    Args:
        name: What `resolve_checkpoint` returned.
        argument: Name of the model in error messages.
        safetensors: Whether weights are read from safetensors alone.
        tokenizer: Whether its tokenizer is to be loaded.

    Raises:
        ValueError: The folder lacks `config.json`, weights or a tokenizer; a file is not whole; or
            tensors of the model are missing.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"`{argument}`: {name} holds no model: it has no config.json.")
    weights = sorted(folder.glob("*.safetensors"))
    others = sorted({path.name for kind in OTHER_WEIGHTS for path in folder.glob(kind)})
    if not weights and not others:
        raise ValueError(f"`{argument}`: {name} has no weights (model.safetensors).")
    if not weights and others[0].endswith(".gguf"):
        raise ValueError(f"`{argument}`: {name} holds {others[0]}: name the file itself.")
    if not weights and safetensors:
        raise ValueError(
            f"`{argument}`: {name} has no safetensors but {others[0]}, which may run code. If you "
            "trust it, convert it: AutoModelForCausalLM.from_pretrained(FOLDER, "
            "use_safetensors=False).save_pretrained(OTHER)."
        )
    if tokenizer and not has_tokenizer(folder):
        raise ValueError(
            f"`{argument}`: {name} has no tokenizer: save it beside the model "
            "(`tokenizer.save_pretrained`)."
        )
    check_whole([folder / "config.json", *folder.glob("*.index.json"), *weights], name, argument)
    _check_tensors(folder, weights, name, argument)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer."""
    folder = Path(folder).expanduser()
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def check_whole(files: list[Path], name: str, argument: str) -> None:
    """Refuse files that are not whole.

    Raises:
        ValueError: A file is not; `argument` and `name` are those of the model.
    """
    for file in files:
        if fault := fault_of(file):
            raise ValueError(f"`{argument}`: {file.name} of {name} {fault}. Copy it anew.")


def _check_tensors(folder: Path, weights: list[Path], name: str, argument: str) -> None:
    """Load the shapes of a folder's tensors without their values, and see which are missing."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging

    if not weights or is_deepspeed_zero3_enabled():  # which would spread the shapes
        return
    settings = json.loads((folder / "config.json").read_bytes())
    if "auto_map" in settings or "quantization_config" in settings:  # other code names the tensors
        return
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    tensors = {key: shape for file in weights for key, shape in _shapes(file).items()}
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        _, found = model.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    refuse_new_weights(found, name, argument)


def _shapes(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
        return {key: torch.empty(part.get_shape(), device="meta") for key, part in parts.items()}


def refuse_new_weights(found: dict[str, Any], name: str, argument: str) -> None:
    """Refuse a model some of whose weights were not in its files.

    Args:
        found: What `from_pretrained(..., output_loading_info=True)` tells.
        name: The model.
        argument: Name of the model in error messages.

    Raises:
        ValueError: A weight is missing, or has another shape in the files.
    """
    missing = sorted(found["missing_keys"])
    other = sorted(key for key, *_ in found["mismatched_keys"])
    for keys, what in ((missing, "lacks"), (other, "has another shape of")):
        if keys:
            more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
            raise ValueError(
                f"`{argument}`: {name} {what} {keys[0]}{more}, which would be new at random. Get "
                "all of its files."
            )
