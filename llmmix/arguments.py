"""What a trainer of ours is given, in TRL's order: made its own, or refused before anything loads.

TRL's trainers turn `TrainingArguments` into their config. Ours do so too, and with the TRL config
that theirs extends: what is new in ours takes its default.
"""

from dataclasses import fields
from os import PathLike
from typing import Any, TypeVar

from transformers import TrainingArguments

from llmmix.head import causal_lm
from llmmix.models import trainable_checkpoint
from llmmix.rows.formats import check_rows_type

Config = TypeVar("Config", bound=TrainingArguments)


def own_config(args: Any, config: type[Config], output_dir: str) -> Config:
    """The settings of a trainer, in its own config.

    Args:
        args: Settings in that config, or in one that it extends; None for the defaults.
        config: Class of the trainer's config.
        output_dir: Where the defaults write to.

    Returns:
        `args` itself if it is a `config`, else its settings in a new one.

    Raises:
        TypeError: `args` is neither, or has a field that `config` lacks.
    """
    if args is None:
        return config(output_dir)
    if isinstance(args, config):
        return args
    accepted = f"`args` must be {config.__name__}, or a config that it extends"
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"{accepted}, got {type(args).__name__}.")
    settings = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    if foreign := sorted(settings.keys() - {field.name for field in fields(config)}):
        raise TypeError(
            f"{accepted}, got {type(args).__name__}, whose `{foreign[0]}` it lacks: give "
            f"{config.__name__}, or a subclass of it."
        )
    return config(**settings)


def own_model(model: Any, args: Any, tokenizer: Any = None) -> Any:
    """What TRL takes for a trainer's `model`: a loaded one as it is, a name resolved.

    Args:
        model: A model, or what a recipe's `model_name_or_path` may be: a hub id, a folder, a
            `.gguf` file or `builtin:tiny`, as text or path.
        args: The trainer's settings.
        tokenizer: The tokenizer that the trainer was given; None: the checkpoint must have one.

    Raises:
        ValueError: `trainable_checkpoint` refuses it.
        FileNotFoundError: There is no such file or folder.
    """
    if not isinstance(model, str | PathLike):
        return model
    safetensors = (args.model_init_kwargs or {}).get("use_safetensors") is True
    return trainable_checkpoint(
        model, "model", safetensors=safetensors, tokenizer=tokenizer is None
    )


def check_types(model: Any, train_dataset: Any, others: dict[str, Any]) -> None:
    """Refuse a model, collator or dataset of another type, such as what stands in its place.

    Args:
        model: A model, or its name.
        train_dataset: The training rows.
        others: The trainer's other arguments, by name.

    Raises:
        TypeError: One of them is of a type that no trainer takes.
    """
    if not isinstance(model, str | PathLike):
        causal_lm(model)
    if (reference := others.get("ref_model")) is not None:
        causal_lm(reference, "ref_model")
    collator = others.get("data_collator")
    if collator is not None and not callable(collator):
        raise TypeError(
            "`data_collator` must be a function that makes a batch of rows, got "
            f"{type(collator).__name__}. As in TRL it comes before `train_dataset`: give both by "
            "name."
        )
    evaluated = others.get("eval_dataset")
    named = evaluated if isinstance(evaluated, dict) else {None: evaluated}
    rows = {"train_dataset": train_dataset} | {
        "eval_dataset" + ("" if name is None else f"[{name!r}]"): part
        for name, part in named.items()
    }
    for name, part in rows.items():
        if part is not None:
            check_rows_type(part, name)
