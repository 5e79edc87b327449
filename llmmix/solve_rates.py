"""DCO for chains of thought (DCO^a): p is the chance of a right final answer, found by sampling.

    p^ = share of `num_samples` sampled completions that end in the right answer
    hard: keep a row while p^ < threshold;   soft: loss = F(N, p^) * cross-entropy

A long chain of thought has a p so small that DCO on it is cross-entropy; what N draws can cover is
its final answer, whose probability is a sum over chains and is estimated by sampling the model in
training. TRL's log shows `solve_rate/mean`, of the rows asked about, and `solve_rate/failed`, the
share of the samples whose verification failed.

    symbol   name
    p^       SolveRates(rows)
    N        n_samples
    F        majority_weight, which is dco_weight unless the trainer has `votes`

    rates = SolveRates(trainer, verifier)
    attach_filter(trainer, rates.below(0.1))
    attach_weights(trainer, rates.weights)

Recipe: recipes/dco_cot.py. Source: arXiv 2502.07154 and its released code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState
from trl import SFTTrainer

from llmmix.dco import n_samples_of, votes_of
from llmmix.filtering import check_share, check_trainer
from llmmix.grading.ground_truth import reference_answers
from llmmix.grading.problems import encode_prompts
from llmmix.grading.verify import Verifier, judge
from llmmix.majority import majority_weight
from llmmix.precision import evaluating
from llmmix.sampling import sample
from llmmix.sampling.requests import check_room
from llmmix.trainers import training_rows
from llmmix.training.means import log_metric
from llmmix.training.resuming import ResumedCallback

logger = get_logger(__name__)


class SolveRates(ResumedCallback):
    """p^, how often the model in training solves each of its rows, estimated by sampling and kept.

    Rows need a `prompt` and an `answer`. During the first `warmup_steps` every p^ is 0, so that
    nothing is filtered and every weight is the largest: 1, or the trainer's `votes`.

    Args:
        trainer: The trainer whose model is sampled, on prompts of its training rows.
        verifier: A `Verifier`, or its first argument.
        num_samples: Completions sampled of each row.
        min_samples: With fewer completions judged, p^ counts as 0.
        refresh_every: Optimizer steps for which an estimate is taken as it is.
        warmup_steps: Optimizer steps before the first estimate.
        temperature: Sampling temperature; see `llmmix.sampling.sample`.
        max_new_tokens: Tokens after which a completion is cut.
        token_budget: Tokens whose keys and values `sample` holds at once.

    Raises:
        ValueError: A row has no prompt or no answer, or rows are streamed; a prompt leaves no room
            for a completion; `min_samples` is not between 1 and `num_samples`; `refresh_every` is
            below 1; the trainer has no tokenizer; or its parameters are spread over processes.
    """

    def __init__(
        self,
        trainer: SFTTrainer,
        verifier: Verifier | str | Callable[[str, str], bool] = "math",
        *,
        num_samples: int = 64,
        min_samples: int = 1,
        refresh_every: int = 100,
        warmup_steps: int = 20,
        temperature: float = 1.0,
        max_new_tokens: int = 1024,
        token_budget: int = 16384,
    ):
        check_trainer("Sampling the model in training", trainer)
        rows = training_rows(trainer, "A solve rate")
        if missing := {"prompt", "answer"} - set(rows.column_names):
            raise ValueError(
                f"Solve rates need rows with `prompt` and `answer`; {sorted(missing)} is missing."
            )
        if not 1 <= min_samples <= num_samples or refresh_every < 1:
            raise ValueError(
                "`min_samples` must lie between 1 and `num_samples`, and `refresh_every` be 1 or "
                f"more, got {min_samples}, {num_samples} and {refresh_every}."
            )
        self._answers = reference_answers(rows)
        tokenizer = trainer.processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"Solve rates need a tokenizer, and the trainer's `processing_class` is a "
                f"{type(tokenizer).__name__}."
            )
        ids = encode_prompts(tokenizer, rows)
        check_room(ids, trainer.model, max_new_tokens, token_budget)  # now, not in mid-run
        self.trainer, self._tokenizer = trainer, tokenizer
        self.verifier = verifier if isinstance(verifier, Verifier) else Verifier(verifier)
        self.num_samples, self.min_samples = num_samples, min_samples
        self.refresh_every, self.warmup_steps = refresh_every, warmup_steps
        self.sampling: dict[str, Any] = {
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "token_budget": token_budget,
        }
        self._known: dict[int, tuple[int, float]] = {}  # row: step, p^
        trainer.add_callback(self)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(rows,) p^ in fp64, sampled where it is not known or too old.

        All processes must call it together, each for rows of its own.
        """
        step = self.trainer.state.global_step
        if step < self.warmup_steps:
            return torch.zeros(len(rows), dtype=torch.float64)
        old = [
            row
            for row in dict.fromkeys(rows)
            if row not in self._known or step - self._known[row][0] >= self.refresh_every
        ]
        # Every process gets the estimates of all; they call this together, each for its own rows
        found: dict[int, tuple[float, int]] = {}
        for part in gather_object([self._estimate(old) if old else {}]):
            found |= part
        self._known |= {row: (step, rate) for row, (rate, _) in found.items()}
        if found:
            failed = sum(count for _, count in found.values())
            asked_for = self.num_samples * len(found)
            log_metric(self.trainer, "solve_rate/failed", failed, asked_for)
        rates = [self._known[row][1] for row in rows]
        asked: list[float] = sum(gather_object([rates]), [])
        if asked:
            log_metric(self.trainer, "solve_rate/mean", sum(asked), len(asked))
        return torch.tensor(rates, dtype=torch.float64)

    def below(self, threshold: float) -> Callable[[Sequence[int]], Tensor]:
        """The hard filter: rows whose p^ is below the threshold are kept.

        Raises:
            ValueError: `threshold` is outside (0, 1].
        """
        check_share("threshold", threshold)
        return lambda rows: self(rows) < threshold

    def weights(self, rows: Sequence[int]) -> Tensor:
        """(rows,) F(N, p^), with the trainer's N: the soft form.

        With its `votes` above 1, the weight w of llmmix/majority.py: p^ is then the chance that a
        draw votes for the right answer.
        """
        draws = n_samples_of(self.trainer), votes_of(self.trainer)
        return majority_weight(self(rows).log(), *draws)

    def _estimate(self, rows: list[int]) -> dict[int, tuple[float, int]]:
        """p^ of each row, and how many of its verifications failed."""
        step = self.trainer.state.global_step
        dataset = training_rows(self.trainer, "A solve rate")
        model: Any = self.trainer.model
        completions = sample(
            model,
            self._tokenizer,
            encode_prompts(self._tokenizer, dataset.select(rows)),
            self.num_samples,
            numbers=rows,
            seed=self.trainer.args.seed * 1_000_003 + step,  # other draws at each refresh
            **self.sampling,
        )
        answers = {row: self._answers[row] for row in rows}
        judged, right = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
        why = None
        with evaluating(model, self.trainer):
            for completion, verdict in judge(completions, answers, self.verifier):
                if verdict == "failed":
                    why = self.verifier.why(completion.text, answers[completion.prompt])
                judged[completion.prompt] += verdict != "failed"
                right[completion.prompt] += verdict == "right"
        failed = sum(self.num_samples - count for count in judged.values())
        share = failed / (self.num_samples * len(rows))
        if share > 0.5:
            logger.warning(
                "%.0f%% of the verifications failed (%s): solve rates rest on the others alone.",
                100 * share,
                why,
            )
        return {
            row: (
                right[row] / judged[row] if judged[row] >= self.min_samples else 0.0,
                self.num_samples - judged[row],
            )
            for row in rows
        }

    def begin(self) -> None:
        """Forget the estimates of another run."""
        self._known = {}

    def saved(self) -> dict:
        """The estimates that a checkpoint keeps."""
        return {"known": list(self._known.items())}

    def resume(self, saved: dict, state: TrainerState) -> None:
        """Take up the estimates of the run that is resumed."""
        self._known = {int(row): tuple(kept) for row, kept in saved["known"]}
