"""The draws of a mixture against `datasets.interleave_datasets` with the same shares."""

import itertools
from collections.abc import Callable

from llmmix.timing.clock import Case

MIXTURE = {"web": (100_000, 0.5), "code": (60_000, 0.3), "books": (40_000, 0.2)}  # rows, share


def draw_cases(*, draws: int) -> list[list[Case]]:
    """Two rows of the table: which rows come next, `draws` of them, and a fiftieth of them read."""
    contenders = {
        f"which of {draws} rows come next": {
            "llmmix, one by one": "one_by_one",
            "llmmix, a step at a time": "steps",
            "interleave_datasets": "interleave",
        },
        f"{draws // 50} rows read": {
            "llmmix": "rows",
            "interleave_datasets": "interleave_rows",
            "interleave_datasets, streaming": "interleave_stream",
        },
    }
    return [
        [Case(row, name, draw_call, {"how": how, "draws": draws}) for name, how in group.items()]
        for row, group in contenders.items()
    ]


def draw_call(*, how: str, draws: int) -> Callable[[], dict]:
    """A call that makes a mixture of three domains and draws from it."""
    import datasets

    from llmmix.mixing import MixtureSampler

    shares = [share for _, share in MIXTURE.values()]
    rows = {name: datasets.Dataset.from_dict({"row": range(n)}) for name, (n, _) in MIXTURE.items()}
    together = datasets.concatenate_datasets(list(rows.values()))
    settings = {"probabilities": shares, "seed": 0, "stopping_strategy": "all_exhausted"}

    def draw() -> dict:
        sampler = MixtureSampler(rows, shares)
        if how == "one_by_one":
            done = sum(1 for _ in itertools.islice(sampler, draws))
        elif how == "steps":
            done = 0
            while done < draws and (block := sampler.take(1024)):
                sampler.use(len(block.rows))
                done += len(block.rows)
        elif how == "interleave":
            done = 0
            while done < draws:
                done += len(datasets.interleave_datasets(list(rows.values()), **settings))
        elif how == "rows":
            done = sum(1 for i in itertools.islice(sampler, draws // 50) if together[i])
        else:
            parts = list(rows.values())
            if how == "interleave_stream":
                parts = [part.to_iterable_dataset() for part in parts]
            mixed = datasets.interleave_datasets(parts, **settings)
            done = sum(1 for _ in itertools.islice(mixed, draws // 50))
        return {"draws": done}

    return draw
