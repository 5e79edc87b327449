"""Questions and answers: how they are read, encoded and cut."""

import logging

import pytest
from datasets import Dataset

from llmmix.data import pad
from llmmix.rows.prompts import Encoded, encode_answer
from llmmix.unlearning import qa


def test_a_first_token_is_not_scored(plain):
    ids, start = encode_answer(plain, "", "some text")
    batch = pad([Encoded(ids, start)])
    assert batch["labels"][0, 0] == -100 and batch["labels"][0, 1:].tolist() == ids[1:]


def test_text_is_cut_into_rows_without_losing_a_token():
    whole = Encoded(list(range(10)), 1)
    pieces = qa.cut(whole, 4)
    assert [piece.ids for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert {piece.prompt_length for piece in pieces} == {1}
    assert qa.cut(whole, 10) == [whole]
    assert [piece.ids for piece in qa.cut(Encoded(list(range(5)), 1), 4)] == [[0, 1, 2, 3]]
    assert qa.cut(Encoded(list(range(10)), 3), 4) == [Encoded(list(range(10)), 3)]


def test_every_format_is_read(plain):
    def read(**columns):
        rows = qa.read_rows(Dataset.from_dict(columns), "rows", plain)
        return rows["prompt"][:], rows["answer"][:]

    user = [{"role": "user", "content": "2+2?"}]
    said = [{"role": "assistant", "content": "4"}]
    assert read(question=["2+2?"], answer=["4"]) == ([user], ["4"])
    assert read(prompt=["2+2?"], completion=["4"]) == (["2+2?"], ["4"])
    assert read(prompt=[user], completion=[said]) == ([user], ["4"])
    assert read(text=["some text"]) == ([""], ["some text"])
    # an `answer` beside prompt and completion is another column, as of builtin:math
    assert read(prompt=["2+2?"], completion=["2+2=4"], answer=["4"]) == (["2+2?"], ["2+2=4"])
    plain.chat_template = None
    assert read(question=["2+2?"], answer=["4"]) == (["Question: 2+2?\nAnswer:"], ["4"])
    kept = Dataset.from_dict({"question": ["a"], "answer": ["b"], "template": ["c"]})
    assert qa.read_rows(kept, "rows", plain)["template"][:] == ["c"]


def test_rows_that_cannot_be_read(plain, caplog):
    def read(dataset):
        return qa.read_rows(dataset, "retain_dataset", plain)

    for missing in (None, Dataset.from_dict({"text": []})):
        with pytest.raises(ValueError, match="`retain_dataset` must be .* got (NoneType|no rows)"):
            read(missing)
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\]; accepted are"):
        read(Dataset.from_dict({"b": ["x"], "a": ["y"]}))
    with pytest.raises(ValueError, match="`answer` is empty in 2"):
        read(Dataset.from_dict({"question": ["a", "b"], "answer": ["", " "]}))
    with caplog.at_level(logging.WARNING):
        rows = read(Dataset.from_dict({"question": ["a", "b", "c"], "answer": ["x", None, " "]}))
    assert len(rows) == 1 and rows["answer"][:] == ["x"]
    told = "Dropped 2 of 3 rows of `retain_dataset`: `answer` is empty in 2 (first: row 1)"
    assert told in caplog.text


@pytest.mark.parametrize("column", ["question", "prompt"])
def test_a_row_without_a_question_is_dropped(plain, column):
    """Not asked as 'None'."""
    answer = {"question": "answer"}.get(column, "completion")
    rows = Dataset.from_dict({column: ["2+2?", None, "  "], answer: ["4"] * 3})
    assert len(qa.read_rows(rows, "train_dataset", plain)) == 1


def test_a_stream_to_retain_is_refused_in_words(plain):
    with pytest.raises(ValueError, match="retain_dataset"):
        qa.read_rows(
            Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "retain_dataset", plain
        )


def test_overlap_looks_past_case_and_blanks():
    user = [{"role": "user", "content": "Who  is IT?"}]
    assert qa.overlap(["a", "Who is it?"], [user, "b"]) == ["Who is it?"]
    assert qa.overlap([user], ["who is it? "]) == [user]
    assert qa.overlap(["a"], ["b"]) == []
    composed, apart = "Caf\u00e9", "Cafe\u0301"
    assert qa.overlap([composed], [apart]) == [composed]
