"""Adapters: the base that one names, the tokenizer that it brings, and models to evaluate.

A folder with an adapter alone stands for the adapter on the model that it names.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import has_file

from llmmix.checkpoints.folders import (
    MODEL,
    check_checkpoint,
    check_whole,
    has_tokenizer,
    local_path,
    origin_of,
    refuse_new_weights,
)

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a folder with an adapter and no model of its own."""
    folder = Path(name).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(adapter: str | Path, argument: str = MODEL) -> tuple[str, str | None]:
    """The model that an adapter's folder names as its base ("" for none), and its revision.

    Args:
        adapter: The folder.
        argument: Name of `adapter` in error messages.

    Raises:
        ValueError: The folder's `adapter_config.json` is not whole.
    """
    config = Path(adapter).expanduser() / ADAPTER_CONFIG
    try:
        given = json.loads(config.read_bytes())
        return given.get("base_model_name_or_path") or "", given.get("revision")
    except (ValueError, AttributeError):
        raise ValueError(f"`{argument}`: {config} is not whole.") from None


def check_base(adapter: str | Path, argument: str = MODEL) -> None:
    """Refuse an adapter's folder that is to stand for a model, and whose base is not known.

    Raises:
        ValueError: It names no base, or one that is an adapter itself.
        FileNotFoundError: It names a file or folder that is not there.
    """
    base, _ = base_of(adapter, argument)
    way_out = "Name the base with `model_name_or_path` and the folder with `adapter`."
    if not base:
        raise ValueError(f"`{argument}`: {adapter} is an adapter that names no base. {way_out}")
    if is_adapter(base):
        raise ValueError(
            f"`{argument}`: {adapter} is an adapter of {base}, which is an adapter itself. Merge "
            "that one into its base first (`merge_and_unload` of peft)."
        )
    try:
        base.startswith("builtin:") or local_path(base, argument)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"`{argument}`: {adapter} is an adapter of {base}, which is not there. {way_out}"
        ) from None


def check_adapter(name: str, argument: str = "adapter") -> None:
    """Refuse an adapter that is not there, or whose folder has none.

    Raises:
        FileNotFoundError: There is no such folder, and no adapter of that name on the Hub.
        ValueError: The folder holds no adapter, or one that is not whole.
    """
    folder = local_path(name, argument)
    if folder is None:
        with suppress(OSError):  # of a name that the Hub does not know
            if has_file(name, ADAPTER_CONFIG):
                return
        raise FileNotFoundError(
            f"`{argument}`: no folder {name} is here, and the Hub gives no adapter of that name."
        )
    weights = [*folder.glob("adapter_model.safetensors"), *folder.glob("adapter_model.bin")]
    for there, what in ((folder / ADAPTER_CONFIG).is_file(), ADAPTER_CONFIG), (weights, "weights"):
        if not there:
            raise ValueError(f"`{argument}`: {name} holds no adapter: it has no {what}.")
    check_whole([folder / ADAPTER_CONFIG, *weights], name, argument)


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate.

    Attributes:
        name: Name of its folder of results.
        model: The model as it was given: hub id, folder, `.gguf` file or built-in.
        adapter: A PEFT folder, or None.
        revision: Revision of the model, where the adapter names one.
        arguments: The arguments that named the model and the adapter, for errors.
    """

    name: str
    model: str
    adapter: str | None = None
    revision: str | None = None
    arguments: tuple[str, str] = field(default=(MODEL, "adapter"), compare=False)


def named_checkpoints(
    models: list[str], adapters: list[str] | None = None, argument: str = MODEL
) -> list[Checkpoint]:
    """A checkpoint for each model, or for each adapter of the only model.

    The adapter 'none' is the model alone. A model that is a folder with only an adapter stands for
    the adapter on the base model that it names.

    Args:
        models: The models.
        adapters: PEFT folders.
        argument: Name of `models` in error messages.

    Raises:
        ValueError: Adapters are given for several models, or for one that is an adapter itself; or
            two runs have one name; or an `adapter_config.json` is not whole.
    """
    if adapters and len(models) > 1:
        raise ValueError(f"`adapter` goes with one `{argument}`, got several.")
    if adapters and is_adapter(models[0]):
        raise ValueError(
            f"`{argument}`: {models[0]} is an adapter itself: name its base, and give the folder "
            "with `adapter`."
        )
    found = []
    given = adapters or models
    both, folder = (argument, "adapter"), (argument, argument)
    for source, name in zip(given, _folder_names(given, argument), strict=True):
        if adapters and source == "none":
            (name,) = _folder_names(models, argument)
            found.append(Checkpoint(name, models[0], arguments=both))
        elif adapters:
            found.append(Checkpoint(name, models[0], source, arguments=both))
        elif is_adapter(source):
            base, revision = base_of(source, argument)
            found.append(Checkpoint(name, base, source, revision, arguments=folder))
        else:
            found.append(Checkpoint(name, source, arguments=both))
    if len({checkpoint.name for checkpoint in found}) < len(found):
        raise ValueError(
            f"Two runs would share a folder: {', '.join(c.name for c in found)}. Rename one."
        )
    return found


def named_checkpoint(name: str | None, argument: str) -> Checkpoint | None:
    """The checkpoint that an argument names; None where it is left out."""
    return named_checkpoints([name], argument=argument)[0] if name else None


def check_checkpoints(checkpoints: list[Checkpoint], **others: str | None) -> None:
    """Refuse what would not load, before any rows are read.

    Args:
        checkpoints: The models to evaluate.
        **others: Further models, by the argument that names each; None where none is given.

    Raises:
        FileNotFoundError: A model or an adapter is not there.
        ValueError: `check_checkpoint` or `check_adapter` refuses a folder.
    """
    named = [named_checkpoint(given, argument) for argument, given in others.items()]
    for checkpoint in filter(None, [*checkpoints, *named]):
        of_model, of_adapter = checkpoint.arguments
        if checkpoint.adapter is not None:
            check_adapter(checkpoint.adapter, of_adapter)
            if of_model == of_adapter:  # the folder stands for the model
                check_base(checkpoint.adapter, of_model)
        if not checkpoint.model.startswith("builtin:"):
            path = local_path(checkpoint.model, of_model)
            if path is not None:
                own = checkpoint.adapter is not None and has_tokenizer(checkpoint.adapter)
                check_checkpoint(str(path), of_model, tokenizer=not own)


def _folder_names(names: list[str], argument: str) -> list[str]:
    """The last part of each name, or all of it where two would share a folder."""
    paths = [Path(name).expanduser() for name in names]
    short = [path.resolve().name if path.exists() else path.name for path in paths]
    short = short if len(set(short)) == len(short) else names
    if len(set(short)) < len(short):
        raise ValueError(f"`{argument}` or `adapter` names one twice: {', '.join(names)}.")
    return [name.strip("./~").replace("/", "-").replace(":", "-") for name in short]


def named_tokenizer(checkpoint: str, argument: str, **loading: Any) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`, whose errors name the argument.

    Raises:
        ValueError: The tokenizer does not load.
    """
    from transformers import AutoTokenizer

    with named_errors(f"`{argument}`: the tokenizer of {checkpoint} does not load"):
        return AutoTokenizer.from_pretrained(checkpoint, **loading)


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Say in one line what did not load, with the first line of the library's error.

    Raises:
        OSError: A file is missing, or the Hub cannot be reached.
        ValueError: Anything else.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        first = next(filter(None, str(error).splitlines()), type(error).__name__)
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{what}: {first}") from error


