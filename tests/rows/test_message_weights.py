"""Weights of messages and of `token_weights`, as weights of tokens."""

import copy
from itertools import groupby

import pytest
from datasets import Dataset
from trl import SFTConfig

from llmmix.rows.formats import check_sft_dataset
from llmmix.rows.message_checks import has_message_weights
from llmmix.rows.message_weights import check_formatted, tell_unread, weigh
from llmmix.steps import split_steps
from tests.rows.test_turns import UNMARKED

# All that a chat of Qwen's kind may do: the tokens of a turn depend on what follows
REWRITING = UNMARKED.replace(
    "message['content'] +", "(message['content'] if loop.last else message['content'][:1]) +"
)
# The turns of two messages that follow one another are one run of tokens
MERGING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)


def chat(*weights, roles="uaua"):
    """A chat of OpenAI's format."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    said = ["2+2?", "4", "And 3+3?", "It is 6."]
    return [
        {"role": names[role], "content": content} | ({} if w is None else {"weight": w})
        for role, content, w in zip(roles, said, weights, strict=False)
    ]


def settings(**given):
    return SFTConfig("out", bf16=False, use_cpu=True, **given)


@pytest.fixture
def unmarked(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = UNMARKED
    return tokenizer


def weighed(rows, tokenizer, stream=False, masks_only="", **given):
    rows = Dataset.from_list(rows)
    rows = rows.to_iterable_dataset() if stream else rows

    def read(rows):
        return check_sft_dataset(rows, "train_dataset", processing_class=tokenizer)

    return weigh(rows, "train_dataset", settings(**given), tokenizer, read, masks_only)


def parts(tokenizer, row):
    """(text, weight) of the scored tokens that stand together and weigh the same."""
    weights = row.get("token_weights") or [1.0] * len(row["labels"])
    pairs = zip(row["labels"], weights, strict=True)
    runs = groupby(pairs, lambda pair: (pair[0] != -100, pair[1]))
    return [
        (tokenizer.decode([label for label, _ in run]), weight)
        for (scored, weight), run in runs
        if scored
    ]


@pytest.mark.parametrize("template", ["marked", "unmarked"])
@pytest.mark.parametrize("stream", [False, True])
def test_turns_have_the_weights_of_their_messages(tokenizer, unmarked, template, stream):
    """Under a template that marks turns, and under SmolLM2's kind, which does not."""
    tokenizer = tokenizer if template == "marked" else unmarked
    rows = [{"messages": chat(None, 0.5, None, None)}, {"messages": chat(None, 0, None, 2)}]
    first, second = weighed(rows, tokenizer, stream, assistant_only_loss=True)
    assert parts(tokenizer, first) == [("4<|im_end|>", 0.5), ("It is 6.<|im_end|>", 1.0)]
    assert parts(tokenizer, second) == [("It is 6.<|im_end|>", 2.0)]
    plain = tokenizer.apply_chat_template(chat(None, None, None, None), return_dict=True)
    assert first["input_ids"] == second["input_ids"] == plain["input_ids"]


def test_a_chat_that_is_scored_whole_weighs_all_that_is_written_for_a_message(unmarked):
    rows = weighed([{"messages": chat(0.5, None, 0.25, 0)}], unmarked)
    assert parts(unmarked, rows[0]) == [
        ("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n", 0.5),
        ("<|im_start|>assistant\n4<|im_end|>\n", 1.0),
        ("<|im_start|>user\nAnd 3+3?<|im_end|>\n", 0.25),
    ]


@pytest.mark.parametrize("only", [False, True])
def test_a_completion_of_messages(tokenizer, only):
    prompt, completion = chat(None, None, None), chat(None, None, None, 0.5)[3:]
    row = {"prompt": prompt, "completion": completion}
    (row,) = weighed([row], tokenizer, assistant_only_loss=only)
    end = "" if only else "\n"  # TRL scores what the template writes behind a turn
    assert parts(tokenizer, row) == [(f"It is 6.<|im_end|>{end}", 0.5)]


def test_masks_are_labels_and_a_row_without_any_is_dropped(tokenizer):
    """OpenAI's format: what weighs 0 or 1 needs no more than labels, and so passes all trainers."""
    rows = [{"messages": chat(None, 0, None, 1)}, {"messages": chat(None, 0, None, 0)}]
    for given in ({"packing": True}, {"masks_only": "p is of all"}):
        kept = weighed(rows, tokenizer, assistant_only_loss=True, **given)
        assert "token_weights" not in kept.column_names and len(kept) == 1
        assert parts(tokenizer, kept[0]) == [("It is 6.<|im_end|>", 1.0)]
    plain = Dataset.from_list([{"messages": chat(None, None)}])
    assert has_message_weights(Dataset.from_list(rows)) and not has_message_weights(plain, None)
    assert "input_ids" not in weighed([{"messages": chat(None, None)}], tokenizer).column_names


def test_tokens_with_weights_of_their_own(tokenizer):
    row = {"input_ids": [5, 6, 7], "token_weights": [0.0, 2.0, None], "completion_mask": [1, 1, 0]}
    (made,) = weighed([row], tokenizer)
    assert made["labels"] == [-100, 6, -100] and made["token_weights"] == [0.0, 2.0, 1.0]
    (made,) = weighed([row], tokenizer, completion_only_loss=False)
    assert made["labels"] == [-100, 6, 7]


