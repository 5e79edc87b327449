"""The record of a row, from which all metrics of unlearning are computed.

`passes` fills records in, `summary` makes metrics of them, and documents hold them as JSON.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from llmmix.unlearning.evaluation.scores import AnswerScore


@dataclass(frozen=True, slots=True)
class Item:
    """One row: what was asked, how probable its answers are, and what the model says.

    A number that cannot be had is None: `nll` where the row exceeds the context, `generation` where
    there is no prompt or no room for an answer.

    Attributes:
        row: Place in the set.
        question: The question as it was asked: text or messages.
        answer: The right answer.
        tokens: Number of scored tokens of the answer.
        nll: Mean negative log-likelihood of the answer, in nats a token.
        probability: exp(-nll).
        exact_memorization: Share of the answer's tokens that are the most probable ones.
        extraction_strength: Share of the answer that greedy decoding completes.
        min_k: Score of the Min-K attack.
        min_k_plus_plus: Score of the Min-K++ attack.
        zlib: Score of the zlib attack.
        correct_nll: NLL of the right answer that truth ratios take: the paraphrased one if any.
        wrong_nlls: NLLs of the wrong answers that truth ratios take.
        gradient_norm: Score of the gradient-norm attack; None where it was not asked for.
        generation: The greedy answer.
        rouge1_recall: ROUGE-1 recall of the greedy answer, None where `answer` has no word.
        rougeL_f1: ROUGE-L F1 of the greedy answer, None where `answer` has no word.
        rougeL_recall: ROUGE-L recall of the greedy answer, None where `answer` has no word.
        secret_said: Whether the greedy answer says the secret; None without one.
        repetition: Share of repeated n-grams in the greedy answer.
        perplexity: Perplexity of the greedy answer under the original model.
        reference_nll: `nll` minus the same under the original model.
        under_original: Which of `perplexity` and `reference_nll` the original model was asked for.
        secret: What must not be said, if anything.
        score: The scores of the answer's tokens, which the likelihoods are computed from.
    """

    row: int
    question: str | list[dict]
    answer: str
    tokens: int = 0
    nll: float | None = None
    probability: float | None = None
    exact_memorization: float | None = None
    extraction_strength: float | None = None
    min_k: float | None = None
    min_k_plus_plus: float | None = None
    zlib: float | None = None
    correct_nll: float | None = None
    wrong_nlls: list[float] = field(default_factory=list)
    gradient_norm: float | None = None
    generation: str | None = None
    rouge1_recall: float | None = None
    rougeL_f1: float | None = None
    rougeL_recall: float | None = None
    secret_said: bool | None = None
    repetition: float | None = None
    perplexity: float | None = None
    reference_nll: float | None = None
    under_original: tuple[str, ...] = ()
    secret: str | None = None
    score: AnswerScore | None = field(default=None, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The item as documents hold it: JSON values by name."""
        return {name: getattr(self, name) for name in (*RECORDED, *self.under_original)}


UNRECORDED = ("perplexity", "reference_nll", "under_original", "secret", "score")
RECORDED = tuple(f.name for f in fields(Item) if f.name not in UNRECORDED)
