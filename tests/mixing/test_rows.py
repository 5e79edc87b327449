"""Which of a trainer's rows are of which domain."""

import numpy as np
import pytest
from datasets import Dataset
from trl import SFTTrainer

from llmmix.mixing import MixtureSampler, attach_mixture, label_domains
from tests.mixing.runs import (
    SIZES,
    WEIGHTS,
    Phases,
    counts_of,
    domain_rows,
    domains_read,
    labelled_rows,
    mixed,
    sampler_of,
    tokens_of,
)


def test_rows_that_the_trainer_dropped_are_told_apart_and_counted(make, caplog):
    rows = {
        name: Dataset.from_dict(
            {
                "prompt": [f"{name} " * (40 if row % 3 == 1 else 2) for row in range(6)],
                "completion": [f"{number}{row}" for row in range(6)],
            }
        )
        for number, name in enumerate("xyz")
    }
    rows["y"] = rows["y"].select([0, 2, 3, 5])  # of which none is dropped
    trainer = make(
        rows=label_domains(rows),
        dataset_kwargs=None,
        max_length=20,
        kind=SFTTrainer,
        trainer_options={"eval_dataset": None},
    )
    sampler = MixtureSampler(rows, seed=3)
    attach_mixture(trainer, sampler)
    assert sampler.sizes.tolist() == [4, 4, 4]
    for name in "xz":
        assert f"Domain '{name}': the trainer dropped 2 of 6 rows" in caplog.text
    assert "Domain 'y'" not in caplog.text
    names = trainer.train_dataset["domain"]
    loader = trainer.get_train_dataloader()
    sampler.set_plan([([0, 0, 1], 8)])
    drawn = [index for batch in loader.indices() for index in batch]
    assert len(drawn) == 8 and {names[index] for index in drawn} == {"z"}
    assert sorted(drawn[:4]) == sorted(drawn[4:]) and len(set(drawn)) == 4


def test_without_a_column_the_rows_are_the_domains_in_their_order(make):
    rows = labelled_rows().remove_columns("domain")
    trainer, labelled = make(rows=rows, max_steps=7), make("labelled", max_steps=7)
    for each in (trainer, labelled):
        mixed(each)
        each.train()
    assert trainer.steps_read == labelled.steps_read
    assert counts_of(trainer.args.output_dir) == domains_read(trainer)


def test_rows_in_any_order_are_found_by_their_column(make):
    shuffled = labelled_rows().shuffle(seed=1)
    trainer = make(rows=shuffled, max_steps=3)
    mixed(trainer, weights=[0, 0.5, 0.5])
    trainer.train()
    assert domains_read(trainer) == counts_of(trainer.args.output_dir)
    assert not np.array(domains_read(trainer))[:, 0].any()


def test_scored_tokens_are_counted_for_the_unit_tokens(make):
    trainer = make()
    sampler = sampler_of(unit="tokens")
    attach_mixture(trainer, sampler)
    for number, (name, size) in enumerate(SIZES.items()):
        lengths = [len(tokens_of(number, row)) - 1 for row in range(size)]
        assert sampler.tokens_per_row[name] == pytest.approx(np.mean(lengths))


def test_label_domains():
    rows = domain_rows()
    rows["b"] = rows["b"].add_column("domain", ["other"] * 12)
    labelled = label_domains(rows)
    assert labelled["domain"][:] == [name for name, size in SIZES.items() for _ in range(size)]
    assert labelled["input_ids"][7] == tokens_of(1, 0)
    with pytest.raises(ValueError, match="`domains` is empty"):
        label_domains({})
    with pytest.raises(ValueError, match="`domains`: 'b' has no rows"):
        label_domains({"a": rows["a"], "b": rows["b"].select([])})
    with pytest.raises(ValueError, match="`domains`: 'b' has the columns"):
        label_domains({"a": rows["a"], "b": rows["b"].remove_columns("labels")})


# What cannot be


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"packing": True, "max_length": 16}, "`packing`"),
        ({"shuffle_dataset": True}, "`shuffle_data"),
    ],
)
def test_rows_that_the_trainer_joined_or_shuffled_are_refused(make, given, match):
    rows = labelled_rows().remove_columns("domain")
    trainer = make(
        rows=rows,
        kind=SFTTrainer,
        dataset_kwargs=None,
        trainer_options={"eval_dataset": None},
        **given,
    )
    with pytest.raises(ValueError, match=f"`train_dataset`.*{match}"):
        mixed(trainer)


def test_rows_whose_domain_cannot_be_told_are_refused(make):
    rows = labelled_rows()
    with pytest.raises(ValueError, match="there are 23 rows, and the sampler's domains have 24"):
        mixed(make(rows=rows.remove_columns("domain").select(range(23))))
    with pytest.raises(ValueError, match=r"`train_dataset` has rows of \['c'\]"):
        attach_mixture(make(rows=rows), MixtureSampler({"a": range(7), "b": range(12)}))
    with pytest.raises(ValueError, match="'c' has no rows"):
        mixed(make(rows=rows.select(range(19))))
    with pytest.raises(ValueError, match="`train_dataset`"):
        mixed(make(rows=rows.remove_columns("domain").to_iterable_dataset()))


def masked(rows: Dataset) -> Dataset:
    return rows.map(lambda row: {"labels": [row["labels"][0]] + [-100] * (len(row["labels"]) - 1)})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (None, "`eval_dataset` is missing"),
        ({"a": domain_rows()["a"], "b": domain_rows()["b"].select([])}, "target 'b' has no rows"),
        (
            {"a": domain_rows()["a"], "b": masked(domain_rows()["b"])},
            r"no row of \['b'\] has a scor",
        ),
        (domain_rows()["a"], "`eval_dataset` does not name the target"),
        ({}, "`eval_dataset`|target"),
    ],
)
def test_targets_that_cannot_be_measured_are_refused(make, given, match):
    trainer = make(trainer_options={"eval_dataset": given})
    with pytest.raises(ValueError, match=match):
        mixed(trainer, Phases((WEIGHTS, 2, "losses")))
