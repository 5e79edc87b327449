"""The assistant's turns are found under templates that do not mark them."""

import copy
import logging

import pytest
from datasets import Dataset

from llmmix import DCOConfig, DCOTrainer, SFTMixConfig, SFTMixTrainer
from llmmix.rows.turns import assistant_turns, needs_own_turns

QUIET = {"bf16": False, "max_steps": 1, "disable_tqdm": True, "use_cpu": True}
# As SmolLM2's: a system message of its own, no marks, and a newline behind the end of a turn
UNMARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "It is 6."},
]


@pytest.fixture
def unmarked(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = UNMARKED
    return tokenizer


def scored(tokenizer, row):
    """The scored tokens as text, parted where others stand between them."""
    runs = [[]]
    for label in row["labels"]:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_the_turns_of_a_chat_without_marks(unmarked):
    ids, said = assistant_turns(unmarked, CHAT)
    assert ids == unmarked.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    labels = [token if mine else -100 for token, mine in zip(ids, said, strict=True)]
    assert scored(unmarked, {"labels": labels}) == ["4<|im_end|>", "It is 6.<|im_end|>"]
    _, said = assistant_turns(unmarked, CHAT[1:2])
    assert not any(said)  # nothing asks for a turn that opens the chat


def test_the_same_turns_as_a_template_marks(tokenizer, unmarked):
    """The turns that a marking template tells are those that are found in it without its marks."""
    assert needs_own_turns(unmarked) and not needs_own_turns(tokenizer)
    found = tokenizer.apply_chat_template(
        CHAT, return_dict=True, tokenize=True, return_assistant_tokens_mask=True
    )
    ids, said = assistant_turns(tokenizer, CHAT)
    assert ids == found["input_ids"]
    assert said == [bool(mine) for mine in found["assistant_masks"]]


def test_a_template_that_rewrites_what_came_before_is_refused(unmarked):
    unmarked.chat_template = UNMARKED.replace(
        "message['content'] +", "(message['content'] if loop.last else message['content'][:1]) +"
    )
    with pytest.raises(ValueError, match="writes message 1 otherwise when more follow"):
        assistant_turns(unmarked, [CHAT[0], CHAT[3], *CHAT[2:]])


@pytest.mark.parametrize(
    ("trainer", "config", "kind"),
    [
        (DCOTrainer, DCOConfig, "messages"),
        (DCOTrainer, DCOConfig, "completion"),
        (DCOTrainer, DCOConfig, "stream"),
        (SFTMixTrainer, SFTMixConfig, "messages"),
    ],
)
def test_trainers_score_the_assistant_alone(
    checkpoint, unmarked, trainer, config, kind, tmp_path, caplog
):
    chats = kind != "completion"
    row = {"messages": CHAT} if chats else {"prompt": CHAT[:3], "completion": CHAT[3:]}
    rows = Dataset.from_list([row | {"confidence": place / 4} for place in range(4)])
    rows = rows.to_iterable_dataset() if kind == "stream" else rows
    args = config(str(tmp_path), assistant_only_loss=True, **QUIET)
    with caplog.at_level(logging.WARNING):
        made = trainer(
            checkpoint,
            args,
            train_dataset=rows,
            eval_dataset=rows if kind == "messages" else None,
            processing_class=unmarked,
        )
    assert args.assistant_only_loss and made.args.assistant_only_loss
    expected = ["4<|im_end|>"] * chats + ["It is 6.<|im_end|>"]
    assert scored(unmarked, next(iter(made.train_dataset))) == expected
    assert made.train().training_loss > 0
    if kind != "stream":
        who = "the assistant's turns" if chats else "the completions"
        assert f"tokens, {who}." in caplog.text
