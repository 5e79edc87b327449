"""Greedy answers of a model, how close they are to a reference, and how fluent they are."""

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.processes import warn_once
from llmmix.rows.prompts import Options, Prompt, encode, encode_answer
from llmmix.sampling import sample
from llmmix.sampling.requests import too_long
from llmmix.unlearning.evaluation.scores import TOKEN_BUDGET, deal_out, score_sequences

if TYPE_CHECKING:
    from vllm import LLM

Tokenize = Callable[[str], list[str]]

ROUGE_SCORES = ("rouge1_recall", "rougeL_f1", "rougeL_recall")


def generate_greedily(
    model: "PreTrainedModel | LLM",
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | list[int]],
    *,
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
    token_budget: int = TOKEN_BUDGET,
    shared: bool = False,
) -> list[str | None]:
    """The most probable token at every step, the first of equals, for each prompt.

    Args:
        model: A causal language model of transformers, or a `vllm.LLM`.
        tokenizer: The model's tokenizer.
        prompts: Text, messages or token ids.
        max_new_tokens: Tokens after which a text is cut.
        stop: Strings before which a finished text is cut.
        token_budget: Tokens held at once; see `llmmix.sampling.sample`.
        shared: Deal the prompts out over the processes.

    Returns:
        Texts without blanks around them; None where a prompt is empty or leaves no room.
    """
    ids = [encode(tokenizer, prompt) if prompt else [] for prompt in prompts]
    full = set(too_long(ids, model, max_new_tokens))
    asked = [row for row in range(len(ids)) if ids[row] and row not in full]
    if full:
        warn_once(
            f"{len(full)} of {len(ids)} prompts are not answered: they leave no room for "
            f"max_new_tokens={max_new_tokens} in the context."
        )

    def work(rows: list[int]) -> list[tuple[int, str]]:
        texts = sample(
            model,
            tokenizer,
            [ids[row] for row in rows],
            1,
            temperature=0,
            max_new_tokens=max_new_tokens,
            token_budget=token_budget,
            numbers=rows,
        )
        return [(done.prompt, _cut_at(done.text, stop)) for done in texts]

    parts = PartialState().num_processes if shared else 1
    jobs = [asked[part::parts] for part in range(parts)]
    said = dict(pair for done in deal_out(jobs, work, shared) for pair in done)
    return [said.get(row) for row in range(len(ids))]


def _cut_at(text: str, stop: Sequence[str]) -> str:
    found = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(found, default=len(text))].strip()


def unicode_words(text: str) -> list[str]:
    """Words of any script, in lower case; a character of double width is a word of its own."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(map(_letter, text)).split()


def _letter(c: str) -> str:
    if unicodedata.category(c)[0] not in "LMN":  # letters, marks on them, digits
        return " "
    return f" {c} " if unicodedata.east_asian_width(c) in "WF" else c


def rouge(generation: str, reference: str, tokenize: Tokenize | None = None) -> dict[str, float]:
    """ROUGE-1 recall, ROUGE-L F1 and ROUGE-L recall, words reduced to their stems.

    Args:
        generation: What was said.
        reference: What should have been said.
        tokenize: A function of text to words; by default those of `rouge_score`, which knows a-z
            and 0-9 alone. `unicode_words` knows all scripts.

    Returns:
        The scores by name, as in `ROUGE_SCORES`; zeros where either text has no word.
    """
    scores = _scorer(tokenize).score(reference, generation)
    one, longest = scores["rouge1"], scores["rougeL"]
    return dict(zip(ROUGE_SCORES, (one.recall, longest.fmeasure, longest.recall), strict=True))


def has_words(text: str, tokenize: Tokenize | None = None) -> bool:
    """Whether ROUGE finds a word in a text; it scores one without as 0, identical or not."""
    return bool(tokenize(text)) if tokenize else bool(re.search("[a-z0-9]", text.lower()))


class _Words:
    """A tokenizer as rouge_score takes it."""

    def __init__(self, tokenize: Tokenize):
        self.tokenize = tokenize


@cache
def _scorer(tokenize: Tokenize | None):
    # rouge_score announces at level INFO that it uses the default tokenizer
    logging.getLogger("absl").setLevel(logging.WARNING)
    from rouge_score.rouge_scorer import RougeScorer

    words = None if tokenize is None else _Words(tokenize)
    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True, tokenizer=words)


def says(text: str, secret: str) -> bool:
    """Whether a text holds a secret, word for word; case and punctuation do not count."""
    wanted, said = unicode_words(secret), unicode_words(text)
    return bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(said)} "


def repetition(text: str, n: int = 4) -> float | None:
    """Share of the n-grams of words that occurred before; None for fewer than n words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def distinct(texts: Sequence[str], n: int = 2) -> float | None:
    """Share of distinct n-grams of words among those of all texts; None without any."""
    split = [text.split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    texts: Sequence[str | None],
    *,
    options: Sequence[Options] | None = None,
    shared: bool = False,
) -> list[float | None]:
    """exp(NLL) of generated texts under another model, as after their prompts; None for no text.

    Args:
        model: A fluent model, such as the one before unlearning.
        tokenizer: The model's tokenizer.
        prompts: Text or messages.
        texts: What was said; None or a blank text is passed over.
        options: What the row of each prompt asks of the chat template; nothing by default.
        shared: Deal the texts out over the processes.
    """
    said = [row for row, text in enumerate(texts) if text and text.strip()]
    if not said:
        return [None] * len(texts)
    asked = options or [{}] * len(texts)
    # A text that was cut did not choose its end
    sequences = [
        encode_answer(
            tokenizer, prompts[row], texts[row] or "", include_eos=False, options=asked[row]
        )
        for row in said
    ]
    scores = score_sequences(model, sequences, moments=False, shared=shared)
    with np.errstate(over="ignore"):
        found = {
            row: None if score is None else float(np.exp(score.nll))
            for row, score in zip(said, scores, strict=True)
        }
    return [found.get(row) for row in range(len(texts))]
