"""Rows to forget: how they are read, encoded, drawn and refused."""

import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from llmmix.data import load_role
from llmmix.unlearning import qa
from llmmix.unlearning.parts import PARTS, count_window
from llmmix.unlearning.preparation import check_args
from llmmix.unlearning.rows import EpochSampler, ForgetRows
from llmmix.unlearning.templates import (
    HEADERS,
    REFUSALS,
    clean_templates,
    load_templates,
    resolve_templates,
)

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


@pytest.fixture
def plain(checkpoint):
    """A tokenizer of our own to change."""
    return AutoTokenizer.from_pretrained(checkpoint)


# Encoding


def test_text_is_parted_from_its_answer_and_closed_once(plain):
    eos = plain.eos_token_id
    for prompt, answer, said in (("2+2=", "4", " 4"), ("2+2= ", "4", "4"), ("2+2=", " 4", " 4")):
        ids, start = qa.encode_answer(plain, prompt, answer)
        assert ids[:start] == plain(prompt)["input_ids"]
        assert ids[start:] == [*plain(said)["input_ids"], eos]
        assert plain.decode(ids[:-1]) == prompt + said
    ids, start = qa.encode_answer(plain, "2+2=", "4", include_eos=False)
    assert plain.decode(ids) == "2+2= 4" and eos not in ids


def test_messages_are_scored_from_the_answer_to_its_end(plain):
    eos = plain.eos_token_id
    prompt = [{"role": "user", "content": "2+2?"}]
    opened = plain.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    for include_eos in (True, False):
        ids, start = qa.encode_answer(plain, prompt, "4", include_eos=include_eos)
        assert ids[:start] == opened["input_ids"]
        assert ids[start:] == plain("4")["input_ids"] + [eos] * include_eos


@pytest.mark.parametrize("after", ["\n", "", "{{ eos_token }}", "\nEnd\n"])
def test_what_a_template_writes_after_the_end_is_left_out(plain, after):
    plain.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}"
        + after
        + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids, start = qa.encode_answer(plain, [{"role": "user", "content": "2+2?"}], "4")
    eos = plain.eos_token_id
    said = [token for token in ids[start:] if token != eos]
    assert plain.decode(said).strip() == "4" and ids[-1] == eos


def test_a_tokenizer_that_closes_every_text_closes_the_answer_alone(plain):
    """As Llama's does with `add_eos_token=True`."""
    expected = qa.encode_answer(plain, "2+2=", "4")
    of_text = qa.encode_answer(plain, "", "some text")
    eos = plain.eos_token
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, plain.eos_token_id)]
    )
    assert plain("2+2=")["input_ids"][-1] == plain.eos_token_id
    assert qa.encode_answer(plain, "", "some text") == of_text
    assert qa.encode_answer(plain, "2+2=", "4") == expected


def test_a_first_token_is_never_scored(plain):
    ids, start = qa.encode_answer(plain, "", "some text")
    assert start == 1 and len(ids) > 2
    batch = qa.pad([qa.Encoded(ids, start)])
    assert batch["labels"][0, 0] == -100 and batch["labels"][0, 1:].tolist() == ids[1:]


def test_a_tokenizer_without_an_end_is_taken_as_it_is(plain):
    plain.eos_token = None
    ids, start = qa.encode_answer(plain, "2+2= ", "4")
    assert ids[start:] == plain("4")["input_ids"]


def test_padding_is_known_from_lengths():
    rows = [qa.Encoded([5, 6, 0, 0], 2), qa.Encoded([7, 0], 1)]
    for pad_id in (0, None, 9):
        batch = qa.pad(rows, pad_id)
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert batch["labels"].tolist() == [[-100, -100, 0, 0], [-100, 0, -100, -100]]
        assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [7, 0, pad_id or 0, pad_id or 0]]


