"""The reference answers of rows, and the loss of a model on their reference completions.

The answers are what samples are judged against; the loss of the completions stands beside pass@N.
"""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmmix.data import pad
from llmmix.head import attach_head
from llmmix.models import context_length
from llmmix.precision import evaluating
from llmmix.processes import warn_once
from llmmix.rows.prompts import Encoded, encode_completion, options_of


def reference_answers(dataset: Dataset) -> list[str]:
    """The `answer` of each row as text; whole numbers without a point.

    A list of one answer stands for the answer.

    Raises:
        ValueError: A row has no answer, several, or one that is neither text nor a number.
    """
    given = [_only(answer) for answer in dataset["answer"]]
    missing = [row for row, answer in enumerate(given) if _is_missing(answer)]
    if missing:
        raise ValueError(
            f"Row {missing[0]} has no `answer` ({len(missing)} such rows). Give one, or drop them."
        )
    for row, answer in enumerate(given):
        if isinstance(answer, list):
            raise ValueError(
                f"Row {row} has {len(answer)} answers in `answer`: {str(answer)[:120]}. A sample "
                "is judged against one. Keep one, or name a `verifier` of your own and write the "
                "answers into one text that it reads."
            )
        if not isinstance(answer, str | int | float):
            raise ValueError(
                f"Row {row} has an `answer` of type {type(answer).__name__}: {answer!r}. Give text "
                "or a number."
            )
    whole = (int(a) if isinstance(a, float) and a.is_integer() else a for a in given)
    return [str(answer) for answer in whole]


def _only(answer: Any) -> Any:
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def _is_missing(answer: Any) -> bool:
    return answer is None or answer != answer or answer == [] or not str(answer).strip()


def encode_references(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, context: int | None = None
) -> list[Encoded]:
    """The tokens of each row's prompt and reference completion.

    Rows without a completion, and those that exceed the context, are left out and counted.

    Args:
        tokenizer: The model's tokenizer.
        dataset: Rows with `prompt` and `completion`, and perhaps `tools` and
            `chat_template_kwargs`.
        context: The most tokens that the model reads at once; None for no limit.

    Raises:
        ValueError: A row's prompt is text and its completion messages, or the chat template refuses
            the messages, or there is none.
    """
    found = []
    for number, (row, options) in enumerate(zip(dataset, options_of(dataset), strict=True)):
        prompt, completion = row["prompt"], row["completion"]
        if not (completion.strip() if isinstance(completion, str) else completion):
            continue
        try:
            found.append(encode_completion(tokenizer, prompt, completion, options=options))
        except ValueError as error:
            raise ValueError(f"`completion` of row {number}: {error}") from error
    fitting = [e for e in found if context is None or len(e.ids) <= context]
    if len(fitting) < len(dataset):
        warn_once(
            f"{len(dataset) - len(fitting)} of {len(dataset)} reference completions are not "
            f"scored: {len(dataset) - len(found)} are empty, and {len(found) - len(fitting)} "
            f"exceed the context of {context} tokens."
        )
    return fitting


def reference_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, batch_size: int = 32
) -> float | None:
    """Mean NLL in nats a token of the reference completions (`completion`), given their prompts.

    The token that ends a completion is scored, and nothing behind it.

    Args:
        model: A causal language model of transformers, or one with PEFT's adapters.
        tokenizer: The model's tokenizer.
        dataset: Rows with `prompt` and `completion`.
        batch_size: Rows of a forward pass.

    Returns:
        The mean over all tokens of the rows that `encode_references` leaves; None without any.

    Raises:
        ValueError: `encode_references` refuses the rows.
    """
    examples = encode_references(tokenizer, dataset, context_length(model))
    attach_head(model)
    nll, tokens = 0.0, 0
    for first in range(0, len(examples), batch_size):
        batch = pad(examples[first : first + batch_size])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with evaluating(model), torch.inference_mode():
            output = model(**batch, fused_lm_head=True)
        nll -= output.log_probs.double().sum().item()
        tokens += int(output.label_mask.sum())
    return nll / tokens if tokens else None
