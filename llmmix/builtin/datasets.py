"""The built-in datasets by name."""

from collections.abc import Callable

from datasets import Dataset, DatasetDict

from llmmix.builtin import authors, corpora, problems

# By name, what makes the rows of each split from a configuration
SPLITS: dict[str, Callable[[str | None], dict[str, list[dict]]]] = {
    "builtin:math": problems.math_splits,
    "builtin:preferences": problems.preference_splits,
    "builtin:authors": authors.splits,
    "builtin:domains": corpora.splits,
}


def dataset(name: str, config: str | None = None, *, argument: str = "dataset_name") -> DatasetDict:
    """A built-in dataset.

    Args:
        name: A key of `SPLITS`; each has splits of its own.
        config: Levels to keep of `builtin:math` and `builtin:preferences`, such as "1" or "1,3";
            the size of `builtin:authors`; the domains of `builtin:domains`. All levels, the
            smallest size and the four real domains by default.
        argument: Name of `name` in error messages.

    Raises:
        ValueError: `name` is no built-in dataset, or `config` names an unknown level, size or
            domain.
        FileNotFoundError: The text of a domain is not on the machine.
    """
    if name not in SPLITS:
        raise ValueError(f"`{argument}`: no built-in {name!r}; there are {', '.join(SPLITS)}.")
    splits = SPLITS[name](config)
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
