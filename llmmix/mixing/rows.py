"""The tie between rows and domains: labelling them, and finding them again in a trainer's rows."""

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
# (domains, rows, passes) of draws, each (n,), to the n indices that a trainer's rows have
Locate = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def label_domains(domains: Mapping[str, Dataset]) -> Dataset:
    """The rows of all domains, one domain after the other, each with its domain's name.

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
    """(rows,) names of the domains of a trainer's rows, None where it does not say.

    Rows to forget, which are no `Dataset`, keep theirs as an attribute.
    """
    if isinstance(dataset, Dataset):
        return np.array(dataset[COLUMN][:]) if COLUMN in dataset.column_names else None
    names = getattr(dataset, COLUMN, None)
    return None if names is None else np.array(names)


def by_target(dataset: Any, domains: list[str]) -> dict[str, Any]:
    """Validation rows by target: as they are given by name, or told apart by their column.

    Raises:
        ValueError: `dataset` is empty or missing, or its rows do not say which target they are of.
    """
    if isinstance(dataset, Mapping) and dataset:
        return dict(dataset)
    if not dataset and not isinstance(dataset, Dataset):
        raise ValueError(
            "`eval_dataset` is missing: give the trainer validation rows of each target, by name "
            f"({{name: rows}}, of {domains}) or with a column `{COLUMN}`."
        )
    names = domain_column(dataset) if isinstance(dataset, Dataset) else None
    if names is None:
        raise ValueError(
            f"`eval_dataset` does not say which target its rows are of: give it by name, or with a "
            f"column `{COLUMN}`."
        )
    there = [name for name in domains if name in set(names)]
    there += sorted(set(names) - set(domains))
    return {name: dataset.select(np.flatnonzero(names == name)) for name in there}


def locate_rows(trainer: Trainer, sampler: MixtureSampler) -> Locate:
    """Find the sampler's domains in a trainer's rows, and tell it how many each has left.

    Returns:
        (domains, rows, passes), each (n,), to (n,) indices into the trainer's rows.

    Raises:
        ValueError: The rows are a stream, do not tell their domain, are of a domain that the
            sampler does not know, or lack one that it does; `StreamedRows` are of other streams
            than the sampler's, or read by workers.
    """
    dataset: Any = trainer.train_dataset
    if isinstance(dataset, StreamedRows):
        return _locate_streamed(trainer, dataset, sampler)
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "`train_dataset` is a stream: mix streams by `llmmix.mixing.StreamedRows`."
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
    # Rows to forget are told the pass, from which their templates follow
    a_pass = getattr(dataset, "pass_length", 0)

    def locate(domains: np.ndarray, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        return where[first[domains] + rows] + passes * a_pass

    return locate


def _by_stratum(
    trainer: Trainer, names: np.ndarray, domains: list[str]
) -> dict[str, list[np.ndarray]]:
    """Indices of the rows of each domain, apart by the strata that the trainer has of its rows."""
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
            f"`sampler`: it draws from {sampler.names}, the streams are {list(dataset.domains)}. "
            "Make it of `streams.domains`."
        )
    if workers := trainer.args.dataloader_num_workers:
        raise ValueError(
            f"`dataloader_num_workers={workers}`: each worker would read every stream from its "
            "start whenever the weights move. Set it to 0."
        )
    return dataset.locate


def _in_order(trainer: Trainer, sampler: MixtureSampler) -> np.ndarray:
    """The domain of each row where the rows are the sampler's domains, one after the other."""
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
            f"`train_dataset`: which domain a row is of cannot be told: {cut}. Give the rows a "
            f"column `{COLUMN}` (`label_domains`), and pack each domain by itself beforehand."
        )
    return np.repeat(sampler.names, sampler.sizes)


def mean_scored_tokens(dataset: Any, domains: list[str]) -> dict[str, float]:
    """Mean number of scored tokens a row of each domain.

    Raises:
        ValueError: The rows have no `labels` or `input_ids`, or no column `domain`; or a domain has
            no scored token.
    """
    columns = dataset.column_names if isinstance(dataset, Dataset) else []
    column = next((name for name in ("labels", "input_ids") if name in columns), None)
    names = domain_column(dataset)
    if column is None or names is None:
        raise ValueError(
            "`unit='tokens'`: the rows have no `labels` to count and no column `domain`. Give the "
            "sampler `tokens_per_row`, or use `unit='examples'`."
        )
    rows = dataset.with_format("numpy").select_columns([column])
    counts = np.array([np.sum(row[column][1:] != -100) for row in rows])
    means = {name: float(counts[names == name].mean()) for name in domains}
    if empty := [name for name, mean in means.items() if not mean]:
        raise ValueError(f"`unit='tokens'`: no row of {empty} has a scored token.")
    return means
