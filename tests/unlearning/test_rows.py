"""Rows to forget: how they are encoded, drawn and refused."""

import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict

from llmmix.data import load_role
from llmmix.unlearning import qa
from llmmix.unlearning.parts import PARTS, count_window
from llmmix.unlearning.rows import EpochSampler, ForgetRows

TEMPLATES = [f"No idea {n}." for n in range(20)]


def forget_rows(n=6):
    return Dataset.from_dict(
        {
            "prompt": [f"What is {i}+1? " for i in range(n)],
            "answer": [str(i + 1) * (1 + i % 3) for i in range(n)],
        }
    )


def retain_rows(n=9):
    return Dataset.from_dict(
        {"prompt": [f"And {i}*2? " for i in range(n)], "answer": [str(2 * i) for i in range(n)]}
    )


@pytest.fixture
def build(tokenizer):
    def build(rows=None, **given):
        given = {"retain": retain_rows(), "templates": TEMPLATES, **given}
        return ForgetRows(forget_rows() if rows is None else rows, tokenizer, **given)

    return build


def draws(rows, epoch):
    """The template and the retained row of each row in an epoch."""
    items = [rows[epoch * len(rows) + row] for row in range(len(rows))]
    return [item["template"].ids for item in items], [item["retain"].ids for item in items]


def test_draws_depend_on_seed_epoch_and_row_alone(build):
    one, other = build(seed=1), build(seed=1)
    first = draws(one, 0)
    assert first == draws(one, 0) == draws(other, 0)  # whatever was drawn before
    assert draws(one, 5) == draws(other, 5)
    for changed in (draws(one, 1), draws(build(seed=2), 0)):
        assert changed[0] != first[0] and changed[1] != first[1]
    # each row has draws of its own
    assert len({tuple(ids) for ids in draws(build(forget_rows(30)), 0)[1]}) > 3
    # rows that are there too do not matter
    fewer = build(forget_rows(4), seed=1)
    assert draws(fewer, 3)[0] == draws(one, 3)[0][:4]


def test_templates_stay_where_they_are_not_drawn_anew(build):
    rows = build(resample=False)
    templates, retained = zip(*(draws(rows, epoch) for epoch in range(4)), strict=True)
    assert all(drawn == templates[0] for drawn in templates)
    assert len({str(drawn) for drawn in retained}) == 4  # rows to retain are drawn all the same


def test_draws_are_uniform(build):
    rows = build(forget_rows(5))
    counts = torch.zeros(20)
    for epoch in range(400):
        for row in range(5):
            counts[rows.template_of(row, epoch)] += 1
    expected = 2000 / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-squared, 19 degrees, 0.1%


def test_every_row_once_an_epoch_in_an_order_of_the_epoch():
    epoch = 0
    sampler = EpochSampler(10, seed=3, epoch=lambda: epoch)
    first = list(sampler)
    assert first == list(EpochSampler(10, 3, lambda: 0)) and sorted(first) == list(range(10))
    epoch = 2
    third = list(sampler)
    assert sorted(third) == list(range(20, 30)) and [i % 10 for i in third] != first
    assert list(EpochSampler(10, 4, lambda: 0)) != first and len(sampler) == 10


def test_a_template_answers_the_rows_own_question(build, tokenizer):
    rows = build(parts=("template", "forget"))
    for row in range(len(rows)):
        template, forget = rows[row]["template"], rows[row]["forget"]
        start = forget.prompt_length
        assert template.prompt_length == start and template.ids[:start] == forget.ids[:start]
        assert tokenizer.decode(template.ids[start:-1]) in TEMPLATES
        assert template.ids[-1] == forget.ids[-1] == tokenizer.eos_token_id


