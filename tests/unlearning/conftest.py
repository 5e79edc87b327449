"""Trainers of unlearning on the small model, and a tokenizer to change."""

import gc

import pytest
from transformers import AutoTokenizer

from tests.unlearning.runs import finish, prepare


@pytest.fixture
def make(checkpoint, tmp_path):
    def make(name, **given):
        return prepare(name, given.pop("folder", tmp_path / "out"), checkpoint, **given)

    return make


@pytest.fixture
def run(make):
    return lambda name, **given: finish(make(name, **given))


@pytest.fixture(scope="module")
def plain_run(checkpoint, tmp_path_factory):
    """The run of a method as `SETTINGS` have it, once for all tests."""
    known = {}

    def run(name):
        if name not in known:
            known[name] = finish(prepare(name, tmp_path_factory.mktemp(name), checkpoint))
        return known[name]

    return run


@pytest.fixture(scope="module")
def quick_collections():
    """A trainer collects garbage when it is done: half its time, if all modules are looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def plain(checkpoint):
    """A tokenizer of our own to change."""
    return AutoTokenizer.from_pretrained(checkpoint)
