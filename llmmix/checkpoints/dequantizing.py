"""GGUF files: dequantized into an ordinary checkpoint, whole or not at all."""

import logging
import re
from pathlib import Path
from typing import Any

import torch

from llmmix.checkpoints.folders import refuse_new_weights
from llmmix.files import built_once, file_digest
from llmmix.processes import save_on_any_rank

logger = logging.getLogger(__name__)

SHARD = re.compile(r"-(\d+)-of-(\d+)\.gguf$", re.IGNORECASE)


def dequantized(path: Path, argument: str) -> Path:
    """The folder in the cache with a GGUF file's model in fp32 and its tokenizer.

    Args:
        path: The file.
        argument: Name of the model in error messages.

    Raises:
        ValueError: The file is one of several shards, is not GGUF or not whole, is of an
            architecture that transformers does not read, or lacks tensors.
    """
    named = SHARD.search(path.name)
    if named and int(named[2]) > 1:
        _refuse_shard(path, int(named[1]), int(named[2]), argument)
    return built_once(
        f"gguf/{file_digest(path)}", lambda out: _dequantize(path.resolve(), out, argument)
    )


def _refuse_shard(path: Path, number: int, count: int, argument: str) -> None:
    raise ValueError(
        f"`{argument}`: {path} is shard {number} of {count}. Join them with llama.cpp: "
        "llama-gguf-split --merge FIRST_SHARD.gguf WHOLE.gguf"
    )


def _dequantize(path: Path, out: Path, argument: str) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        fields = GGUFReader(path).fields
        numbers = [fields[key].contents() for key in ("split.no", "split.count") if key in fields]
    except Exception as error:  # gguf has no error of its own: struct, numpy and others raise
        raise ValueError(f"`{argument}`: {path} is not a whole GGUF file ({error}).") from error
    if len(numbers) == 2 and numbers[1] > 1:
        _refuse_shard(path, numbers[0] + 1, numbers[1], argument)
    logger.warning("Dequantizing %s to fp32; this is done once.", path.name)
    # Any: transformers types no tuple here
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, found = load(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        (first, *_) = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"`{argument}`: transformers cannot read {path} ({first}). Convert it to a folder of "
            "safetensors, or take the original model."
        ) from error
    refuse_new_weights(found, str(path), argument)
    # The weights are dequantized on load, but the model still calls itself quantized and refuses
    # to be saved or trained
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    save_on_any_rank(model, out)
    tokenizer.save_pretrained(out)
