"""What a run on several domains is told, and the rows of those domains, ready for a trainer."""

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from llmmix.data import load_splits
from llmmix.mixing.controllers import check_weights
from llmmix.mixing.sampler import EXHAUSTED, METHODS, UNITS, MixtureSampler
from llmmix.trainers import check_sft_dataset, default_to_cpu

logger = logging.getLogger(__name__)

# Columns of which a row has one set or another
FORMATS = (("prompt", "completion"), ("messages",), ("conversations",), ("input_ids",))


@dataclass
class MixtureConfig(SFTConfig):
    """TRL's `SFTConfig` with the domains of a mixture.

    Args:
        domains: NAME=ROWS each: a file, a folder, a hub id (ID@CONFIG) or a built-in.
        weights: Shares, in the order of `domains`; equal by default.
        weight_unit: What they are shares of: "examples", or the "tokens" that are scored.
        draws: "multinomial", or "even" for the least variance.
        max_epochs: Passes over a domain until it is exhausted.
        exhausted: Then "reshuffle", "stop", or "spill" its share to the others.
        validation_rows: Rows set aside of each domain that has no validation split of its own.
        measured_rows: Validation rows of each domain that its loss is measured on.
    """

    domains: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=ROWS of each: a file, a folder, a hub id (ID@CONFIG), a built-in."},
    )
    weights: list[float] = field(
        default_factory=list, metadata={"help": "Shares in the order of --domains; default: equal."}
    )
    weight_unit: str = field(default="examples", metadata={"help": f"One of {UNITS}."})
    draws: str = field(default="multinomial", metadata={"help": f"One of {METHODS}."})
    max_epochs: float | None = field(
        default=None, metadata={"help": "Passes over a domain until it is exhausted."}
    )
    exhausted: str = field(default="reshuffle", metadata={"help": f"Then: one of {EXHAUSTED}."})
    validation_rows: int = field(
        default=64, metadata={"help": "Rows set aside of a domain without a validation split."}
    )
    measured_rows: int = field(
        default=32, metadata={"help": "Validation rows of each domain to measure its loss on."}
    )

    def __post_init__(self):
        default_to_cpu(self)
        super().__post_init__()

    def sampler(self, domains: dict[str, Dataset], weights=None) -> MixtureSampler:
        """Over rows by domain; `weights` in place of the configured ones."""
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


def load_domains(args: MixtureConfig, tokenizer) -> tuple[dict, dict]:
    """Training and validation rows by domain, checked, of one format or tokenized.

    Args:
        args: Whose `domains` to load.
        tokenizer: Of the model.

    Returns:
        (training, validation), each by name, in the order of `domains`.

    Raises:
        ValueError: No domain, one that is not NAME=ROWS or named twice, one without rows or with
            too few to set validation rows aside, rows of two formats in one domain; weights that do
            not fit the domains.
    """
    sources = _sources(args.domains)
    if args.weights:
        check_weights(args.weights, list(sources))
    train, validation = {}, {}
    for name, source in sources.items():
        config = None
        if "@" in source:
            source, _, config = source.partition("@")
        rows, held_out = _split(load_splits(source, config), name, args)
        _check_one_format(rows, name, args.dataset_text_field)
        for part, into in ((rows, train), (held_out, validation)):
            argument = f"domains: {name}"
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
            raise ValueError(f"`domains`: {name!r} is named twice; join its rows or rename one.")
        found[name] = source
    return found


def _split(splits, name: str, args: MixtureConfig) -> tuple[Dataset, Dataset]:
    """Training rows, and validation rows that are none of them."""
    train = splits["train"] if "train" in splits else splits[next(iter(splits))]
    for other in ("validation", "valid"):
        if other in splits and splits[other] is not train:
            return train, splits[other]
    if not len(train):
        raise ValueError(f"`domains`: {name!r} has no rows.")
    if len(train) <= args.validation_rows or args.validation_rows < 1:
        raise ValueError(
            f"`validation_rows={args.validation_rows}`: {name!r} has {len(train)} rows and no "
            "validation split to measure its loss on. Set aside fewer, at least one."
        )
    parts = train.train_test_split(test_size=args.validation_rows, seed=0)
    return parts["train"], parts["test"]


def _check_one_format(rows: Dataset, name: str, text_field: str) -> None:
    """Refuse a domain some of whose rows have one format and some another.

    Files of such rows load with all columns, empty where a row has none.
    """
    there = [c for c in (*FORMATS, (text_field,)) if set(c) <= set(rows.column_names)]
    if len(there) < 2:
        return
    filled = {columns: sum(value is not None for value in rows[columns[0]]) for columns in there}
    if any(0 < count < len(rows) for count in filled.values()):
        told = ", ".join(f"{count} with {'/'.join(c)}" for c, count in filled.items())
        raise ValueError(
            f"`domains`: {name!r} has rows of two formats ({told}, of {len(rows)}). Make a domain "
            "of each."
        )


def _tokenized(rows: Dataset, tokenizer, args: MixtureConfig, name: str) -> Dataset:
    """As `SFTTrainer` prepares rows of this format: domains of several formats then fit."""
    if "input_ids" in rows.column_names:
        kept = [column for column in ("input_ids", "labels") if column in rows.column_names]
        rows = rows.select_columns(kept)
    if args.assistant_only_loss or args.packing:
        raise ValueError(
            "Domains of several formats are tokenized one by one, which knows neither "
            "`assistant_only_loss` nor `packing`. Give all domains one format."
        )
    completion_only = args.completion_only_loss
    if completion_only is None:
        completion_only = "prompt" in rows.column_names
    bare = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only
    )
    prepared = SFTTrainer._prepare_dataset(bare, rows, tokenizer, args, False, None, name)
    if dropped := len(rows) - len(prepared):
        logger.warning(
            "Domain %r: dropped %d of %d rows, which `max_length=%s` leaves no scored token.",
            name,
            dropped,
            len(rows),
            args.max_length,
        )
    if not len(prepared):
        raise ValueError(f"`max_length={args.max_length}` leaves no row of the domain {name!r}.")
    return prepared.select_columns(["input_ids", "labels"])
