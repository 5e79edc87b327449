"""Trainers of the small runs."""

import pytest

from tests.mixing.runs import PHASES, Phases, build, finish, mixed, pad_left


@pytest.fixture
def make(tokenizer, tmp_path):
    """A trainer of `runs.build`, in a folder of the test's."""

    def build_here(name="run", **given):
        return build(tmp_path / name, tokenizer, **given)

    return build_here


@pytest.fixture(scope="session")
def phased(tokenizer, tmp_path_factory):
    """A run of phases by how it is cut, each made once."""
    made = {}

    def run(size=2, accumulation=2, workers=0, padding="right"):
        key = (size, accumulation, workers, padding)
        if key not in made:
            options = {}
            if padding == "left":
                options["data_collator"] = pad_left
            trainer = build(
                tmp_path_factory.mktemp("phases"),
                tokenizer,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                dataloader_num_workers=workers,
                max_steps=16,
                trainer_options=options,
            )
            controller = Phases(*PHASES)
            sampler = mixed(trainer, controller)
            made[key] = (*finish(trainer), trainer, controller, sampler)
        return made[key]

    return run
