"""Which domain a row belongs to: labelling rows, and finding the domains in a trainer's rows."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets
from transformers import Trainer

from llmmix.mixing.sampler import MixtureSampler
from llmmix.mixing.streams import StreamedRows

logger = get_logger(__name__)

COLUMN = "domain"
# Maps (domains, rows, passes) of draws, each (n,), to n indices of a trainer's rows
Locate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def label_domains(domains: Mapping[str, Dataset]) -> Dataset:
    """The rows of all domains, one domain after the other, each with the name of its domain.

    Args:
        domains: Rows by name, with the same columns.

    Returns:
        Rows with a column `domain`.

    Raises:
        ValueError: `domains` is empty, a domain has no rows, or columns differ between domains.
    """
    if not domains:
        raise ValueError("`domains` is empty: name at least one.")
    kept = None
    for name, rows in domains.items():
        if not len(rows):
            raise ValueError(f"`domains`: {name!r} has no rows; leave it out or give it some.")
        columns = set(rows.column_names) - {COLUMN}
        kept = kept or (name, columns)
        if columns != kept[1]:
            raise ValueError(
                f"`domains`: {name!r} has the columns {sorted(columns)}, {kept[0]!r} has "
                f"{sorted(kept[1])}. Give them the same (`select_columns`), or tokenize each first."
            )
    labelled = []
    for name, rows in domains.items():
        rows = rows.remove_columns(COLUMN) if COLUMN in rows.column_names else rows
        labelled.append(rows.add_column(COLUMN, [name] * len(rows)))
    return concatenate_datasets(labelled)


def domain_column(dataset: Any) -> np.ndarray | None:
    """(rows,) name of the domain of each of a trainer's rows; None where the rows do not say.

    The rows to forget of an unlearning trainer are no `Dataset` and have them as an attribute.
    """
    if isinstance(dataset, Dataset):
        return np.array(dataset[COLUMN][:]) if COLUMN in dataset.column_names else None
    names = getattr(dataset, COLUMN, None)
    return None if names is None else np.array(names)


def by_target(dataset: Any, domains: list[str]) -> dict[str, Any]:
    """Validation rows by target: a mapping as given, or a dataset split by its column `domain`.

    Raises:
        ValueError: `dataset` is empty or missing, or its rows do not name their target.
    """
    if isinstance(dataset, Mapping) and dataset:
        return dict(dataset)
    if not dataset and not isinstance(dataset, Dataset):
        raise ValueError(
            "`eval_dataset` is missing: give the trainer validation rows of each target, by name "
            f"({{name: rows}}, such as {domains}) or with a column `{COLUMN}`."
        )
    names = domain_column(dataset) if isinstance(dataset, Dataset) else None
    if names is None:
        raise ValueError(
            f"`eval_dataset` does not name the target of its rows: give rows by name, or with a "
            f"column `{COLUMN}`."
        )
    there = [name for name in domains if name in set(names)]
    there += sorted(set(names) - set(domains))
    return {name: dataset.select(np.flatnonzero(names == name)) for name in there}


def locate_rows(trainer: Trainer, sampler: MixtureSampler) -> Locate:
    """Find the sampler's domains in a trainer's rows, and tell the sampler how many rows are left.

    Returns:
        A function from (domains, rows, passes), each (n,), to (n,) indices of the trainer's rows.

    Raises:
        ValueError: The rows are a stream, do not name their domain, or have other domains than the
            sampler; or `StreamedRows` have other streams than the sampler, or workers read them.
    """
    dataset: Any = trainer.train_dataset
    if isinstance(dataset, StreamedRows):
        return _locate_streamed(trainer, dataset, sampler)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "`train_dataset` is a stream: mix streams with `llmmix.mixing.StreamedRows`."
        )
    names = domain_column(dataset)
    if names is None:
        names = _in_order(trainer, sampler)
    if unknown := sorted(set(names.tolist()) - set(sampler.names)):
        raise ValueError(
            f"`train_dataset` has rows of {unknown}, which the sampler does not know; it has "
            f"{sampler.names}."
        )
    parts = _by_stratum(trainer, names, sampler.names)
    for name, before in zip(sampler.names, sampler.sizes.tolist(), strict=True):
        left = sum(map(len, parts[name]))
        if 0 < left < before:
            logger.warning(
                "Domain %r: the trainer dropped %d of %d rows.", name, before - left, before
            )
    sampler.bind({name: [len(part) for part in own] for name, own in parts.items()})
    where = np.concatenate([part for name in sampler.names for part in parts[name]])
    first = sampler.passes.first_rows()
    # Rows to forget choose their template by the number of the pass
    a_pass = getattr(dataset, "pass_length", 0)

    def locate(domains: np.ndarray, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        return where[first[domains] + rows] + passes * a_pass

    return locate


def _by_stratum(
    trainer: Trainer, names: np.ndarray, domains: list[str]
) -> dict[str, list[np.ndarray]]:
    """Indices of the rows of each domain, by the trainer's `mixture_strata` if it has them."""
    given = getattr(trainer, "mixture_strata", None)
    strata = np.zeros(len(names), dtype=int) if given is None else np.asarray(given)
    numbers = range(int(strata.max()) + 1)
    return {
        name: [np.flatnonzero((names == name) & (strata == number)) for number in numbers]
        for name in domains
    }


