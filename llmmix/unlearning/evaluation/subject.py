"""A model to measure: its measurements are kept, and it is loaded when one is missing.

Whatever runs the model (likelihoods, answers, gradients) goes through `Subject.keep`. What is kept
is not measured again; if nothing is missing, the model is not even loaded.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.files import cache_dir, read_json, write_whole
from llmmix.models import Checkpoint, Loader
from llmmix.processes import main_process_says
from llmmix.rows.prompts import TEMPLATE_COLUMNS
from llmmix.unlearning.evaluation.scores import TOKEN_BUDGET
from llmmix.unlearning.evaluation.texts import Tokenize

METRIC_VERSION = 3  # raise it when a measurement or the definition of a metric changes
NOTHING = object()  # where nothing is kept


class Keep(Protocol):
    """Returns the measurement that is kept under (kind, data, options), or computes it."""

    def __call__(self, kind: str, data: str, options: dict, compute: Callable[[], Any]) -> Any:
        """The JSON value that `compute` returns, now or in an earlier run."""


def measure_anew(kind: str, data: str, options: dict, compute: Callable[[], Any]) -> Any:
    """Compute the measurement, and keep nothing."""
    return compute()


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        tokenizer: The model's tokenizer.
        load: Returns the model; called where something is to be measured.
        keep: Where measurements are kept, each a JSON value.
    """

    tokenizer: PreTrainedTokenizerBase
    load: Callable[[], PreTrainedModel]
    keep: Keep = measure_anew


@dataclass(frozen=True)
class Change:
    """What is done to a model before it is measured.

    Attributes:
        identity: JSON values that tell this change from any other.
        make: Returns a changed copy of the model.
    """

    identity: dict[str, Any]
    make: Callable[[PreTrainedModel], PreTrainedModel]


@dataclass(frozen=True)
class MeasureOptions:
    """How items are measured.

    Attributes:
        generate: Whether to let the model answer, greedily.
        max_new_tokens: Tokens after which an answer is cut.
        stop: Strings before which an answer is cut.
        rouge_tokenize: Splits text into words; see `llmmix.unlearning.evaluation.texts.rouge`.
        gradient_norms: Whether to take the norm of each item's gradient.
        min_k: Share of the least probable tokens that Min-K attacks look at.
        token_budget: Tokens of a batch.
        shared: Whether all processes take part; each then gets all results.
    """

    generate: bool = True
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    rouge_tokenize: Tokenize | None = None
    gradient_norms: bool = False
    min_k: float = 0.4
    token_budget: int = TOKEN_BUDGET
    shared: bool = False


def checkpoint_subject(
    loader: Loader, checkpoint: Checkpoint, change: Change | None = None
) -> Subject:
    """A checkpoint as a subject, its measurements kept in the cache.

    Args:
        loader: Loads the checkpoint when it is needed.
        checkpoint: The model.
        change: What is done to the model first.
    """
    changed = None if change is None else change.identity
    fingerprint = loader.fingerprint(checkpoint) | {"changed": changed}

    def load() -> PreTrainedModel:
        if change is None:
            return loader.model(checkpoint)
        key = (checkpoint, json.dumps(changed))
        return loader.held(key, lambda: change.make(loader.model(checkpoint)))

    return Subject(loader.tokenizer(checkpoint), load, keep_in_cache(fingerprint))


def keep_in_cache(fingerprint: dict[str, Any]) -> Keep:
    """Keep the measurements of one model in the cache folder, a file each.

    The main process decides what is there; all processes get the same.

    Args:
        fingerprint: JSON values that tell the model from any other.
    """
    state = PartialState()

    def keep(kind: str, data: str, options: dict, compute: Callable[[], Any]) -> Any:
        asked = [METRIC_VERSION, fingerprint, kind, data, options]
        key = hashlib.blake2b(json.dumps(asked).encode(), digest_size=12).hexdigest()
        file = cache_dir() / "unlearning" / f"{kind}-{key}.json"
        # In a list, since a measurement may be null
        kept = read_json(file, absent=NOTHING)
        found = main_process_says(None if kept is NOTHING else [kept])
        if found is not None:
            return found[0]
        value = compute()
        if state.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(value))
        return json.loads(json.dumps(value))  # as it will be read back

    return keep


def data_digest(rows: Dataset) -> str:
    """A digest of what is measured: prompts and their templates, answers, alternatives, secrets."""
    names = ("prompt", "answer", "paraphrased_answer", "perturbed_answer", "secret")
    measured = [name for name in (*names, *TEMPLATE_COLUMNS) if name in rows.column_names]
    columns = {name: rows[name][:] for name in measured}
    return hashlib.blake2b(json.dumps(columns).encode(), digest_size=8).hexdigest()
