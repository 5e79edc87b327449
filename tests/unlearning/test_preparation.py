"""What both unlearning trainers refuse of rows, templates and settings."""

import pytest
from datasets import Dataset

from llmmix.unlearning.preparation import check_args
from tests.unlearning.runs import FORGET, RETAIN, finish

pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.mark.parametrize("name", ["flat", "npo"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"packing": True}, "`packing=True` merges"),
        ({"label_smoothing_factor": 0.1}, "leave `label_smoothing_factor`"),
        ({"rows": FORGET.to_iterable_dataset()}, "must be a map-style `Dataset`"),
        ({"rows": None}, "must be a map-style `Dataset`.*NoneType"),
        ({"rows": FORGET.select([])}, "got no rows"),
        ({"rows": FORGET.rename_column("answer", "reply")}, "`train_dataset` has the columns"),
        ({"max_length": 4}, "None of the 10 rows to forget"),
        ({"eval_dataset": FORGET.remove_columns("answer")}, "`eval_dataset` has the columns"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else "",
)
def test_bad_rows_are_refused(make, name, given, message):
    with pytest.raises(ValueError, match=message):
        make(name, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"templates": []}, "`templates` holds no answer"),
        ({"templates": ["", " "]}, "`templates` holds no answer"),
        ({"templates": ["answer"]}, "`templates` holds no answer"),
        ({"templates": ["61"]}, "Row 1 is to forget '6=61'|one of its templates"),
        ({"rows": Dataset.from_dict({"text": ["some text"]})}, "has no question for a template"),
        ({"template_file": "/no/file"}, "`template_file`: no file"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["flat", "dpo", "idk"])
def test_bad_templates_are_refused(make, name, given, message):
    error = FileNotFoundError if "template_file" in given else ValueError
    given = {"templates": ["6=61"]} if given.get("templates") == ["61"] else given
    with pytest.raises(error, match=message):
        make(name, **given)


def test_bad_retained_rows_are_refused(make):
    both = Dataset.from_dict({"question": ["What is 3+5?"], "answer": ["8"]})
    with pytest.raises(ValueError, match="1 questions or texts stand both"):
        make("npo", retain=both)
    with pytest.raises(ValueError, match="`retain_dataset` must be a map-style .* got no rows"):
        make("npo", retain=RETAIN.select([]))
    with pytest.raises(ValueError, match="`retain_dataset` has the columns"):
        make("npo", retain=RETAIN.rename_column("answer", "reply"))
    with pytest.raises(ValueError, match="retain_dataset"):
        make("npo", retain=RETAIN.to_iterable_dataset())


def test_rows_that_are_too_long_are_dropped_and_counted(make, caplog):
    lengths = sorted(len(e.ids) for e in make("grad_ascent").train_dataset.forget)
    trainer = make("grad_ascent", max_length=lengths[4])
    expected = sum(n <= lengths[4] for n in lengths)
    assert len(trainer.train_dataset) == expected < 10
    assert f"Dropped {10 - expected} of 10 rows to forget" in caplog.text
    finish(trainer)


def test_only_rows_that_can_be_indexed_are_taken():
    stream = FORGET.to_iterable_dataset()
    for given, what in ((None, "NoneType"), (stream, "IterableDataset"), ([1], "list")):
        with pytest.raises(ValueError, match=f"must be a map-style `Dataset`.*got {what}"):
            check_args(None, given, {})
    with pytest.raises(ValueError, match="at least one, got no rows"):
        check_args(None, Dataset.from_dict({"text": []}), {})