def test_a_batch_holds_the_parts_in_order(build):
    rows = build()
    items = [rows[i] for i in (0, 3, 5)]
    batch = rows.collate(items)
    assert batch["input_ids"].shape[0] == 9 and batch["row"].tolist() == [0, 3, 5]
    for place, part in enumerate(PARTS):
        for i, item in enumerate(items):
            n = int(batch["attention_mask"][3 * place + i].sum())
            assert batch["input_ids"][3 * place + i, :n].tolist() == item[part].ids
    counts = count_window(None, [batch, batch], PARTS, "cpu")
    for part in PARTS:
        scored = sum(len(item[part].ids) - item[part].prompt_length for item in items)
        assert counts[part].tolist() == [6, 2 * scored]


def test_parts_that_are_not_asked_for_are_not_made(build):
    item = build(parts=("forget",), retain=None)[0]
    assert set(item) == {"row", "forget"}
    assert build(parts=("forget", "retain")).collate([build()[0]])["input_ids"].shape[0] == 2


def test_first_tokens_are_skipped_but_never_the_last(build, tokenizer):
    rows = build(parts=("forget",), skip_tokens=2)
    plain = build(parts=("forget",))
    for skipped, whole in zip(rows.forget, plain.forget, strict=True):
        assert skipped.ids == whole.ids
        scored = len(whole.ids) - whole.prompt_length
        assert len(skipped.ids) - skipped.prompt_length == max(scored - 2, 1)


def test_rows_that_are_too_long_are_dropped_and_counted(build, caplog):
    rows = build(parts=("forget", "retain"))
    lengths = sorted(len(e.ids) for e in rows.forget)
    with caplog.at_level(logging.WARNING):
        kept = build(parts=("forget", "retain"), max_length=lengths[3])
    expected = sum(n <= lengths[3] for n in lengths)
    assert len(kept) == expected < 6
    assert f"Dropped {6 - expected} of 6 rows to forget: longer than max_length" in caplog.text
    with pytest.raises(ValueError, match="None of the 6 rows to forget .* `max_length=5`"):
        build(max_length=5)
    long = Dataset.from_dict({"prompt": ["a " * 200], "answer": ["b"]})
    with pytest.raises(ValueError, match="None of the 1 rows to retain"):
        build(retain=long, max_length=100)
    # with templates, the longest of them counts
    with pytest.raises(ValueError, match="None of the 6 rows to forget"):
        build(templates=["short", "x " * 100], max_length=100)


def test_a_row_keeps_its_own_template_when_others_are_dropped(build, tokenizer):
    rows = forget_rows(4).to_list()
    rows[1]["answer"] = "9" * 150
    rows = [{**row, "template": f"Own {n}."} for n, row in enumerate(rows)]
    kept = build(Dataset.from_list(rows), max_length=100)
    assert len(kept) == 3 and [t[0] for t in kept.templates] == ["Own 0.", "Own 2.", "Own 3."]
    assert tokenizer.decode(kept[1]["template"].ids[:-1]).endswith("Own 2.")
    assert tokenizer.decode(kept[1]["forget"].ids[:-1]) == "What is 2+1? 333"


def test_text_is_trained_on_in_pieces_of_max_length(build):
    text = Dataset.from_dict({"prompt": ["", ""], "answer": ["1+1=2 " * 30 + "3", "2+2=4"]})
    rows = build(text, parts=("forget",), max_length=20)
    assert len(rows) > 3 and max(len(e.ids) for e in rows.forget) == 20
    whole = build(text, parts=("forget",))
    ids = [token for e in rows.forget for token in e.ids]
    assert ids == [token for e in whole.forget for token in e.ids]


def test_rows_with_nothing_to_score_are_counted_or_refused(build, caplog):
    """One token of text, which nothing predicts, and no end-of-sequence token."""
    text = Dataset.from_dict({"prompt": ["", ""], "answer": ["1", "12+3"]})
    options = {"parts": ("forget",), "include_eos": False}
    with caplog.at_level(logging.WARNING):
        assert len(build(text, **options)) == 1
    assert "1 of 2" in caplog.text
    with pytest.raises(ValueError, match="forget"):
        build(text.select([0]), **options)


def test_text_has_no_question_for_a_template(build):
    text = Dataset.from_dict({"prompt": [""], "answer": ["some text"]})
    with pytest.raises(ValueError, match="Row 0 has no question for a template to answer"):
        build(text, parts=("template", "forget"))


