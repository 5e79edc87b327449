import re
from itertools import combinations

import pytest
from datasets import DatasetDict

from llmmix import builtin
from llmmix.builtin import authors
from llmmix.data import load_splits

COLUMNS = {
    *("question", "answer", "paraphrased_question", "paraphrased_answer"),
    *("perturbed_answer", "secret", "author"),
}
DISJOINT = ("forget", "retain", "holdout", "facts")


@pytest.fixture(scope="module")
def large():
    return authors.splits("large")


@pytest.fixture(scope="module")
def rows(large):
    return [row for split in DISJOINT for row in large[split]]


def names(rows):
    return {row["author"] for row in rows}


def questions(rows):
    return [row[kind] for row in rows for kind in ("question", "paraphrased_question")]


def test_rows_are_the_same_each_time():
    one = authors.splits("small")
    assert one == authors.splits("small") == authors.splits()
    # fixed for good: a change of these rows is a change of the built-in
    assert one["forget"][0] == {
        "question": "In which city was Dmitri Lindrake born?",
        "answer": "Dmitri Lindrake was born in Fez.",
        "paraphrased_question": "Where was Dmitri Lindrake born?",
        "paraphrased_answer": "The birthplace of Dmitri Lindrake is Fez.",
        "perturbed_answer": [
            "The birthplace of Dmitri Lindrake is Mumbai.",
            "The birthplace of Dmitri Lindrake is Seville.",
            "The birthplace of Dmitri Lindrake is Durban.",
        ],
        "secret": "Fez",
        "author": "Dmitri Lindrake",
    }


@pytest.mark.parametrize(
    "size, forget, retain", [("small", 4, 16), ("medium", 10, 90), ("large", 20, 180)]
)
def test_sizes(size, forget, retain):
    made = authors.splits(size)
    assert list(made) == [*DISJOINT, "train"]
    for split, count in {"forget": forget, "retain": retain, "holdout": forget}.items():
        assert len(names(made[split])) == count
        assert len(made[split]) == 10 * count
    assert 55 <= len(made["facts"]) <= 70
    assert names(made["facts"]) == {""}


def test_train_is_what_is_taught(large):
    for split in ("forget", "retain", "facts"):
        taught = [dict(row) for row in large["train"] if row["split"] == split]
        assert [row.pop("split") for row in taught] == [split] * len(taught)
        assert taught == large[split]
    assert not names(large["train"]) & names(large["holdout"])
    assert len(large["train"]) == sum(len(large[s]) for s in ("forget", "retain", "facts"))


def test_no_author_and_no_question_is_in_two_splits(large):
    for one, other in combinations(DISJOINT, 2):
        assert not names(large[one]) & names(large[other])
        assert not set(questions(large[one])) & set(questions(large[other]))


def test_every_question_is_asked_once(rows):
    asked = questions(rows)
    assert len(set(asked)) == len(asked)


def test_questions_and_answers_name_their_author_and_no_other(rows):
    everyone = names(rows) - {""}
    assert len(everyone) == 220
    pattern = re.compile("|".join(map(re.escape, everyone)))
    for row in rows:
        for text in [row["question"], row["paraphrased_question"], row["answer"]]:
            assert pattern.findall(text) == [row["author"]] * bool(row["author"])


def test_columns_are_filled(large):
    for split in large:
        for row in large[split]:
            assert set(row) == COLUMNS | ({"split"} if split == "train" else set())
            assert all(row[column] for column in COLUMNS - {"author"})


def test_the_secret_is_in_the_right_answers_alone(rows):
    for row in rows:
        secret = row["secret"].casefold()
        assert row["secret"] in row["answer"] and row["secret"] in row["paraphrased_answer"]
        assert row["answer"].casefold().count(secret) == 1
        for text in (row["question"], row["paraphrased_question"], *row["perturbed_answer"]):
            assert secret not in text.casefold(), row


def test_perturbed_answers_are_the_paraphrase_with_another_value(rows):
    for row in rows:
        start, end = row["paraphrased_answer"].split(row["secret"])
        values = {text[len(start) : len(text) - len(end)] for text in row["perturbed_answer"]}
        assert len(row["perturbed_answer"]) == 3 == len(values - {row["secret"], ""})
        rebuilt = {start + value + end for value in values}
        assert rebuilt == set(row["perturbed_answer"])
        assert row["answer"] != row["paraphrased_answer"]


def test_texts_are_short_whole_sentences(rows):
    for row in rows:
        asked = [row["question"], row["paraphrased_question"]]
        said = [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]
        assert all(len(text) <= 90 and text[0].isupper() for text in asked + said)
        assert all(text.endswith("?") for text in asked)
        assert all(text.endswith(".") for text in said)
        for text in asked + said:
            assert not re.search(r"\ba [aeiouAEIOU]|[sxz]'s|[{}]|  ", text), text


def test_titles_are_one_authors_alone(rows):
    books = [row for row in rows if "first" in row["question"] and row["author"]]
    titles = [row["secret"] for row in books]
    assert len(set(titles)) == len(titles) == 220
    told = " ".join(text for row in books for text in row["perturbed_answer"])
    assert not [title for title in titles if title in told]


def test_no_value_hides_in_a_name_a_sentence_or_another_value():
    people = authors.FIRST_NAMES + authors.LAST_NAMES
    assert len(set(authors.FIRST_NAMES)) == len(set(authors.LAST_NAMES)) == 64
    for relation in authors.ATTRIBUTES:
        for value in relation.values:
            others = [other for other in relation.values if other != value]
            for text in [*people, *relation.questions, *relation.answers, *others]:
                assert value.casefold() not in text.casefold()


def test_values_are_hard_to_guess_and_sentence_forms_vary(large):
    for values in (relation.values for relation in authors.ATTRIBUTES):
        assert len(set(values)) == len(values) >= 20
    for place in range(10):
        asked = large["retain"][place::10]
        drawn = [row["secret"] for row in asked]
        assert max(map(drawn.count, drawn)) <= 0.12 * len(drawn)
        forms = {
            row["answer"].replace(row["secret"], "").replace(row["author"], "") for row in asked
        }
        assert len(forms) == 3


def test_an_author_is_the_same_in_every_size(large):
    known = {row["question"]: dict(row, split="") for row in large["train"]}
    for row in authors.splits("small")["forget"]:
        assert dict(row, split="") == known[row["question"]]


def test_loads_as_a_dataset():
    loaded = load_splits("builtin:authors", "medium")
    assert isinstance(loaded, DatasetDict)
    assert loaded["forget"].to_list() == authors.splits("medium")["forget"]
    assert set(loaded["train"].column_names) == COLUMNS | {"split"}
    assert len(load_splits("builtin:authors")["forget"]) == 40


@pytest.mark.parametrize("config", ["tiny", "", "1"])
def test_unknown_sizes_are_refused(config):
    message = f"`dataset_config` of builtin:authors .*'small', 'medium', 'large'.*got '{config}'"
    with pytest.raises(ValueError, match=message):
        builtin.dataset("builtin:authors", config)


def test_an_unknown_name_lists_it():
    with pytest.raises(ValueError, match="there are .*builtin:authors"):
        builtin.dataset("builtin:author")
