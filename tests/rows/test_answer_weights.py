"""Weights of rows whose answers are taken whole, and of the messages in them."""

import pytest
from datasets import Dataset

from llmmix.rows.answer_weights import weigh_answers


def said(*messages):
    return [{"role": role, "content": text, "weight": weight} for role, text, weight in messages]


def asked(weight):
    return said(("user", "1+1?", None), ("assistant", "2", weight), ("user", "2+2?", None))


def answered(text, *weights):
    turns = [("assistant", text, weight) for weight in weights]
    return said(*turns)


def weigh(rows, **given):
    rows = rows if isinstance(rows, list) else [rows]
    return weigh_answers(Dataset.from_list(rows), "rows", lambda found: found, **given)


TAKEN = {
    "text": {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    "null": {"prompt": asked(None), "chosen": answered("4", None), "rejected": answered("5", None)},
    "one": {"prompt": asked(1), "chosen": answered("4", 1), "rejected": answered("5", 1)},
    "asked": {"prompt": asked(0), "chosen": answered("4", 1), "rejected": answered("5", 1)},
    "shared": {
        "chosen": asked(0) + answered("4", 1),
        "rejected": asked(0) + answered("5", 1),
    },
    "chat": {"messages": asked(0) + answered("4", 1)},
    "completion": {"prompt": asked(0), "completion": answered("4", None)},
    "asked-of-a-pair": {"conversations": asked(0), "chosen": "4", "rejected": "5"},
}


@pytest.mark.parametrize("name", TAKEN)
def test_weights_of_messages_that_change_nothing_are_taken(name):
    assert len(weigh(TAKEN[name])) == 1


def pair(chosen, rejected=None, **more):
    return {"chosen": chosen, "rejected": rejected or answered("5", None), **more}


REFUSED = {
    "half": (pair(answered("4", 0.5), prompt=asked(None)), "message 0 of `chosen` is 0.5, and"),
    "asked": (pair("4", "5", prompt=asked(0.5)), "message 1 of `prompt` is 0.5, and"),
    "negative": (pair(answered("4", -1), prompt=asked(1)), "message 0 of `chosen` is -1: a loss"),
    "answer": (pair(answered("4", 1, 0), prompt=asked(1)), "message 1 of `chosen` is 0, and it is"),
    "rejected": (pair(answered("4", 1), answered("5", 0), prompt=asked(1)), "of `rejected` is 0"),
    "unshared": (
        pair(asked(0) + answered("4", 0), asked(0) + answered("5", 1)),
        "message 3 of `chosen` is 0, and it is part of an answer",
    ),
    "chat": ({"messages": asked(1) + answered("4", 0)}, "message 3 of `messages` is 0, and"),
    "completion": (
        {"prompt": "1+1?", "completion": answered("4", 0)},
        "message 0 of `completion` is 0, and",
    ),
    "tokens": (pair("4", "5", prompt="2+2?", token_weights=[1.0]), "a column `token_weights`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_would_split_an_answer_are_refused(name):
    row, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        weigh([row, row])


def test_a_message_of_an_answer_may_be_masked_where_others_are_left():
    row = REFUSED["answer"][0]
    assert len(weigh(row, masks=True)) == 1
    with pytest.raises(ValueError, match="message 0 of `rejected` is 0, and it is part"):
        weigh(REFUSED["rejected"][0], masks=True)
    rows = Dataset.from_list([row]).to_iterable_dataset()
    with pytest.raises(ValueError, match="message 1 of `chosen` is 0, and it is part"):
        list(weigh_answers(rows, "rows", lambda found: found, masks=True))


def test_messages_of_a_stream_are_checked_as_they_pass():
    rows = Dataset.from_list([REFUSED["half"][0]] * 2).to_iterable_dataset()
    with pytest.raises(ValueError, match="`rows`, row 0: `weight` of message 0 of `chosen`"):
        list(weigh_answers(rows, "rows", lambda found: found))


def test_why_rows_may_have_no_weight_is_told():
    row = TAKEN["text"]
    assert len(weigh(row, unweighted="it is so")) == 1
    with pytest.raises(ValueError, match="a column `weight`, and it is so; or remove the column"):
        weigh(row | {"weight": 1.0}, unweighted="it is so")
