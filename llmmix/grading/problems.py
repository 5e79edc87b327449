"""Problems: rows with a prompt and a reference answer, and their prompts as tokens."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmmix import sampling
from llmmix.grading.ground_truth import reference_answers
from llmmix.grading.sample_log import prompt_id
from llmmix.rows.prompts import options_of


def read_problems(
    rows: Dataset,
    *,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    prompt_template: str = "{prompt}",
    apply_chat_template: bool = False,
    most: int | None = None,
) -> Dataset:
    """The rows with a column `prompt` and a column `answer`, one in each row.

    Args:
        rows: Rows in columns of any name.
        prompt_column: Column with the prompt, text or messages.
        answer_column: Column with the reference answer.
        prompt_template: What a prompt of text is put into, in the place of {prompt}.
        apply_chat_template: Whether a prompt of text becomes a user's message.
        most: How many rows to take, from the first; all by default.

    Raises:
        ValueError: A column is missing, there is no row, or a row has no answer.
    """
    for name, column in {"prompt": prompt_column, "answer": answer_column}.items():
        if column not in rows.column_names:
            raise ValueError(f"`{name}_column`: no {column!r} among {rows.column_names}.")
        if column != name:
            rows = rows.remove_columns(list({name} & set(rows.column_names)))
            rows = rows.rename_column(column, name)
    rows = rows if most is None else rows.take(min(most, len(rows)))
    if not len(rows):
        raise ValueError("`dataset_name`: the split holds no row.")
    reference_answers(rows)  # refuse them before anything is loaded
    if not all(isinstance(prompt, str) for prompt in rows["prompt"]):
        return rows
    texts: list[Any] = [prompt_template.replace("{prompt}", text) for text in rows["prompt"]]
    if apply_chat_template:
        texts = [[{"role": "user", "content": text}] for text in texts]
    return rows.remove_columns("prompt").add_column("prompt", texts)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> list[list[int]]:
    """Token ids of the `prompt` of each row, with the `tools` and options of the row.

    Raises:
        ValueError: A row has no prompt; or its chat template is missing, or refuses the messages.
    """
    prompts = list(dataset["prompt"])
    if missing := [row for row, prompt in enumerate(prompts) if prompt is None or prompt == []]:
        raise ValueError(
            f"Row {missing[0]} has no `prompt` ({len(missing)} such rows). Give one, or drop them."
        )
    found = []
    for row, (prompt, asked) in enumerate(zip(prompts, options_of(dataset), strict=True)):
        try:
            found.append(sampling.encode(tokenizer, prompt, options=asked))
        except ValueError as error:
            raise ValueError(f"`prompt` of row {row}: {error}") from error
    return found


def problem_ids(dataset: Dataset) -> list[str]:
    """A digest of each row's prompt, and of what the row asks of the chat template."""
    pairs = zip(dataset["prompt"], options_of(dataset), strict=True)
    return [prompt_id([prompt, asked] if asked else prompt) for prompt, asked in pairs]
