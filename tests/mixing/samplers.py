"""Samplers of three small domains, read in several ways."""

import itertools
import json

import numpy as np

from llmmix.mixing import MixtureSampler

SIZES = {"a": 7, "b": 20, "c": 3}
FIRST = {"a": 0, "b": 7, "c": 27}
METHODS = ("multinomial", "even")


def make(weights=(0.5, 0.2, 0.3), sizes=SIZES, **options):
    return MixtureSampler({name: range(n) for name, n in sizes.items()}, weights, **options)


def one_by_one(sampler, count):
    return list(itertools.islice(sampler, count))


def in_chunks(sampler, count, chunks):
    """The same draws ahead of time, with `take`, and used piece by piece."""
    first = np.concatenate([[0], np.cumsum(sampler.sizes)[:-1]])
    rows, sizes = [], itertools.cycle(chunks)
    while len(rows) < count:
        block = sampler.take(min(next(sizes), count - len(rows)))
        if block is None:
            break
        rows += (first[block.domains] + block.rows).tolist()
        sampler.use(len(block.rows))
    return rows


def domains_of(rows, sizes=SIZES):
    edges = np.cumsum(list(sizes.values()))
    return np.searchsorted(edges, rows, side="right")


def again(sampler, **options):
    """Another sampler that goes on from the state of this one, as a checkpoint has it."""
    other = make(**options)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    return other
