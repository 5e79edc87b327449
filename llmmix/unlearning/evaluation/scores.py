"""Scores of given answers under a model, token by token; nothing is generated here.

    NLL = -1/|y| sum_t ln p(y_t | x, y_<t)      the end-of-sequence token is part of y

Answers are batched by tokens, longest first, and the head runs on the scored positions alone. An
item that cannot be scored is None in the result and counted in the log, never left out.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.data import pad
from llmmix.models import context_length
from llmmix.positions import batches_alike
from llmmix.precision import evaluating
from llmmix.processes import warn_once
from llmmix.rows.prompts import Encoded, Options, Prompt, encode_answer, options_of
from llmmix.unlearning.qa import cut

logger = logging.getLogger(__name__)

TOKEN_BUDGET = 16384  # tokens of a batch, padding included
LOGIT_BYTES = 2**28  # of fp32 logits that a forward may leave behind
CHUNK = 2**24  # logits that are normalized at once

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class AnswerScore:
    """The tokens of one answer under teacher forcing.

    Attributes:
        labels: (n,) ids of the scored tokens.
        token_logps: (n,) natural logs of their probabilities.
        predictions: (n,) ids of the most probable tokens at the same positions.
        means: (n,) mean of ln p over the vocabulary, under p; None where not asked for.
        variances: (n,) variance of ln p over the vocabulary, under p; None where not asked for.
    """

    labels: np.ndarray
    token_logps: np.ndarray
    predictions: np.ndarray
    means: np.ndarray | None = None
    variances: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.labels)

    @property
    def nll_sum(self) -> float:
        """Minus the log-probability of the whole answer."""
        return -float(self.token_logps.sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats a token."""
        return self.nll_sum / self.tokens

    def without_last(self, token: int | Collection[int] | None) -> "AnswerScore":
        """The same score less the last token, if that token is `token`, or one of these."""
        ends = [token] if token is None or isinstance(token, int) else token
        if not self.tokens or self.labels[-1] not in ends:
            return self
        return AnswerScore(
            self.labels[:-1],
            self.token_logps[:-1],
            self.predictions[:-1],
            None if self.means is None else self.means[:-1],
            None if self.variances is None else self.variances[:-1],
        )


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    include_eos: bool = True,
    moments: bool = True,
    token_budget: int = TOKEN_BUDGET,
    shared: bool = False,
) -> list[AnswerScore | None]:
    """Score the answer of each row.

    Args:
        model: A causal language model of transformers, whose mode is put back at the end.
        tokenizer: The model's tokenizer.
        rows: Rows with `prompt` and `answer`, as `llmmix.unlearning.qa.read_rows` gives them.
        include_eos: Whether to score the end-of-sequence token.
        moments: Whether to add the mean and variance of ln p over the vocabulary.
        token_budget: Tokens of a batch.
        shared: Deal the batches out over the processes; every process gets all results.

    Returns:
        A score for each row; None where prompt and answer exceed the context, or nothing is to be
        scored. Text without a prompt that exceeds the context is scored in pieces.
    """
    sequences = [
        encode_answer(tokenizer, prompt, answer, include_eos=include_eos, options=options)
        for prompt, answer, options in zip(
            rows["prompt"], rows["answer"], options_of(rows), strict=True
        )
    ]
    return score_sequences(
        model, sequences, moments=moments, token_budget=token_budget, shared=shared
    )


def alternative_nlls(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    alternatives: Sequence[Sequence[str] | None],
    *,
    options: Sequence[Options] | None = None,
    token_budget: int = TOKEN_BUDGET,
    shared: bool = False,
) -> list[list[float | None]]:
    """Mean NLL of each of several answers to each prompt.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's tokenizer.
        prompts: Text or messages.
        alternatives: The answers to each prompt, any number or None; blank ones are skipped.
        options: What the row of each prompt asks of the chat template; nothing by default.
        token_budget: Tokens of a batch.
        shared: Deal the batches out over the processes.

    Returns:
        A number for each answer to each prompt; None where it exceeds the context.
    """
    given = [[text for text in texts or () if text and text.strip()] for texts in alternatives]
    sequences = [
        encode_answer(tokenizer, prompt, text, options=asked)
        for prompt, texts, asked in zip(prompts, given, options or [{}] * len(prompts), strict=True)
        for text in texts
    ]
    scores = score_sequences(
        model, sequences, moments=False, token_budget=token_budget, shared=shared
    )
    nlls = iter([None if score is None else score.nll for score in scores])
    return [[next(nlls) for _ in texts] for texts in given]


