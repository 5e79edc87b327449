"""`MixtureConfig`, the options of a run on several domains, and loading the domains' rows.

The recipes call it: recipes/mixture.py, recipes/mixture_sweep.py and recipes/aioli.py.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from llmmix.data import load_splits
from llmmix.mixing.checks import check_weights
from llmmix.mixing.passes import EXHAUSTED
from llmmix.mixing.sampler import DRAWS, UNITS, MixtureSampler
from llmmix.mixing.tokens import tokenize_rows
from llmmix.padding_free_setting import padding_free_field
from llmmix.rows.formats import check_sft_dataset
from llmmix.rows.message_weights import tell_unread
from llmmix.trainers import default_to_cpu
from llmmix.training.ranges import check_settings

logger = logging.getLogger(__name__)

UNREAD = "`DCOTrainer`, `SFTMixTrainer` and `TokenLossTrainer` do, with `attach_mixture` in Python"

# Sets of columns, one of which a row has; the text column is the last possibility
FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("input_ids",))


@dataclass
class MixtureConfig(SFTConfig):
    """TRL's `SFTConfig` with the domains of a mixture.

    Args:
        domains: NAME=ROWS for each domain; ROWS is a file, a folder, a hub id (ID@CONFIG) or a
            built-in set.
        weights: Share of each domain, in the order of `domains`. Default: equal shares.
        weight_unit: Unit of the shares: "examples" (rows), or "tokens" (scored tokens).
        draws: "multinomial" makes every draw independently; "even" spaces the draws of each domain
            evenly.
        max_epochs: Passes over a domain after which it has no rows left. Default: 1, or no limit
            where `exhausted` is "reshuffle".
        exhausted: When a domain has no rows left: "reshuffle" begins another pass, "stop" ends
            training, "spill" gives its share to the other domains.
        validation_rows: Rows set aside from each domain that has no validation split of its own.
        measured_rows: Maximum number of validation rows that each domain's loss is measured on.
    """

    domains: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=ROWS for each domain; ROWS is a file, a folder, a hub id (ID@CONFIG) or "
            "a built-in set."
        },
    )
    weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Share of each domain, in the order of --domains. Default: equal shares."
        },
    )
    weight_unit: str = field(
        default="examples",
        metadata={"help": f"Unit of the shares: {' or '.join(UNITS)} (rows, or scored tokens)."},
    )
    draws: str = field(
        default="multinomial",
        metadata={
            "help": f"How rows are drawn: {' or '.join(DRAWS)}. Multinomial makes every draw "
            "independently; even spaces the draws of each domain evenly."
        },
    )
    max_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Passes over a domain after which it has no rows left, for --exhausted stop or "
            "spill. Default: 1."
        },
    )
    exhausted: str = field(
        default="reshuffle",
        metadata={
            "help": f"What happens when a domain has no rows left: {', '.join(EXHAUSTED)}. "
            "Reshuffle begins another pass, stop ends training, and spill gives the domain's share "
            "to the other domains."
        },
    )
    validation_rows: int = field(
        default=64,
        metadata={
            "help": "Number of rows set aside for validation from each domain without a validation "
            "split."
        },
    )
    measured_rows: int = field(
        default=32,
        metadata={
            "help": "Maximum number of validation rows that each domain's loss is measured on."
        },
    )
    padding_free: bool = padding_free_field()

    def __post_init__(self) -> None:
        check_settings(self)
        default_to_cpu(self)
        super().__post_init__()

    def sampler(self, domains: dict[str, Dataset], weights: Any = None) -> MixtureSampler:
        """A sampler over the rows of `domains`; `weights` replaces the configured weights.

        Raises:
            ValueError: `MixtureSampler` refuses the options or the weights.
        """
        given = weights if weights is not None else self.weights or None
        return MixtureSampler(
            domains,
            given,
            seed=self.seed if self.data_seed is None else self.data_seed,
            unit=self.weight_unit,
            method=self.draws,
            max_epochs=self.max_epochs,
            exhausted=self.exhausted,
        )


def load_domains(
    args: MixtureConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Training and validation rows by domain, checked; tokenized where formats differ.

    Args:
        args: Configuration with the `domains` to load.
        tokenizer: Tokenizer of the model.

    Returns:
        (training, validation), each by name, in the order of `domains`.

    Raises:
        ValueError: `domains` is empty, has an entry that is not NAME=ROWS, or names one twice; a
            domain has no rows, rows of two formats, or too few rows to set some aside for
            validation; or `weights` do not fit the domains.
    """
    sources = _sources(args.domains)
    if args.weights:
        check_weights(args.weights, list(sources))
    train: dict[str, Dataset] = {}
    validation: dict[str, Dataset] = {}
    for name, source in sources.items():
        rows, held_out = _split(load_splits(source, argument=f"domains`: `{name}"), name, args)
        _check_one_format(rows, name, args.dataset_text_field)
        for part, into in ((rows, train), (held_out, validation)):
            argument = f"domains`: `{name}"
            tell_unread(part, argument, "TRL's trainer", UNREAD)
            into[name] = check_sft_dataset(part, argument, args.dataset_text_field, tokenizer)
    columns = {frozenset((c, str(f)) for c, f in r.features.items()) for r in train.values()}
    if len(columns) > 1:
        train, validation = (
            {name: _tokenized(rows, tokenizer, args, name) for name, rows in part.items()}
            for part in (train, validation)
        )
    return train, validation


