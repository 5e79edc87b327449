"""Rows are tokenized as `SFTTrainer` prepares a domain by itself."""

import copy
import json

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from llmmix.mixing.tokens import tokenize_rows

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% if loud is defined and loud %}!{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Which ends the prompt alone with what the whole conversation has not
EMPTY_THOUGHT = TEMPLATE.replace("[assistant] {% endif", "[assistant] <think></think>{% endif")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def asked(number: int) -> dict:
    return {"role": "user", "content": f"What is {number} and {number}?"}


def answered(number: int) -> dict:
    return {"role": "assistant", "content": f"It is {'about ' * number}{2 * number}."}


def rows_of(kind: str, end: str, numbers: range = range(1, 6)) -> Dataset:
    """Rows of uneven lengths."""
    make = {
        "text": lambda n: {"text": f"{n}+{n}=" + "0" * n, "source": "a"},
        "ended text": lambda n: {"text": f"{n}+{n}={2 * n}" + end * (n % 2)},
        "pairs": lambda n: {"prompt": f"{n}+{n}=", "completion": f"{2 * n}" * n},
        "ended pairs": lambda n: {"prompt": f"{n} ", "completion": f"{n}" + end * (n % 2)},
        "joined pairs": lambda n: {"prompt": "What i", "completion": f"s {n}?"},
        "chat": lambda n: {"messages": [asked(n), answered(n), asked(n + 1), answered(n + 1)]},
        "chat pairs": lambda n: {"prompt": [asked(n)], "completion": [answered(n)]},
        "from and value": lambda n: {
            "conversations": [
                {"from": m["role"], "value": m["content"]} for m in (asked(n), answered(n))
            ]
        },
        "tools": lambda n: {
            "messages": [asked(n), answered(n)],
            "tools": json.dumps(TOOLS),
            "chat_template_kwargs": {"loud": True},
        },
        "ids": lambda n: {"input_ids": [10 + n] * (4 * n)},
        "ids and labels": lambda n: {
            "input_ids": [10 + n] * (4 * n),
            "labels": [-100] * (2 * n) + [10 + n] * (2 * n),
        },
    }[kind]
    return Dataset.from_list([make(n) for n in numbers])


KINDS = ["text", "ended text", "pairs", "ended pairs", "joined pairs", "chat", "chat pairs"]
KINDS += ["from and value", "tools", "ids", "ids and labels"]
CASES = [(kind, {}) for kind in KINDS]
CASES += [("pairs", {"completion_only_loss": False}), ("text", {"max_length": None})]
CASES += [("chat pairs", {"max_length": 24, "truncation_mode": "keep_end"})]
CASES += [(kind, {"max_length": 8}) for kind in ("pairs", "chat", "ids and labels")]
CASES += [("pairs", {"shuffle_dataset": True, "seed": 5})]


@pytest.fixture
def talking(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def settings(folder, **given) -> SFTConfig:
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    return SFTConfig(str(folder), **plain, **given)


def both(rows, tokenizer, checkpoint, args) -> tuple[list[dict], list[dict]]:
    """What is made of rows here, and by a trainer."""
    made = tokenize_rows(rows, tokenizer, args, "a")
    trainer = SFTTrainer(checkpoint, args=args, train_dataset=rows, processing_class=tokenizer)
    prepared = trainer.train_dataset.select_columns(["input_ids", "labels"])
    assert made.features == prepared.features
    return made.to_list(), prepared.to_list()


@pytest.mark.parametrize(("kind", "given"), CASES)
def test_rows_are_those_of_the_trainer(kind, given, talking, checkpoint, tmp_path):
    rows = rows_of(kind, talking.eos_token)
    made, prepared = both(rows, talking, checkpoint, settings(tmp_path, **given))
    assert made == prepared and made
    if kind == "tools":
        assert talking.decode(made[0]["input_ids"]).startswith("<tools>")
    if kind == "ids and labels" and given:
        assert len(made) == 3 < len(rows)  # the others' labels are cut off


def test_what_a_prompt_alone_ends_with_is_left_out(talking, checkpoint, tmp_path):
    talking.chat_template = EMPTY_THOUGHT
    rows = rows_of("chat pairs", talking.eos_token)
    made, prepared = both(rows, talking, checkpoint, settings(tmp_path))
    assert made == prepared
    scored = [token for token in made[0]["labels"] if token != -100]
    assert talking.decode(scored).startswith("It is about 2.")


@pytest.mark.parametrize("given", [{"assistant_only_loss": True}, {"packing": True}])
def test_what_asks_for_all_rows_at_once_is_refused(given, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="without `assistant_only_loss` and without `packing`"):
        tokenize_rows(rows_of("text", ""), tokenizer, settings(tmp_path, **given), "a")


def test_an_unknown_way_to_truncate_is_refused(tokenizer, tmp_path):
    args = settings(tmp_path, truncation_mode="keep_middle")
    with pytest.raises(ValueError, match="`truncation_mode` must be one of"):
        tokenize_rows(rows_of("text", ""), tokenizer, args, "a")