def score_sequences(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    *,
    moments: bool = True,
    token_budget: int = TOKEN_BUDGET,
    shared: bool = False,
) -> list[AnswerScore | None]:
    """Score what follows each prompt; see `score_answers`."""
    context = context_length(model)
    pieces: list[Encoded] = []
    owners: list[int] = []
    for number, sequence in enumerate(sequences):
        parts = [sequence] if context is None else cut(sequence, context)  # text alone is cut
        parts = [part for part in parts if len(part.ids) > part.prompt_length]
        if context is None or all(len(part.ids) <= context for part in parts):
            pieces += parts
            owners += [number] * len(parts)
    limit = max(1, LOGIT_BYTES // (4 * _vocabulary(model)))
    batches = batches_alike(
        model,
        [len(piece.ids) for piece in pieces],
        token_budget,
        scored=[len(piece.ids) - piece.prompt_length for piece in pieces],
        scored_budget=limit,
    )

    def work(batch: list[int]) -> list[AnswerScore]:
        return _score_batch(model, [pieces[place] for place in batch], moments, limit)

    with evaluating(model), torch.inference_mode():
        scored = deal_out(batches, work, shared)
    found: dict[int, list[AnswerScore]] = {}
    places = [place for batch in batches for place in batch]
    flat = dict(zip(places, (score for batch in scored for score in batch), strict=True))
    for place, owner in enumerate(owners):
        found.setdefault(owner, []).append(flat[place])
    if missing := len(sequences) - len(found):
        warn_once(
            f"{missing} of {len(sequences)} answers are not scored: with their prompts they exceed "
            f"the context of {context} tokens, or they have no token."
        )
    return [_joined(found.get(number)) for number in range(len(sequences))]


def deal_out(
    jobs: Sequence[Job], work: Callable[[Job], Result], shared: bool = False
) -> list[Result]:
    """Do jobs in order; with `shared`, each of k processes does every k-th.

    Args:
        jobs: The jobs; the same on all processes.
        work: Does a job.
        shared: Deal the jobs out over the processes.

    Returns:
        The results of all jobs, on every process.
    """
    if not shared or PartialState().num_processes == 1:
        return [work(job) for job in jobs]
    state = PartialState()
    mine = range(state.process_index, len(jobs), state.num_processes)
    results = dict(gather_object([(number, work(jobs[number])) for number in mine]))
    return [results[number] for number in range(len(jobs))]


def _vocabulary(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    return model.config.get_text_config().vocab_size if head is None else head.weight.shape[0]


def _score_batch(
    model: PreTrainedModel, batch: list[Encoded], moments: bool, limit: int
) -> list[AnswerScore]:
    """The scores of a batch; an answer of more than `limit` tokens takes several forwards."""
    tensors = {name: x.to(model.device) for name, x in pad(batch).items()}
    labels = tensors.pop("labels")[:, 1:]
    scored = (labels != -100).nonzero()
    parts: list[tuple[Tensor, ...]] = []
    for at in scored.split(limit):
        logits = _logits_at(model, tensors, at[:, 0], at[:, 1])
        targets = labels[at[:, 0], at[:, 1]].to(logits.device)
        step = max(1, CHUNK // logits.size(1))
        for chunk, wanted in zip(logits.split(step), targets.split(step), strict=True):
            parts.append(_statistics(chunk, wanted, moments))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    ends = np.cumsum([len(ids) - start for ids, start in batch])[:-1]
    split = [np.split(column, ends) for column in columns]
    return [AnswerScore(*values) for values in zip(*split, strict=True)]


def _logits_at(
    model: PreTrainedModel, tensors: dict[str, Tensor], rows: Tensor, places: Tensor
) -> Tensor:
    """(n, V) logits at some positions; the model's own head computes no others."""
    reached = []

    def select(_: nn.Module, inputs: tuple) -> tuple:
        reached.append(True)
        hidden = inputs[0]
        picked = hidden[rows.to(hidden.device), places.to(hidden.device)]
        return (picked.unsqueeze(0), *inputs[1:])

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        logits = model(**tensors, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits[0] if reached else logits[rows.to(logits.device), places.to(logits.device)]


def _statistics(logits: Tensor, targets: Tensor, moments: bool) -> tuple[Tensor, ...]:
    """What `AnswerScore` holds, from (n, V) logits; an entry of probability 0 adds nothing."""
    log_probs = logits.float().log_softmax(-1)
    token_logps = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    columns = (targets, token_logps, logits.argmax(-1))
    if not moments:
        return columns
    probs = log_probs.exp()
    finite = log_probs.masked_fill_(probs == 0, 0)
    means = (probs * finite).sum(-1, keepdim=True)
    variances = (probs * finite.sub_(means).square_()).sum(-1)
    return *columns, means.squeeze(1), variances


def _joined(pieces: list[AnswerScore] | None) -> AnswerScore | None:
    if pieces is None or len(pieces) == 1:
        return pieces[0] if pieces else None
    means = [s.means for s in pieces if s.means is not None]
    variances = [s.variances for s in pieces if s.variances is not None]
    return AnswerScore(
        np.concatenate([s.labels for s in pieces]),
        np.concatenate([s.token_logps for s in pieces]),
        np.concatenate([s.predictions for s in pieces]),
        np.concatenate(means) if means else None,
        np.concatenate(variances) if variances else None,
    )
