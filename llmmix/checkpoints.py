"""Which checkpoints a program was told to evaluate: names, fingerprints and models, loaded once."""

import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from llmmix.data import resolve_checkpoint
from llmmix.sample_log import checkpoint_id


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate.

    Attributes:
        name: Of its folder of results.
        model: As it was given.
        adapter: A PEFT folder, or None.
    """

    name: str
    model: str
    adapter: str | None = None


def named_checkpoints(models: list[str], adapters: list[str] | None = None) -> list[Checkpoint]:
    """One a model, or one an adapter of the only model; 'none' is the model alone.

    A folder that holds an adapter alone stands for it on the model that it names.

    Raises:
        ValueError: Adapters of several models, or a name twice.
    """
    if adapters and len(models) > 1:
        raise ValueError("`adapter` goes with one `model_name_or_path`, got several.")
    found = []
    given = adapters or models
    for source, name in zip(given, _folder_names(given), strict=True):
        if not adapters:
            found.append(Checkpoint(name, *_base_and_adapter(source)))
        elif source == "none":
            found.append(Checkpoint(_folder_names(models)[0], models[0]))
        else:
            found.append(Checkpoint(name, models[0], source))
    if len({checkpoint.name for checkpoint in found}) < len(found):
        raise ValueError(
            f"Two runs would share a folder: {', '.join(c.name for c in found)}. Rename one."
        )
    return found


def _base_and_adapter(source: str) -> tuple[str, str | None]:
    """A model, or the model below the adapter that a folder holds in place of one."""
    folder = Path(source)
    told = folder / "adapter_config.json"
    if not told.is_file() or (folder / "config.json").exists():
        return source, None
    return json.loads(told.read_text())["base_model_name_or_path"], source


def _folder_names(names: list[str]) -> list[str]:
    """The last part of each name, or all of it where two would share a folder."""
    short = [
        Path(name).resolve().name if Path(name).exists() else Path(name).name for name in names
    ]
    short = short if len(set(short)) == len(short) else names
    if len(set(short)) < len(short):
        raise ValueError(f"`model_name_or_path` or `adapter` names one twice: {', '.join(names)}.")
    return [name.strip("./").replace("/", "-").replace(":", "-") for name in short]


def evaluation_state() -> PartialState:
    """The processes of an evaluation: on a GPU where there is one, with all patience.

    Apple's GPUs are passed over: the sampling engine draws in fp64, which they lack.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # Shards finish at different times: nobody is to give up waiting
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    patience = {"timeout": timedelta(days=30)} if several else {}
    return PartialState(cpu=accelerator is None or accelerator.type == "mps", **patience)


class Loader:
    """Loads checkpoints, and holds one model at a time.

    Args:
        device: Where models go.
        dtype: Of the weights; "auto" for the checkpoint's own, and fp32 on a CPU.
        trust_remote_code: Run code of the checkpoint.
    """

    def __init__(self, device, dtype: str = "auto", trust_remote_code: bool = False):
        # bf16 is several times slower than fp32 on most processors
        self.dtype = "float32" if dtype == "auto" and device.type == "cpu" else dtype
        self.device, self.trust_remote_code = device, trust_remote_code
        self._held: tuple = (None, None)

    def fingerprint(self, checkpoint: Checkpoint) -> dict:
        """What tells its weights, as they are loaded, from any others."""
        from transformers import AutoConfig

        path = resolve_checkpoint(checkpoint.model)
        config = AutoConfig.from_pretrained(path, trust_remote_code=self.trust_remote_code)
        adapter = checkpoint.adapter
        return {
            "model": checkpoint_id(path, getattr(config, "_commit_hash", None)),
            "adapter": checkpoint_id(adapter) if adapter else None,
            "dtype": self.dtype,
        }

    def tokenizer(self, checkpoint: Checkpoint):
        """The tokenizer of the model."""
        from transformers import AutoTokenizer

        path = resolve_checkpoint(checkpoint.model)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=self.trust_remote_code)

    def model(self, checkpoint: Checkpoint):
        """The model with its adapter; any other that was held is let go."""
        return self.held(checkpoint, lambda: self._load(checkpoint))

    def held(self, key, make: Callable):
        """What is held under a key, or is made now and held in place of what was."""
        if self._held[0] != key:
            self.let_go()
            self._held = (key, make())
        return self._held[1]

    def let_go(self) -> None:
        """Hold nothing."""
        self._held = (None, None)
        gc.collect()  # a model with the fused head refers to itself

    def _load(self, checkpoint: Checkpoint):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            resolve_checkpoint(checkpoint.model),
            dtype=self.dtype,
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
        )
        if checkpoint.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, checkpoint.adapter)
        return model.to(self.device)