def test_text_is_cut_into_rows_without_losing_a_token():
    whole = qa.Encoded(list(range(10)), 1)
    pieces = qa.cut(whole, 4)
    assert [piece.ids for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert {piece.prompt_length for piece in pieces} == {1}
    assert qa.cut(whole, 10) == [whole]
    assert [piece.ids for piece in qa.cut(qa.Encoded(list(range(5)), 1), 4)] == [[0, 1, 2, 3]]
    assert qa.cut(qa.Encoded(list(range(10)), 3), 4) == [qa.Encoded(list(range(10)), 3)]


# Reading


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
    with pytest.raises(ValueError, match="`answer` is empty in every one of 2 rows"):
        read(Dataset.from_dict({"question": ["a", "b"], "answer": ["", " "]}))
    with caplog.at_level(logging.WARNING):
        rows = read(Dataset.from_dict({"question": ["a", "b", "c"], "answer": ["x", None, " "]}))
    assert len(rows) == 1 and rows["answer"][:] == ["x"]
    assert "Dropped 2 of 3 rows of `retain_dataset`: empty `question` or `answer`" in caplog.text


@pytest.mark.parametrize("column", ["question", "prompt"])
def test_a_row_without_a_question_is_dropped_or_refused(plain, column):
    """Not asked as 'None'."""
    rows = Dataset.from_dict(
        {column: ["2+2?", None, "  "], {"question": "answer"}.get(column, "completion"): ["4"] * 3}
    )
    try:
        prompts = qa.read_rows(rows, "train_dataset", plain)["prompt"][:]
    except ValueError as error:
        assert column in str(error)
    else:
        assert len(prompts) == 1


def test_a_stream_to_retain_is_refused_in_words(plain):
    with pytest.raises(ValueError, match="retain_dataset"):
        qa.read_rows(retain_rows().to_iterable_dataset(), "retain_dataset", plain)


def test_overlap_looks_past_case_and_blanks():
    user = [{"role": "user", "content": "Who  is IT?"}]
    assert qa.overlap(["a", "Who is it?"], [user, "b"]) == ["Who is it?"]
    assert qa.overlap([user], ["who is it? "]) == [user]
    assert qa.overlap(["a"], ["b"]) == []


# Templates


def test_our_own_refusals_are_clean():
    assert list(REFUSALS) == clean_templates(list(REFUSALS), "x") and len(REFUSALS) == 32


@pytest.mark.parametrize("header", [*HEADERS, "responses", '"Template"'])
def test_headers_blank_and_repeated_lines_are_left_out(header, tmp_path, caplog):
    file = tmp_path / "own.txt"
    file.write_text(f"{header}\nNo.\n\n \nPass. \nNo.\n", encoding="utf-8")
    assert load_templates(file) == ["No.", "Pass."]
    with caplog.at_level(logging.WARNING):
        clean_templates(["No.", "", "No."], "templates")
    assert "Left out 2 lines of `templates`" in caplog.text


def test_a_file_with_a_byte_order_mark_has_its_header_left_out(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("template\nNo.\n", encoding="utf-8-sig")  # as Excel writes it
    assert load_templates(file) == ["No."]


def test_a_file_of_json_lines(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('"No."\n{"template": "Pass."}\n\n{"template": null}\n')
    assert load_templates(file) == ["No.", "Pass."]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", "7"])
def test_a_broken_line_of_json_is_told_with_its_file(line, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(f'"No."\n{line}\n')
    with pytest.raises(ValueError, match="template_file.*own.jsonl|own.jsonl.*template_file"):
        load_templates(file)


def test_lists_and_files_without_an_answer_are_refused(tmp_path):
    for given in ([], ["", " "], ["template"], ["Response", ""]):
        with pytest.raises(ValueError, match="`templates` holds no answer"):
            resolve_templates(None, given)
        file = tmp_path / "own.txt"
        file.write_text("\n".join(given))
        with pytest.raises(ValueError, match="`template_file` holds no answer"):
            resolve_templates(str(file), None)
    with pytest.raises(FileNotFoundError, match="`template_file`: no file"):
        resolve_templates(str(tmp_path / "none.txt"), None)
    assert resolve_templates(None, None) == REFUSALS


# Draws


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


# What is refused, and what is dropped and counted


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


def test_only_rows_that_can_be_indexed_are_taken():
    stream = forget_rows().to_iterable_dataset()
    for given, what in ((None, "NoneType"), (stream, "IterableDataset"), ([1], "list")):
        with pytest.raises(ValueError, match=f"must be a map-style `Dataset`.*got {what}"):
            check_args(None, given)
    with pytest.raises(ValueError, match="at least one, got no rows"):
        check_args(None, Dataset.from_dict({"text": []}))


# Roles


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
    with pytest.raises(ValueError, match=r"forget: dataset_split`: no split 'train'.*'a', 'b'"):
        load_role(str(tmp_path / "two"), "forget")
    with pytest.raises(ValueError, match="no split 'c'"):
        load_role(str(tmp_path / "two"), "forget", split="c")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_role(str(tmp_path / "none.jsonl"), "retain")


def test_the_builtin_authors_have_both_roles(plain):
    forget = load_role("builtin:authors", "forget")
    retain = load_role("builtin:authors", "retain")
    found = [qa.read_rows(rows, "rows", plain) for rows in (forget, retain)]
    assert all(len(rows) for rows in found)
    assert not qa.overlap(found[0]["prompt"][:], found[1]["prompt"][:])
