"""The reference answers of rows, and the loss of a model on their reference completions.

The answers are what samples are judged against; the loss of the completions stands beside pass@N.
"""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmmix.head import attach_head
from llmmix.precision import evaluating
from llmmix.prompts import encode


def reference_answers(dataset: Dataset) -> list[str]:
    """The `answer` of each row as text; whole numbers without a point.

    Raises:
        ValueError: A row has no answer, or one that is neither text nor a number.
    """
    given = list(dataset["answer"])
    missing = [
        row
        for row, answer in enumerate(given)
        if answer is None or answer != answer or not str(answer).strip()
    ]
    if missing:
        raise ValueError(
            f"Row {missing[0]} has no `answer` ({len(missing)} such rows). Give one, or drop them."
        )
    for row, answer in enumerate(given):
        if not isinstance(answer, str | int | float):
            raise ValueError(
                f"Row {row} has an `answer` of type {type(answer).__name__}: {answer!r}. Give text "
                "or a number."
            )
    whole = (int(a) if isinstance(a, float) and a.is_integer() else a for a in given)
    return [str(answer) for answer in whole]


def reference_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, batch_size: int = 32
) -> float | None:
    """Mean NLL in nats a token of the reference completions (`completion`), given their prompts.

    Args:
        model: A causal language model of transformers, or one with PEFT's adapters.
        tokenizer: The model's tokenizer.
        dataset: Rows with `prompt` and `completion`.
        batch_size: Rows of a forward pass.

    Returns:
        The mean over all tokens, or None where the completions have no token.
    """
    from trl.trainer.utils import pad  # takes a second, which only this function needs

    attach_head(model)
    nll, tokens = 0.0, 0
    for start in range(0, len(dataset), batch_size):
        rows = dataset.select(range(start, min(start + batch_size, len(dataset))))
        examples = [_ids_and_labels(tokenizer, row) for row in rows]
        ids = [torch.tensor(full, dtype=torch.long) for full, _ in examples]
        labels = [torch.tensor(targets, dtype=torch.long) for _, targets in examples]
        batch = {
            "input_ids": pad(ids, padding_value=0),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0),
            "labels": pad(labels, padding_value=-100),
        }
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with evaluating(model), torch.inference_mode():
            output = model(**batch, fused_lm_head=True)
        nll -= output.log_probs.double().sum().item()
        tokens += int(output.label_mask.sum())
    return nll / tokens if tokens else None


def _ids_and_labels(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion, and the same with -100 in the place of the prompt's."""
    from trl.data_utils import common_prefix_length

    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, str) and not isinstance(prompt, str):
        completion = [{"role": "assistant", "content": completion}]
    full = encode(tokenizer, prompt + completion, generation=False)
    length = common_prefix_length(encode(tokenizer, prompt), full)
    return full, [-100] * length + full[length:]
