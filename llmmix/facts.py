"""What a run was, for its report: `run.json` in its folder, as written when training has ended."""

import json
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import Trainer

from llmmix.checkpoints.folders import origin_of
from llmmix.files import read_json, write_whole

RUN = "run.json"


def note_run(trainer: Trainer) -> None:
    """Write what a trainer has trained, and how, into its folder."""
    args, state = trainer.args, trainer.state
    loaded = getattr(trainer.accelerator.unwrap_model(trainer.model), "name_or_path", None)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    facts: dict[str, Any] = {
        "method": _method(trainer),
        "model": loaded and origin_of(loaded),
        "training rows": _length(trainer.train_dataset),
        "evaluation rows": _length(trainer.eval_dataset),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 2),
        "rows a step": batch,
        "learning rate": args.learning_rate,
        "seed": args.seed,
    }
    if getattr(args, "padding_free", False):
        facts["padding free"] = True
    facts |= _own_settings(args)
    facts = {name: value for name, value in facts.items() if value not in (None, "")}
    write_whole(Path(str(args.output_dir), RUN), json.dumps(facts, indent=1, default=str))


def read_facts(folder: Path) -> dict[str, str]:
    """What `note_run` wrote into a folder, and when training ended there; {} if unknown."""
    facts = {name: _shown(value) for name, value in (read_json(folder / RUN) or {}).items()}
    state = folder / "trainer_state.json"
    if state.exists():
        facts["ended"] = f"{datetime.fromtimestamp(state.stat().st_mtime):%Y-%m-%d %H:%M}"
    return facts


def _method(trainer: Trainer) -> str:
    """The method by its trainer, and its loss of a token where that is not cross-entropy."""
    name = type(trainer).__name__.removesuffix("Trainer")
    loss = getattr(trainer.args, "loss_type", None)
    return f"{name} ({loss})" if isinstance(loss, str) and loss != "nll" else name


def _length(rows: Any) -> int | None:
    if isinstance(rows, dict):
        lengths = [_length(part) for part in rows.values()]
        return sum(size for size in lengths if size) or None
    return len(rows) if hasattr(rows, "__len__") else None


def _own_settings(args: Any) -> dict[str, Any]:
    """The fields that a config of ours adds to TRL's or transformers'."""
    theirs = next(c for c in type(args).__mro__ if not c.__module__.startswith("llmmix"))
    known = {field.name for field in fields(theirs)}
    own = [field.name for field in fields(args) if field.name not in known]
    return {name.replace("_", " "): getattr(args, name) for name in own}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