def load_model(
    checkpoint: str,
    adapter: str | None = None,
    arguments: tuple[str, str] = (MODEL, "adapter"),
    **loading: Any,
) -> Any:
    """A causal language model with its adapter; none of its weights is new.

    Args:
        checkpoint: What `resolve_checkpoint` returned.
        adapter: PEFT folder or hub id, or None.
        arguments: Names of the two in error messages.
        **loading: Arguments of `from_pretrained`.

    Raises:
        ValueError: The model lacks weights, or the adapter does not fit it.
    """
    from transformers import AutoModelForCausalLM

    loading = {"use_safetensors": True, **loading}
    load: Any = AutoModelForCausalLM.from_pretrained  # transformers types no tuple here
    with named_errors(f"`{arguments[0]}`: {origin_of(checkpoint)} does not load"):
        model, found = load(checkpoint, output_loading_info=True, **loading)
    refuse_new_weights(found, origin_of(checkpoint), arguments[0])
    if adapter is None:
        return model
    from peft import PeftModel

    folder = os.path.expanduser(adapter)
    fit_vocabulary(model, folder, bool(loading.get("trust_remote_code")))
    with named_errors(
        f"`{arguments[1]}`: {adapter} does not fit the model {origin_of(checkpoint)}"
    ):
        return PeftModel.from_pretrained(model, folder)


def fit_vocabulary(model: Any, adapter: str, trust_remote_code: bool = False) -> None:
    """Give a model as many embeddings as its adapter was trained with, where tokens were added.

    As many as the adapter has saved; else as its tokenizer has tokens, if those are more than the
    model has embeddings.

    Args:
        model: The base model.
        adapter: PEFT folder; from a hub id nothing is read.
        trust_remote_code: Run code of the tokenizer.
    """
    from safetensors import safe_open
    from transformers import AutoTokenizer

    embeddings = model.get_input_embeddings()
    rows, weights = embeddings.weight.shape[0], Path(adapter, "adapter_model.safetensors")
    wanted = rows
    if has_tokenizer(adapter):
        tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
        wanted = max(rows, len(tokenizer))
    if weights.is_file():
        (name,) = (name for name, module in model.named_modules() if module is embeddings)
        with safe_open(weights, "pt") as saved:
            if (key := f"base_model.model.{name}.weight") in saved.keys():  # noqa: SIM118
                wanted = saved.get_slice(key).get_shape()[0]
    if wanted != rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