TOKENS = {"input_ids": [5, 6], "token_weights": [1.0, 0.5]}
ONLY = {"assistant_only_loss": True}
BAD = {
    "negative": ([{"messages": chat(None, -1)}], {}, "row 0: `weight` of message 1 .* is -1"),
    "text": ([{"messages": chat(None, "0")}], {}, "row 0: .*'0', of type str"),
    "user": ([{"messages": chat(1, None)}], ONLY, "row 0: .* 'user' says, weighs what is not"),
    "prompt": (
        [{"prompt": chat(0.5), "completion": chat(None, None)[1:]}],
        {},
        "message 0 of `prompt`.*completion_only_loss=False",
    ),
    "packed": ([{"messages": chat(None, 0.5)}], {"packing": True}, "0.5, and `packing=True` keeps"),
    "packed rows": ([{"text": "a", "weight": 0.5}], {"packing": True}, "no `weight` of a row"),
    "sequence": ([{"messages": chat(None, 2)}], {"masks_only": "p is of all"}, "2, and p is of"),
    "sequence's tokens": ([TOKENS], {"masks_only": "p is of all"}, "at 1 is 0.5, and p is of all"),
    "length": ([TOKENS, TOKENS | {"input_ids": [5]}], {}, "row 1.* has 2 entries, and .* has 1"),
    "token": ([TOKENS | {"token_weights": [1.0, -1.0]}], {}, "row 0: `token_weights` at 1 is -1"),
    "no ids": ([{"text": "a", "token_weights": [1.0]}], {}, "no `input_ids`"),
    "none left": ([{"messages": chat(None, 0, None, 0)}], ONLY, "leave no token to score"),
    "template": (
        [{"messages": chat(None, 1)}],
        {"chat_template_path": "someone/model"},
        "is no file",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_weights_are_refused(tokenizer, name, stream):
    rows, given, message = BAD[name]
    if stream and name == "none left":
        return  # a stream is not known whole
    with pytest.raises(ValueError, match=message):
        list(weighed(rows, tokenizer, stream, **given))


@pytest.mark.parametrize(
    ("template", "messages", "given", "message"),
    [
        (MERGING, chat(None, 1, 0.5, roles="uaa"), ONLY, "marks 1 turns .* the chat has 2"),
        (REWRITING, chat(None, None, None, 0), {}, "writes the messages before message 3"),
        (UNMARKED, chat(1, None, None, roles="aua"), ONLY, "the chat begins with it"),
    ],
    ids=["merged", "rewritten", "opening"],
)
def test_messages_that_cannot_be_told_apart(tokenizer, template, messages, given, message):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    rows = [{"messages": chat(None, None)}, {"messages": messages}]
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        weighed(rows, tokenizer, **given)


def test_a_step_has_the_weight_of_its_message_and_of_its_row(tokenizer):
    rows = Dataset.from_list([{"messages": chat(None, 0.5, None, None), "weight": 3}])
    steps = split_steps(rows, tokenizer)
    assert steps["weight"][:] == [1.5, 3.0]
    assert not any("weight" in said for row in steps for said in row["prompt"] + row["completion"])
    for bad, message in ((chat(None, -1), "message 1 .* is -1"), (chat(0.5), "'user' says")):
        rows = Dataset.from_list([{"messages": chat(None, None)}, {"messages": bad}])
        with pytest.raises(ValueError, match=f"row 1: .*{message}"):
            split_steps(rows, tokenizer)
    rows = Dataset.from_list([{"prompt": "2+2?", "steps": ["4", "so 4"], "weight": 3}])
    assert split_steps(rows, tokenizer)["weight"][:] == [3, 3]


def test_a_stream_whose_first_row_has_no_weights_must_have_none(tokenizer):
    rows = [{"messages": chat(None, None)}, {"messages": chat(None, 0.5)}]
    with pytest.raises(ValueError, match="row 1: .* the first row of a stream"):
        list(weighed(rows, tokenizer, stream=True))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [m | {"loss": m["role"] == "assistant"} for m in chat(None, None)]}, "loss"),
        ({"prompt": "a", "completion": "b", "loss_weight": 0.5}, "loss_weight"),
    ],
    ids=["message", "row"],
)
def test_what_others_call_a_weight_is_not_passed_over_in_silence(tokenizer, caplog, row, name):
    weighed([row], tokenizer)
    assert f"has `{name}`, which is not read. A weight is called `weight`" in caplog.text


def test_what_does_not_read_weights_says_so(caplog):
    check_formatted(Dataset.from_list([{"messages": chat(None, 1)}]), "train_dataset")
    assert "makes text, and no `weight` of a message counts" in caplog.text
    tell_unread(Dataset.from_list([{"messages": chat(None, 1)}]), "domains", "TRL's trainer", "a")
    assert "`domains` has weights (`weight`, `token_weights`). TRL's trainer reads none" in (
        caplog.text
    )
