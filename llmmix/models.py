"""Checkpoints and their tokenizers: found by name, told apart, loaded once, and put to use.

A model is a hub id, a folder, a `.gguf` file or `builtin:tiny`.
"""

import gc
import json
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.builtin.tiny import tiny_checkpoint
from llmmix.files import built_once, checkpoint_id, file_digest
from llmmix.processes import save_on_any_rank

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import DPOConfig, ModelConfig, SFTConfig

logger = logging.getLogger(__name__)


def resolve_checkpoint(name: str) -> str:
    """A name that `from_pretrained` takes: built-ins are built, GGUF files dequantized.

    Args:
        name: Hub id, folder, `.gguf` file or `builtin:tiny`.

    Returns:
        `name` itself, or a folder in the cache.

    Raises:
        ValueError: `name` is an unknown built-in.
        FileNotFoundError: `name` is a `.gguf` file that does not exist.
    """
    if name.startswith("builtin:"):
        return str(tiny_checkpoint(name))
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`model_name_or_path`: no file {name}.")
        return str(built_once(f"gguf/{file_digest(path)}", lambda out: _dequantize(path, out)))
    return name


def _dequantize(path: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.warning("Dequantizing %s to fp32; this is done once.", path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # The weights are dequantized on load, but the model still calls itself quantized and refuses
    # to be saved or trained
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    save_on_any_rank(model, out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)


def prepare_model_args(model_args: "ModelConfig", training_args: "SFTConfig | DPOConfig") -> str:
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
        **(training_args.model_init_kwargs or {}),  # type: ignore[dict-item]  # never text here
    }
    return resolve_checkpoint(model_args.model_name_or_path)


def load_tokenizer(
    checkpoint: str, model_args: "ModelConfig", training_args: "SFTConfig | DPOConfig"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that `prepare_model_args` returned."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        checkpoint,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate.

    Attributes:
        name: Name of its folder of results.
        model: The model as it was given: hub id, folder, `.gguf` file or built-in.
        adapter: A PEFT folder, or None.
    """

    name: str
    model: str
    adapter: str | None = None


def named_checkpoints(models: list[str], adapters: list[str] | None = None) -> list[Checkpoint]:
    """A checkpoint for each model, or for each adapter of the only model.

    The adapter 'none' is the model alone. A model that is a folder with only an adapter stands for
    the adapter on the base model that it names.

    Raises:
        ValueError: Adapters are given for several models, or two runs have one name.
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
    """A model and None; or, for a folder with only an adapter, its base model and the folder."""
    folder = Path(source)
    config = folder / "adapter_config.json"
    if not config.is_file() or (folder / "config.json").exists():
        return source, None
    return json.loads(config.read_bytes())["base_model_name_or_path"], source


def _folder_names(names: list[str]) -> list[str]:
    """The last part of each name, or all of it where two would share a folder."""
    short = [
        Path(name).resolve().name if Path(name).exists() else Path(name).name for name in names
    ]
    short = short if len(set(short)) == len(short) else names
    if len(set(short)) < len(short):
        raise ValueError(f"`model_name_or_path` or `adapter` names one twice: {', '.join(names)}.")
    return [name.strip("./").replace("/", "-").replace(":", "-") for name in short]


class Loader:
    """Loads checkpoints, and holds one model at a time.

    Args:
        device: Where models go.
        dtype: Precision of the weights; "auto" for the checkpoint's own, and fp32 on a CPU.
        trust_remote_code: Run code of the checkpoint.
    """

    def __init__(self, device: torch.device, dtype: str = "auto", trust_remote_code: bool = False):
        # bf16 is several times slower than fp32 on most processors
        self.dtype = "float32" if dtype == "auto" and device.type == "cpu" else dtype
        self.device, self.trust_remote_code = device, trust_remote_code
        self._held: tuple[Hashable, Any] = (None, None)

    def fingerprint(self, checkpoint: Checkpoint) -> dict[str, str | None]:
        """The identity of a checkpoint's weights, as they are loaded."""
        from transformers import AutoConfig

        path = resolve_checkpoint(checkpoint.model)
        config = AutoConfig.from_pretrained(path, trust_remote_code=self.trust_remote_code)
        adapter = checkpoint.adapter
        return {
            "model": checkpoint_id(path, getattr(config, "_commit_hash", None)),
            "adapter": checkpoint_id(adapter) if adapter else None,
            "dtype": self.dtype,
        }

    def tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        from transformers import AutoTokenizer

        path = resolve_checkpoint(checkpoint.model)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=self.trust_remote_code)

    def model(self, checkpoint: Checkpoint) -> Any:
        """The model with its adapter; any other model that was held is let go."""
        return self.held(checkpoint, lambda: self._load(checkpoint))

    def held(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The model held under a key; if that is another one, or none, make it and hold it."""
        if self._held[0] != key:
            self.let_go()
            self._held = (key, make())
        return self._held[1]

    def let_go(self) -> None:
        """Give up what is held, and free its memory."""
        if self._held[1] is not None:  # collecting garbage takes a second or so
            self._held = (None, None)
            free_memory()

    def _load(self, checkpoint: Checkpoint) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve_checkpoint(checkpoint.model),
            dtype=self.dtype,
            use_safetensors=True,
            trust_remote_code=self.trust_remote_code,
        )
        if checkpoint.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, checkpoint.adapter)
        return model.to(self.device)


def free_memory() -> None:
    """Free the memory of deleted models."""
    gc.collect()  # a model with the fused head refers to itself
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def context_length(model: Any) -> int | None:
    """The most tokens that a model, or a `vllm.LLM`, reads at once; None if it does not say."""
    if hasattr(model, "llm_engine"):
        return model.llm_engine.model_config.max_model_len
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def configs_of(model: torch.nn.Module) -> "list[PreTrainedConfig]":
    """The configurations of a model and of its parts, each once."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    return list({id(config): config for config in configs}.values())


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and restore each one's own mode at the end.

    `model.train()` would put all of them in training mode.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
