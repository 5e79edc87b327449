"""What a saved model says of itself: its base and its method, in its card and its adapter's config.

TRL's card names a base of the Hub alone, and a method of its own. PEFT writes down the folder that
a base was loaded from, which for a built-in or a `.gguf` file is a folder of the cache.
"""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer

from llmmix.checkpoints.adapters import ADAPTER_CONFIG
from llmmix.checkpoints.folders import origin_of
from llmmix.files import read_json, write_whole

NO_BASE = "[None](https://huggingface.co/None)"  # what TRL writes for a base of no hub id
NO_MODEL = 'model="None"'  # and for a model that is not pushed


def sign(trainer: Trainer, method: str | None = None, paper: tuple[str, str] | None = None) -> None:
    """Have what a trainer saves name its base as the user knows it, and its method.

    Args:
        trainer: A trainer of TRL, before `train()`; on another, nothing is done.
        method: What it trains with, where that is not what TRL's card would say.
        paper: Title and arXiv id of the method's paper.
    """
    signed: Any = trainer
    if not hasattr(trainer, "_paper"):
        return
    if method is not None:
        signed._name = method
        signed._paper = {"title": paper[0], "id": paper[1]} if paper else {}
    if "create_model_card" in vars(trainer):  # signed already
        return
    own_card, own_save = trainer.create_model_card, trainer.save_model

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        own_card(*args, **kwargs)
        _name_base(trainer, trainer.args.output_dir)

    def save_model(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        own_save(output_dir, *args, **kwargs)
        _name_base(trainer, output_dir or trainer.args.output_dir)

    # On the instance alone: other trainers of the class keep theirs
    signed.create_model_card, signed.save_model = create_model_card, save_model


def _name_base(trainer: Trainer, folder: str | None) -> None:
    """Name the base in the card and the adapter's config of a folder, where there are such."""
    model: Any = trainer.model
    loaded = getattr(model.config, "name_or_path", "")
    if not loaded or folder is None or not trainer.is_world_process_zero():
        return
    base = origin_of(loaded)
    card, config = Path(folder, "README.md"), Path(folder, ADAPTER_CONFIG)
    if card.is_file():
        text = card.read_text(encoding="utf-8").replace(NO_BASE, f"`{base}`")
        text = text.replace(NO_MODEL, f'model="{folder}"')
        write_whole(card, text if base == loaded else text.replace(loaded, base))
    given = read_json(config)
    if base != loaded and given and given.get("base_model_name_or_path") == loaded:
        write_whole(config, json.dumps(given | {"base_model_name_or_path": base}, indent=2))