def _locate_streamed(trainer: Trainer, dataset: StreamedRows, sampler: MixtureSampler) -> Locate:
    if list(dataset.domains) != sampler.names:
        raise ValueError(
            f"`sampler` draws from {sampler.names}, and the streams are {list(dataset.domains)}. "
            "Make it with `MixtureSampler(streams.domains)`."
        )
    if workers := trainer.args.dataloader_num_workers:
        raise ValueError(
            f"`dataloader_num_workers={workers}`: each worker would read every stream from its "
            "start whenever the weights move. Set it to 0."
        )
    return dataset.locate


def _in_order(trainer: Trainer, sampler: MixtureSampler) -> np.ndarray:
    """(rows,) domain of each row, if the rows are the sampler's domains one after the other."""
    dataset: Any = trainer.train_dataset
    args, cut = trainer.args, None
    if getattr(args, "packing", False):
        cut = "`packing` put rows of several domains into one"
    elif getattr(args, "shuffle_dataset", False):
        cut = "`shuffle_dataset` changed their order"
    elif len(dataset) != sampler.sizes.sum():
        cut = f"there are {len(dataset)} rows, and the sampler's domains have {sampler.sizes.sum()}"
    if cut:
        raise ValueError(
            f"`train_dataset`: the domain of a row is unknown: {cut}. Give the rows a column "
            f"`{COLUMN}` (`label_domains`), and pack each domain by itself beforehand."
        )
    return np.repeat(sampler.names, sampler.sizes)


def mean_scored_tokens(dataset: Any, domains: list[str]) -> dict[str, float]:
    """Mean number of scored tokens of a row, by domain.

    Raises:
        ValueError: The rows have neither `labels` nor `input_ids`, have no column `domain`, or a
            domain has no scored token.
    """
    columns = dataset.column_names if isinstance(dataset, Dataset) else []
    column = next((name for name in ("labels", "input_ids") if name in columns), None)
    names = domain_column(dataset)
    if column is None or names is None:
        raise ValueError(
            "`weight_unit` (`unit`) 'tokens': the rows have no `labels` to count and no column "
            "`domain`. Give the sampler `tokens_per_row`, or use 'examples'."
        )
    rows = dataset.with_format("numpy").select_columns([column])
    counts = np.array([np.sum(row[column][1:] != -100) for row in rows])
    means = {name: float(counts[names == name].mean()) for name in domains}
    if empty := [name for name, mean in means.items() if not mean]:
        raise ValueError(f"`weight_unit` (`unit`) 'tokens': no row of {empty} has a scored token.")
    return means