def _sources(domains: list[str]) -> dict[str, str]:
    if not domains:
        raise ValueError(
            "`domains` is missing: name each as NAME=ROWS, such as `--domains code=a.jsonl "
            "web=b.jsonl docs=builtin:domains@docs`."
        )
    found: dict[str, str] = {}
    for given in domains:
        name, equals, source = given.partition("=")
        if not (name and equals and source):
            raise ValueError(f"`domains`: {given!r} is not NAME=ROWS, such as code=code.jsonl.")
        if name in found:
            raise ValueError(f"`domains`: {name!r} is named twice; rename one, or join their rows.")
        found[name] = source
    return found


def _split(splits: DatasetDict, name: str, args: MixtureConfig) -> tuple[Dataset, Dataset]:
    """Training rows, and validation rows, none of which is among them."""
    train = splits["train"] if "train" in splits else splits[next(iter(splits))]
    for other in ("validation", "valid"):
        if other in splits and splits[other] is not train:
            return train, splits[other]
    if not len(train):
        raise ValueError(f"`domains`: {name!r} has no rows.")
    if len(train) <= args.validation_rows or args.validation_rows < 1:
        raise ValueError(
            f"`validation_rows={args.validation_rows}`: {name!r} has {len(train)} rows and no "
            "validation split to measure its loss on. Set fewer rows aside, at least one."
        )
    parts = train.train_test_split(test_size=args.validation_rows, seed=0)
    return parts["train"], parts["test"]


def _check_one_format(rows: Dataset, name: str, text_field: str) -> None:
    """Refuse a domain whose rows have several formats.

    A file of such rows loads with the columns of all formats, empty where a row lacks one.
    """
    there = [c for c in (*FORMATS, (text_field,)) if set(c) <= set(rows.column_names)]
    if len(there) < 2:
        return
    filled = {columns: sum(value is not None for value in rows[columns[0]]) for columns in there}
    if any(0 < count < len(rows) for count in filled.values()):
        told = ", ".join(f"{count} with {'/'.join(c)}" for c, count in filled.items())
        raise ValueError(
            f"`domains`: {name!r} has rows of two formats ({told}, of {len(rows)}). Make a "
            "domain of each format."
        )


def _tokenized(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: MixtureConfig, name: str
) -> Dataset:
    """Token ids and labels of a domain, with which domains of several formats fit together."""
    made = tokenize_rows(rows, tokenizer, args, name)
    if dropped := len(rows) - len(made):
        logger.warning(
            "Domain %r: dropped %d of %d rows, which `max_length=%s` leaves no scored token.",
            name,
            dropped,
            len(rows),
            args.max_length,
        )
    if not len(made):
        raise ValueError(f"`max_length={args.max_length}` leaves no row of the domain {name!r}.")
    return made
