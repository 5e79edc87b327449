"""Loading models and datasets by name, and checking rows before a trainer sees them.

A model is a hub id, a folder, a `.gguf` file or `builtin:tiny`. A dataset is a hub id, a folder, a
`.json`, `.jsonl`, `.csv` or `.parquet` file, `builtin:math`, `builtin:preferences`,
`builtin:authors` or `builtin:domains`.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset

from llmmix import builtin
from llmmix.cache import built_once, file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments
    from trl import ModelConfig, ScriptArguments, SFTConfig

logger = logging.getLogger(__name__)

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

SFT_FORMATS = (
    "prompt-completion rows (`prompt`, `completion`: text or lists of messages), chat rows "
    "(`messages`), text rows (`{text_field}`), or tokenized rows (`input_ids`)"
)
PREFERENCE_FORMATS = (
    "`chosen` and `rejected` (text or lists of messages), with or without a `prompt` of their kind"
)


def resolve_checkpoint(name: str) -> str:
    """A name that `from_pretrained` takes: built-ins are built, GGUF files dequantised.

    Args:
        name: Hub id, folder, `.gguf` file or `builtin:tiny`.

    Returns:
        `name` itself, or a folder in the cache.

    Raises:
        ValueError: An unknown built-in.
        FileNotFoundError: A `.gguf` file that is not there.
    """
    if name.startswith("builtin:"):
        return str(builtin.tiny_checkpoint(name))
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`model_name_or_path`: no file {name}.")
        return str(built_once(f"gguf/{file_digest(path)}", lambda out: _dequantise(path, out)))
    return name


def _dequantise(path: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.warning("Dequantising %s to fp32; this is done once.", path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # The weights are dequantised on load, but the model still calls itself quantised and refuses
    # to be saved or trained
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)


def prepare_model_args(model_args: "ModelConfig", training_args: "TrainingArguments") -> str:
    """Resolve the model's name and fill `training_args.model_init_kwargs`, as TRL's scripts do.

    Weights load from safetensors alone unless `model_init_kwargs` says otherwise.

    Returns:
        The checkpoint to hand to a trainer.

    Raises:
        ValueError: No model was named.
    """
    if model_args.model_name_or_path is None:
        raise ValueError(
            "`model_name_or_path` is missing: a hub id, a folder, a .gguf file or builtin:tiny."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,
        **(training_args.model_init_kwargs or {}),
    }
    return resolve_checkpoint(model_args.model_name_or_path)


def default_to_cpu(args: "TrainingArguments") -> None:
    """Where there is no accelerator, say so: settings left open take what suits a CPU.

    Without `use_cpu`, accelerate lets every process of a torchrun train alone; with it they run DDP
    over gloo. bf16 is several times slower than fp32 on most processors. Called by a config
    before its parent's `__post_init__`.
    """
    import torch

    if torch.accelerator.is_available():
        return
    args.use_cpu, args.dataloader_pin_memory = True, False
    if args.bf16 is None:
        args.bf16 = False


def load_tokenizer(
    checkpoint: str, model_args: "ModelConfig", training_args: "TrainingArguments"
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint that `prepare_model_args` returned."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        checkpoint,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )


def checkpoint_to_resume(training_args: "TrainingArguments") -> str | bool | None:
    """What `--resume_from_checkpoint` asks for: a folder, or `true` for the last one of the run."""
    given = training_args.resume_from_checkpoint
    return given.lower() == "true" if str(given).lower() in ("true", "false") else given


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """All splits of a dataset.

    Args:
        name: Hub id, folder, file or built-in.
        config: Configuration of a hub dataset, or of a built-in: `llmmix.builtin.dataset`.
        streaming: Load an `IterableDataset` where the source allows it.

    Raises:
        FileNotFoundError: A file that is not there, or the text of `builtin:domains`.
        ValueError: A file of another format, or an unknown built-in.
    """
    if name.startswith("builtin:"):
        return builtin.dataset(name, config)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(path)
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        return datasets.load_dataset(str(path), name=config, streaming=streaming)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(
                f"`dataset_name`: {name} is not one of {', '.join(FILE_FORMATS)}; convert it first."
            )
        return datasets.load_dataset(
            FILE_FORMATS[path.suffix], data_files=str(path), streaming=streaming
        )
    if path.suffix in FILE_FORMATS or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"`dataset_name`: no file or folder {name}.")
    return datasets.load_dataset(name, name=config, streaming=streaming)


def load_train_and_eval(
    script_args: "ScriptArguments", training_args: "TrainingArguments"
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training split, and the test split when `eval_strategy` asks for one.

    Raises:
        ValueError: No dataset was named, or it has no such split.
    """
    name = _named(script_args.dataset_name)
    splits = load_splits(name, script_args.dataset_config, script_args.dataset_streaming)
    train = _split(splits, script_args.dataset_train_split, "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train, None
    return train, _split(splits, script_args.dataset_test_split, "dataset_test_split")


def _named(dataset_name: str | None) -> str:
    if dataset_name is None:
        raise ValueError(
            "`dataset_name` is missing: give a hub id, a folder, a file or a built-in such as "
            "builtin:math."
        )
    return dataset_name


def load_role(
    name: str | None, role: str, *, split: str = "train", config: str | None = None
) -> Dataset | IterableDataset:
    """The rows that play a role, such as "forget" or "retain".

    Args:
        name: As for `load_splits`, or NAME@CONFIG, whose configuration then counts.
        role: Also the name of the split to take, where there is one and `split` names no other.
        split: The split; of a dataset that has a single one, "train" stands for it.
        config: As for `load_splits`.

    Raises:
        ValueError: No dataset was named, or it has no such split.
    """
    name = _named(name)
    if "@" in name and not Path(name).exists():
        name, _, config = name.partition("@")
    splits = load_splits(name, config)
    if split == "train" and role in splits:
        split = role
    elif split == "train" and len(splits) == 1:
        split = next(iter(splits))
    return _split(splits, split, f"{role}: dataset_split")


def _split(splits: DatasetDict, name: str, argument: str):
    if name not in splits:
        raise ValueError(f"`{argument}`: no split {name!r}; the dataset has {list(splits)}.")
    return splits[name]


def check_sft_datasets(args: "SFTConfig", train_dataset, trainer_arguments: dict):
    """`check_sft_dataset` on what an SFT trainer was given; the evaluation rows are replaced.

    Returns:
        The training rows.
    """
    if trainer_arguments.get("formatting_func") is not None:
        return train_dataset  # it makes the text itself, from columns of any name
    tokenizer = None if args.chat_template_path else trainer_arguments.get("processing_class")
    if isinstance(rows := trainer_arguments.get("eval_dataset"), Dataset):
        trainer_arguments["eval_dataset"] = check_sft_dataset(
            rows, "eval_dataset", args.dataset_text_field, tokenizer
        )
    train_dataset = check_sft_dataset(
        train_dataset, "train_dataset", args.dataset_text_field, tokenizer
    )
    if not args.assistant_only_loss and "messages" in next(iter(train_dataset)):
        warn_once(
            "Rows of `messages` are scored whole, the user's turns included. To score responses "
            "alone, set `assistant_only_loss=True` or give `prompt` and `completion`."
        )
    return train_dataset


def check_preference_datasets(train_dataset, trainer_arguments: dict):
    """`check_preference_dataset` on what a trainer was given; the evaluation rows are replaced.

    Returns:
        The training rows.
    """
    tokenizer = trainer_arguments.get("processing_class")
    if isinstance(rows := trainer_arguments.get("eval_dataset"), Dataset):
        trainer_arguments["eval_dataset"] = check_preference_dataset(
            rows, "eval_dataset", tokenizer
        )
    return check_preference_dataset(train_dataset, "train_dataset", tokenizer)


def check_sft_dataset(
    dataset: Dataset | IterableDataset | None,
    argument: str,
    text_field: str = "text",
    processing_class: "PreTrainedTokenizerBase | None" = None,
) -> Dataset | IterableDataset:
    """Refuse what `SFTTrainer` cannot train on, and drop rows with an empty completion.

    The number of rows dropped is logged. A streaming dataset is checked by its first row alone.

    Raises:
        ValueError: No dataset, no rows, columns of no accepted format, chat rows without a chat
            template, or no row left.
    """
    formats = SFT_FORMATS.format(text_field=text_field)
    first = _first_row(dataset, argument, formats)
    columns = set(first)
    if "input_ids" in columns or {"image", "images"} & columns:
        return dataset
    if {"prompt", "completion"} <= columns:
        response = "completion"
    elif columns & {"messages", "conversations"}:
        response = "messages" if "messages" in columns else "conversations"
    elif text_field in columns:
        response = text_field
    else:
        steps = "`steps` are split by llmmix.steps.split_steps (`--stepwise true` of dco). "
        raise ValueError(
            f"`{argument}` has the columns {sorted(columns)}; accepted are {formats}. "
            f"{steps if 'steps' in columns else ''}Rename the columns to one of these."
        )
    _check_template(first[response], argument, processing_class)
    return _drop_blank(dataset, [response], argument)


def check_preference_dataset(
    dataset: Dataset | IterableDataset | None,
    argument: str,
    processing_class: "PreTrainedTokenizerBase | None" = None,
) -> Dataset | IterableDataset:
    """Refuse what `DPOTrainer` cannot train on, and drop rows with an empty response.

    Raises:
        ValueError: As `check_sft_dataset`.
    """
    first = _first_row(dataset, argument, PREFERENCE_FORMATS)
    if not {"chosen", "rejected"} <= set(first):
        raise ValueError(
            f"`{argument}` has the columns {sorted(first)}; accepted are {PREFERENCE_FORMATS}. "
            "Rename the columns to these."
        )
    _check_template(first["chosen"], argument, processing_class)
    return _drop_blank(dataset, ["chosen", "rejected"], argument)


def log_dropped(
    before: Dataset | IterableDataset, after: Dataset | IterableDataset, max_length: int | None
) -> None:
    """Say how many rows the trainer dropped because `max_length` left no token to score, or cut.

    Raises:
        ValueError: No row is left.
    """
    if not isinstance(before, Dataset) or not isinstance(after, Dataset):
        return
    if len(after) == 0:
        raise ValueError(
            f"`max_length={max_length}` leaves no row of {len(before)} with a token to train on: "
            "the prompts alone are as long. Raise `max_length`."
        )
    if dropped := len(before) - len(after):
        warn_once(
            f"Dropped {dropped} of {len(before)} rows: with max_length={max_length} no token of "
            "the response is left."
        )
    if max_length is not None and "input_ids" in after.column_names:
        ids = after.select_columns("input_ids").with_format("arrow")
        lengths = (len(row) for row in ids[:]["input_ids"])
        if full := sum(length >= max_length for length in lengths):
            warn_once(
                f"{full} of {len(after)} rows fill max_length={max_length} and may be cut short."
            )


def warn_once(message: str) -> None:
    """Log a warning once, not on every rank."""
    if PartialState().is_main_process:
        logger.warning(message)


def _first_row(dataset, argument: str, formats: str) -> dict:
    if dataset is None:
        raise ValueError(f"`{argument}` is required: a dataset of {formats}.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{argument}` is empty; give at least one row of {formats}.")
    return first


def _check_template(response, argument: str, processing_class) -> None:
    if processing_class is None or isinstance(response, str):
        return
    if processing_class.chat_template is None:
        raise ValueError(
            f"`{argument}` holds chat messages, but the tokenizer has no chat template. Set "
            "`chat_template_path` to one, or use text rows."
        )


def _drop_blank(dataset, columns: list[str], argument: str):
    if not isinstance(dataset, Dataset):
        return dataset
    filled = dataset.filter(
        lambda *responses: not any(map(_is_blank, responses)),
        input_columns=columns,
        desc=f"Checking {argument}",
    )
    if dropped := len(dataset) - len(filled):
        what = " or ".join(f"`{column}`" for column in columns)
        if not len(filled):
            raise ValueError(f"`{argument}`: {what} is empty in every one of {len(dataset)} rows.")
        warn_once(f"Dropped {dropped} of {len(dataset)} rows with an empty {what}.")
        return filled
    return dataset  # not the filtered copy, whose indices would slow every later read


def _is_blank(response) -> bool:
    """No text, or no message of the assistant with something in it."""
    if response is None or isinstance(response, str):
        return not (response or "").strip()
    asked = ("system", "developer", "user", "human", "tool")
    said = [m for m in response if m.get("role", m.get("from")) not in asked]
    return not any(
        m.get("tool_calls") or not _is_empty(m.get("content", m.get("value"))) for m in said
    )


def _is_empty(content) -> bool:
    return not content.strip() if isinstance(content, str) else not content