def test_what_is_to_be_forgotten_and_retained_is_refused(build):
    both = Dataset.from_dict({"prompt": ["x ", "what  is 3+1?"], "answer": ["y", "z"]})
    with pytest.raises(ValueError, match=r"1 questions or texts stand both among.*What is 3\+1"):
        build(retain=both)


def test_text_that_is_to_be_forgotten_and_retained_is_refused(build):
    text = Dataset.from_dict({"prompt": ["", ""], "answer": ["some text", "other text"]})
    with pytest.raises(ValueError, match="both"):
        build(text, retain=text.select([1]), parts=("forget", "retain"))


def test_a_template_that_is_the_answer_is_refused(build):
    with pytest.raises(ValueError, match="Row 2 is to forget '333', which is one of its templates"):
        build(templates=["No.", " 333 "])
    rows = Dataset.from_dict(
        {"prompt": ["a"], "answer": ["I  KNOW it."], "template": ["i know it."]}
    )
    with pytest.raises(ValueError, match="Row 0 is to forget"):
        build(rows)
    build(rows, parts=("forget",))  # where no template is used


@pytest.mark.parametrize("empty", ["", "  ", None, [], [""]])
def test_an_empty_template_of_a_row_is_refused(build, empty):
    given = [["No."], empty] if isinstance(empty, list) else ["No.", empty]
    rows = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["c", "d"], "template": given})
    with pytest.raises(ValueError, match=r"`template` is empty in 1 rows \(first: row 1\)"):
        build(rows)


def test_a_function_that_gives_no_template_is_refused(build):
    with pytest.raises(ValueError, match="`templates` holds no answer"):
        build(templates=lambda row: [])


def test_a_role_is_a_split_or_the_only_one(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    assert load_role(str(file), "forget")["question"][:] == ["a"]
    splits = {
        name: Dataset.from_dict({"text": [name]}) for name in ("train", "forget", "retain", "x")
    }
    DatasetDict(splits).save_to_disk(tmp_path / "roles")
    for role in ("forget", "retain"):
        assert load_role(str(tmp_path / "roles"), role)["text"][:] == [role]
    assert load_role(str(tmp_path / "roles"), "forget", split="x")["text"][:] == ["x"]
    assert load_role(str(tmp_path / "roles"), "holdout")["text"][:] == ["train"]
    DatasetDict(only=splits["x"]).save_to_disk(tmp_path / "only")
    assert load_role(str(tmp_path / "only"), "forget")["text"][:] == ["x"]


def test_a_role_without_its_rows(tmp_path):
    with pytest.raises(ValueError, match="`dataset_name` is missing"):
        load_role(None, "forget")
    two = {name: Dataset.from_dict({"text": [name]}) for name in ("a", "b")}
    DatasetDict(two).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="`dataset_train_split`: no split 'train'.*'a', 'b'"):
        load_role(str(tmp_path / "two"), "forget")
    with pytest.raises(ValueError, match="no split 'c'"):
        load_role(str(tmp_path / "two"), "forget", split="c")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_role(str(tmp_path / "none.jsonl"), "retain")
    named = {"arguments": ("retain_dataset_name", "retain_dataset_split")}
    with pytest.raises(FileNotFoundError, match="`retain_dataset_name`: no file or folder"):
        load_role(str(tmp_path / "none.jsonl"), "retain", **named)
    with pytest.raises(ValueError, match="`retain_dataset_split`: no split 'c'"):
        load_role(str(tmp_path / "two"), "retain", split="c", **named)


def test_the_builtin_authors_have_both_roles(plain):
    forget = load_role("builtin:authors", "forget")
    retain = load_role("builtin:authors", "retain")
    found = [qa.read_rows(rows, "rows", plain) for rows in (forget, retain)]
    assert all(len(rows) for rows in found)
    assert not qa.overlap(found[0]["prompt"][:], found[1]["prompt"][:])
