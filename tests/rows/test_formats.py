"""Rows of any shape are read as they are meant, or dropped, counted and named."""

import copy
import datetime
import json
import logging
import math

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from llmmix import DCOConfig, DCOTrainer, RPOConfig, RPOTrainer, SFTMixConfig, SFTMixTrainer
from llmmix.data import load_splits
from llmmix.rows.formats import check_preference_dataset, check_rows_type, check_sft_dataset
from llmmix.rows.messages import UnreadableCell, folded, messages_of, spoken, text_of
from llmmix.unlearning.qa import read_rows

QUIET = {"bf16": False, "max_steps": 1, "disable_tqdm": True, "use_cpu": True}
CALL = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]


def said(text, role="assistant"):
    return {"role": role, "content": text}


def chat(*texts):
    """The user and the assistant in turns."""
    return [said(text, ("user", "assistant")[i % 2]) for i, text in enumerate(texts)]


def read(tokenizer, *rows, check=check_sft_dataset):
    return check(Dataset.from_list(list(rows)), "rows", processing_class=tokenizer)[:]


def answers(tokenizer, *rows):
    made = read_rows(Dataset.from_list(list(rows)), "rows", tokenizer)
    return made["prompt"][:], made["answer"][:]


@pytest.fixture
def plain(tokenizer):
    """The tokenizer without its chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("as it is ", "as it is "),
        (None, ""),
        (math.nan, ""),
        (0, "0"),
        (1987.0, "1987"),
        (0.5, "0.5"),
        (True, "True"),
        (datetime.date(1987, 5, 3), "1987-05-03"),
        (datetime.datetime(1987, 5, 3), "1987-05-03"),
        (datetime.datetime(1987, 5, 3, 10, 30), "1987-05-03 10:30:00"),
    ],
)
def test_a_cell_as_text(cell, text):
    assert text_of(cell) == text


@pytest.mark.parametrize("cell", [["Paris", "paris"], {"text": ["Paris"]}, b"Paris"])
def test_a_cell_that_is_no_text(cell):
    with pytest.raises(UnreadableCell, match=f"of type {type(cell).__name__} where one text"):
        text_of(cell)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"role": "assistant", "content": None}, said("")),
        ({"from": "human", "value": "a"}, said("a", "user")),
        ({"from": "gpt", "value": "a"}, said("a")),
        ({"from": "chatgpt", "value": "a"}, said("a")),
        ({"role": "human", "content": "a"}, said("a", "user")),
        ({"from": "system", "value": "a"}, said("a", "system")),
        ({"from": "observation", "value": "a"}, said("a", "tool")),
        ({"role": "user", "content": 7}, said("7", "user")),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]},
            said("abc", "user"),
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": CALL},
            said("") | {"tool_calls": CALL},
        ),
    ],
)
def test_a_message_in_one_form(given, read):
    assert messages_of([given]) == messages_of(given) == [read]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"content": "a"}, "without a `role`"),
        ("a", "of type str"),
        ({"role": "user", "content": [{"type": "image", "url": "a.png"}]}, "part of type 'image'"),
    ],
)
def test_a_message_that_says_nothing(message, fault):
    with pytest.raises(UnreadableCell, match=fault):
        messages_of([message])


ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
SHAREGPT = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
ASKED = chat("2+2?", "4")


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (ALPACA, chat("Add.\n\n2 and 2"), "4"),
        (ALPACA | {"input": None}, chat("Add."), "4"),
        (
            ALPACA | {"system": "Be brief."},
            [said("Be brief.", "system"), *chat("Add.\n\n2 and 2")],
            "4",
        ),
        ({"question": "2+2?", "answer": 4}, ASKED[:1], "4"),
        (
            {"question": "Born?", "answer": datetime.datetime(1987, 5, 3)},
            chat("Born?"),
            "1987-05-03",
        ),
        ({"prompt": "2+2=", "completion": ASKED[1:]}, chat("2+2="), "4"),
        ({"prompt": ASKED[:1], "completion": "4"}, ASKED[:1], "4"),
    ],
)
def test_what_asks_and_what_answers_is_the_same_in_every_trainer(tokenizer, row, prompt, answer):
    made = read(tokenizer, row)
    assert (made["prompt"], made["completion"]) == ([prompt], [[said(answer)]])
    assert answers(tokenizer, row) == ([prompt], [answer])
    if "completion" not in row:
        reply = {"chosen": answer, "rejected": "no"}
        pair = read(tokenizer, row | reply, check=check_preference_dataset)
        assert pair["prompt"] == [prompt]
        assert (pair["chosen"], pair["rejected"]) == ([[said(answer)]], [[said("no")]])


def test_without_a_template_a_question_is_text(plain):
    text = "Question: Add.\n\n2 and 2\nAnswer:"
    made = read(plain, ALPACA)
    assert (made["prompt"], made["completion"]) == ([text], [" 4"])
    assert answers(plain, ALPACA) == ([text], ["4"])
    pair = {"question": "2+2?", "chosen": "4", "rejected": " 5"}
    made = read(plain, pair, check=check_preference_dataset)
    assert (made["chosen"], made["rejected"]) == ([" 4"], [" 5"])


def test_text_stays_as_it_stands_whatever_the_template(tokenizer, plain):
    row = {"prompt": "2+2=", "completion": "4"}
    for each in (tokenizer, plain):
        assert read(each, row) == {"prompt": ["2+2="], "completion": ["4"]}
        assert answers(each, row) == (["2+2="], ["4"])


def test_chats_of_any_shape(tokenizer):
    assert read(tokenizer, SHAREGPT) == {"messages": [ASKED]}
    assert answers(tokenizer, SHAREGPT) == ([ASKED[:1]], ["4"])
    long = chat("2+2?", "4", "And 3+3?", "6")
    assert answers(tokenizer, {"messages": long}) == ([long[:3]], ["6"])
    made = read(tokenizer, SHAREGPT | {"system": "Be brief."})
    assert made["messages"] == [[said("Be brief.", "system"), *ASKED]]
    assert made["system"] == ["Be brief."]
    # a `prompt` beside `messages` would make TRL look for a completion
    assert read(tokenizer, {"prompt": "2+2?", "messages": ASKED}) == {"messages": [ASKED]}


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"prompt": "2+2?", "chosen": ASKED, "rejected": chat("2+2?", "5")},
        {"prompt": ASKED[:1], "chosen": ASKED, "rejected": chat("2+2?", "5")},
        {"chosen": ASKED, "rejected": chat("2+2?", "5")},
        {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": "5"},
        {"question": "2+2?", "chosen": "4", "rejected": "5"},
    ],
)
def test_preferences_of_any_shape(tokenizer, row):
    made = read(tokenizer, row, check=check_preference_dataset)
    made.pop("question", None)
    assert made == {"prompt": [ASKED[:1]], "chosen": [ASKED[1:]], "rejected": [[said("5")]]}


def test_what_comes_before_the_last_turn_of_a_completion_is_context(tokenizer):
    """The calls of an answer to forget, and what the tool said, are not lost."""
    calls = [{"role": "assistant", "content": None, "tool_calls": CALL}, said("4", "tool")]
    row = {"prompt": chat("2+2?"), "completion": [*calls, said("It is 4.")]}
    ((prompt,), said_last) = answers(tokenizer, row)
    assert said_last == ["It is 4."]
    assert [message["content"] for message in prompt] == ["2+2?", "", "4"]
    assert prompt[1]["tool_calls"] == CALL
    again = read_rows(read_rows(Dataset.from_list([row]), "rows", tokenizer), "rows", tokenizer)
    assert again["prompt"][:] == [prompt]


def test_messages_of_changing_keys_are_kept(tokenizer, tmp_path):
    """The first rows, by whose types a file is written, have neither calls nor parts."""
    last = [*ASKED[:1], {"role": "assistant", "content": None, "tool_calls": CALL}]
    last += [said("4", "tool"), said([{"type": "text", "text": "It is 4."}])]
    rows = [*[{"messages": ASKED}] * 1000, {"messages": last}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = load_splits(str(tmp_path / "rows.jsonl"))["train"]
    calling = [ASKED[0], said("") | {"tool_calls": CALL}, said("4", "tool")]
    made = check_sft_dataset(rows, "rows", processing_class=tokenizer)
    assert made[0] == {"messages": ASKED}
    assert made[-1] == {"messages": [*calling, said("It is 4.")]}
    assert read_rows(rows, "rows", tokenizer)[-1] == {"prompt": calling, "answer": "It is 4."}


def test_rows_in_trls_form_are_returned_as_they_are(tokenizer):
    for row in ({"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": ASKED}):
        rows = Dataset.from_list([row])
        assert check_sft_dataset(rows, "rows", processing_class=tokenizer) is rows


def test_it_is_said_how_rows_are_read(tokenizer, caplog):
    read(tokenizer, ALPACA)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "`instruction`, `output`, `input` read as a question" in told[0]


SFT_FAULTS = [
    ({"prompt": "a", "completion": "  "}, "`completion` is empty"),
    ({"prompt": "a", "completion": None}, "`completion` is empty"),
    ({"prompt": None, "completion": "a"}, "`prompt` is empty"),
    ({"prompt": " ", "completion": "a"}, "`prompt` is empty"),
    ({"prompt": [], "completion": [said("a")]}, "`prompt` is empty"),
    ({"prompt": chat("a"), "completion": [said("")]}, "`completion` is empty"),
    ({"prompt": chat("a"), "completion": []}, "`completion` is empty"),
    ({"messages": chat("a", " ")}, "`messages` is empty"),
    ({"messages": chat("a")}, "`messages` has no assistant turn"),
    ({"messages": None}, "`messages` is empty"),
    ({"conversations": SHAREGPT["conversations"][:1]}, "`conversations` has no assistant turn"),
    ({"messages": [{"role": None, "content": "a"}]}, "`messages` has a message without a `role`"),
    ({"text": "\n"}, "`text` is empty"),
    ({"question": None, "answer": "a"}, "`question` is empty"),
    (ALPACA | {"output": ""}, "`output` is empty"),
]
FULL = (
    {
        "prompt": "a",
        "completion": "b",
        "messages": ASKED,
        "text": "b",
        "question": "a",
        "answer": "b",
    }
    | ALPACA
    | SHAREGPT
)


@pytest.mark.parametrize(("blank", "fault"), SFT_FAULTS)
@pytest.mark.parametrize("stream", [False, True])
def test_rows_with_an_empty_cell_are_dropped_and_named(blank, fault, stream, tokenizer, caplog):
    good = {key: FULL[key] for key in blank}
    if isinstance(blank.get("prompt", blank.get("completion")), list):
        good = {"prompt": chat("a"), "completion": [said("b")]}
    rows = Dataset.from_list([good, blank, good])
    rows = rows.to_iterable_dataset() if stream else rows
    with caplog.at_level(logging.WARNING):
        kept = check_sft_dataset(rows, "train_dataset", processing_class=tokenizer)
        assert len(list(kept)) == 2
    told = f"Dropped 1 of 3 rows of `train_dataset`: {fault} in 1 (first: row 1)."
    assert (f"Dropped row 1 of `train_dataset`: {fault}." if stream else told) in caplog.text


@pytest.mark.parametrize(
    ("blank", "fault"),
    [
        ({"prompt": None, "chosen": "b", "rejected": "c"}, "`prompt` is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "`rejected` is empty"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "`chosen` is empty"),
        ({"chosen": ASKED, "rejected": chat("2+2?")}, "`rejected` has no assistant turn"),
        ({"chosen": ASKED[1:], "rejected": [said("5")]}, "there is no prompt"),
        ({"chosen": ASKED, "rejected": chat("3+3?", "5")}, "`prompt` is empty"),
    ],
)
def test_preferences_with_an_empty_cell_are_dropped_and_named(blank, fault, tokenizer, caplog):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    good = good if "prompt" in blank else {"chosen": ASKED, "rejected": chat("2+2?", "5")}
    kept = read(tokenizer, good, blank, check=check_preference_dataset)
    assert len(kept["chosen"]) == 1
    assert f"{fault} in 1 (first: row 1)" in caplog.text


def test_answers_in_lists_are_named(tokenizer):
    """Any of several texts cannot be trained on."""
    rows = Dataset.from_dict({"question": ["a"], "answer": [["b", "c"]]})
    for reader in (check_sft_dataset, read_rows):
        with pytest.raises(
            ValueError, match="can be used: `answer` is of type list where one text"
        ):
            reader(rows, "rows", *[tokenizer] * (reader is read_rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "`train_dataset` is required"),
        (Dataset.from_dict({"prompt": []}), "`train_dataset` is empty"),
        (Dataset.from_dict({"query": ["a"], "reply": ["b"]}), r"\['query', 'reply'\]; accepted"),
        (
            Dataset.from_dict({"prompt": ["a"], "completion": [" "]}),
            "none of its 1 rows can be used: `completion` is empty in 1",
        ),
    ],
)
def test_sft_rows_that_cannot_be_trained_on(rows, message):
    with pytest.raises(ValueError, match=message):
        check_sft_dataset(rows, "train_dataset")


def test_columns_without_preferences_are_named(preference_rows):
    with pytest.raises(ValueError, match="accepted are `chosen` and `rejected`"):
        check_preference_dataset(preference_rows.remove_columns("chosen"), "train_dataset")


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ("rows.jsonl", r"got str. Load 'rows.jsonl' first, such as .*load_splits\('rows.jsonl'\)"),
        (
            DatasetDict(train=Dataset.from_dict({"a": [1]})),
            r"such as `dataset\['train",
        ),
        ({"forget": Dataset.from_dict({"a": [1]})}, r"such as `dataset\['forget'\]`"),
        ([{"text": "a"}], "got list. Make one: `datasets.Dataset.from_list`"),
    ],
)
def test_what_is_no_dataset_is_told_how_to_become_one(given, way):
    with pytest.raises(TypeError, match=way):
        check_rows_type(given, "train_dataset")


def test_text_in_any_form_of_unicode_is_the_same(tokenizer):
    composed, apart = "Caf\u00e9 Z\u00fcrich", "Cafe\u0301  ZU\u0308RICH"
    assert folded(composed) == folded(apart) and folded(composed) != folded("Cafe Zurich")
    asks = [said("", "assistant") | {"tool_calls": CALL}]
    other = [said("", "assistant") | {"tool_calls": [{"type": "function"}]}]
    assert spoken(asks) == spoken(copy.deepcopy(asks)) != spoken(other)


def test_chat_rows_need_a_template(checkpoint, math_rows, preference_rows):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = None
    for trainer, config, rows in (
        (DCOTrainer, DCOConfig, math_rows),
        (SFTMixTrainer, SFTMixConfig, math_rows),
        (RPOTrainer, RPOConfig, preference_rows),
    ):
        with pytest.raises(ValueError, match="tokenizer has no chat template"):
            trainer(
                checkpoint,
                args=config("out", **QUIET),
                train_dataset=rows,
                processing_class=tokenizer,
            )


def test_a_question_is_trained_in_the_template_of_a_tokenizer_that_was_not_given(checkpoint):
    rows = Dataset.from_list([{"question": "2+2?", "answer": "4"}] * 2)
    trainer = DCOTrainer(checkpoint, DCOConfig("out", **QUIET), train_dataset=rows)
    row = trainer.train_dataset[0]
    whole = trainer.processing_class.apply_chat_template(ASKED, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole
    scored = [token for token in row["labels"] if token != -100]
    assert trainer.processing_class.decode(scored).strip() == "4<|im_end|>"


def test_a_system_column_stands_before_a_chat(tokenizer):
    rows = Dataset.from_list([{"messages": ASKED, "system": "Be brief."}])
    (row,) = check_sft_dataset(rows, "rows", processing_class=tokenizer)
    assert row["messages"] == [{"role": "system", "content": "Be brief."}, *ASKED]


def test_a_chat_that_ends_in_an_empty_turn_is_dropped(tokenizer, caplog):
    rows = Dataset.from_list(
        [{"messages": [*ASKED, said("3", "user"), said(None)]}, {"messages": ASKED}]
    )
    assert len(check_sft_dataset(rows, "rows", processing_class=tokenizer)) == 1
    assert "ends in an empty turn of the assistant" in caplog.text
