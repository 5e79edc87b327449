"""Checkpoints and their tokenizers: found by name, loaded once, and put to use.

A model is a hub id, a folder, a `.gguf` file or `builtin:tiny`. llmmix/checkpoints/ tells
where it is and whether it is whole.
"""

import gc
import logging
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import has_file

from llmmix.builtin.tiny import tiny_checkpoint
from llmmix.checkpoints.adapters import Checkpoint as Checkpoint  # scripts take these from here
from llmmix.checkpoints.adapters import (
    base_of,
    is_adapter,
    load_model,
    named_errors,
    named_tokenizer,
)
from llmmix.checkpoints.adapters import check_checkpoints as check_checkpoints
from llmmix.checkpoints.adapters import named_checkpoints as named_checkpoints
from llmmix.checkpoints.dequantizing import dequantized
from llmmix.checkpoints.folders import MODEL, check_checkpoint, local_path, made_from
from llmmix.files import checkpoint_id

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from trl import DPOConfig, ModelConfig, SFTConfig

logger = logging.getLogger(__name__)


def resolve_checkpoint(name: str | os.PathLike[str], argument: str = MODEL) -> str:
    """A name that `from_pretrained` takes: built-ins are built, GGUF files dequantized.

    Args:
        name: Hub id, folder, `.gguf` file or `builtin:tiny`; `~` is the home folder.
        argument: Name of `name` in error messages.

    Returns:
        `name` itself, its folder, or one in the cache.

    Raises:
        ValueError: `name` is an unknown built-in, a file that is not `.gguf`, or a `.gguf` file
            that does not load whole.
        FileNotFoundError: `name` is a file or folder that does not exist.
    """
    name = os.fspath(name)
    if name.startswith("builtin:"):
        if name != "builtin:tiny":
            raise ValueError(f"`{argument}`: no built-in {name!r}; there is builtin:tiny.")
        return made_from(name, tiny_checkpoint(name))
    path = local_path(name, argument)
    if path is None:
        return name
    if path.is_dir():
        return str(path)
    if path.suffix.lower() != ".gguf":
        raise ValueError(
            f"`{argument}`: {name} is a file, and no .gguf: name the folder that it is in."
        )
    return made_from(str(path.resolve()), dequantized(path, argument))


def trainable_checkpoint(
    name: str | os.PathLike[str],
    argument: str = MODEL,
    *,
    safetensors: bool = True,
    tokenizer: bool = True,
) -> str:
    """`resolve_checkpoint` for training, which an adapter's folder or half a model cannot begin.

    Args:
        name: See `resolve_checkpoint`.
        argument: Name of `name` in error messages.
        safetensors: Whether weights are read from safetensors alone.
        tokenizer: Whether its tokenizer is to be loaded.

    Raises:
        FileNotFoundError: As `resolve_checkpoint` does.
        ValueError: So too; or the folder holds an adapter alone, or `check_checkpoint` refuses it.
    """
    checkpoint = resolve_checkpoint(name, argument)
    if is_adapter(checkpoint):
        base, _ = base_of(checkpoint, argument)
        raise ValueError(
            f"`{argument}`: {name} holds an adapter alone, of {base or 'no base'}. To train on "
            "from it, merge it first (`merge_and_unload` of peft, then `save_pretrained`) and name "
            "what you saved. To go on with its own run, use `resume_from_checkpoint`."
        )
    check_checkpoint(checkpoint, argument, safetensors=safetensors, tokenizer=tokenizer)
    return checkpoint


def prepare_model_args(model_args: "ModelConfig", training_args: "SFTConfig | DPOConfig") -> str:
    """Resolve the model's name and fill `training_args.model_init_kwargs`, as TRL's scripts do.

    Weights load from safetensors alone unless `model_init_kwargs` says otherwise.

    Returns:
        The checkpoint to hand to a trainer.

    Raises:
        ValueError: No model was named, or `trainable_checkpoint` refuses it.
        FileNotFoundError: The model or `chat_template_path` is a file or folder that does not
            exist.
    """
    if model_args.model_name_or_path is None:
        raise ValueError(
            "`model_name_or_path` is missing: a hub id, a folder, a .gguf file or builtin:tiny."
        )
    loading: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,
        **(training_args.model_init_kwargs or {}),  # type: ignore[dict-item]  # never text here
    }
    training_args.model_init_kwargs = loading
    if template := getattr(training_args, "chat_template_path", None):
        there = local_path(template, "chat_template_path")
        training_args.chat_template_path = str(there or template)  # type: ignore[union-attr]
    safetensors = loading["use_safetensors"] is True
    return trainable_checkpoint(model_args.model_name_or_path, safetensors=safetensors)


def load_tokenizer(
    checkpoint: str, model_args: "ModelConfig", training_args: "SFTConfig | DPOConfig"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that `prepare_model_args` returned.

    Raises:
        ValueError: It does not load.
    """
    return named_tokenizer(
        checkpoint,
        MODEL,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )


def tokenizer_of(
    checkpoint: Checkpoint, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template that an adapter brings, and for what it lacks the model's.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: The tokenizer does not load.
    """
    of_model, of_adapter = checkpoint.arguments
    folder = None if checkpoint.adapter is None else os.path.expanduser(checkpoint.adapter)
    if folder is not None and has_file(folder, "tokenizer_config.json"):
        return named_tokenizer(folder, of_adapter, trust_remote_code=trust_remote_code)
    tokenizer = named_tokenizer(
        resolve_checkpoint(checkpoint.model, of_model),
        of_model,
        revision=checkpoint.revision,
        trust_remote_code=trust_remote_code,
    )
    if folder is not None and (template := Path(folder, "chat_template.jinja")).is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def load_checkpoint(checkpoint: Checkpoint, **loading: Any) -> Any:
    """The model with its adapter, none of whose weights is new.

    Args:
        checkpoint: The model and the adapter.
        **loading: Arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: The model lacks weights, or the adapter does not fit it.
    """
    path = resolve_checkpoint(checkpoint.model, checkpoint.arguments[0])
    revision = checkpoint.revision
    return load_model(path, checkpoint.adapter, checkpoint.arguments, revision=revision, **loading)


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

        path = resolve_checkpoint(checkpoint.model, checkpoint.arguments[0])
        with named_errors(f"`{checkpoint.arguments[0]}`: {checkpoint.model} does not load"):
            config = AutoConfig.from_pretrained(
                path, revision=checkpoint.revision, trust_remote_code=self.trust_remote_code
            )
        adapter = checkpoint.adapter
        return {
            "model": checkpoint_id(path, getattr(config, "_commit_hash", None)),
            "adapter": checkpoint_id(os.path.expanduser(adapter)) if adapter else None,
            "dtype": self.dtype,
        }

    def tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
        """The tokenizer of the adapter if it has one, else of the model."""
        return tokenizer_of(checkpoint, self.trust_remote_code)

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
        model = load_checkpoint(
            checkpoint, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
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
