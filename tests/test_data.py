"""Every bad input gets one clear error, or a stated and counted drop."""

import json
import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments

from llmmix import (
    DCOConfig,
    DCOTrainer,
    RPOConfig,
    RPOTrainer,
    SFTMixConfig,
    SFTMixTrainer,
)
from llmmix.data import DataArguments, load_splits, load_train_and_eval
from llmmix.formats import check_preference_dataset, check_sft_dataset
from llmmix.models import prepare_model_args, resolve_checkpoint

QUIET = {"bf16": False, "max_steps": 1, "disable_tqdm": True, "use_cpu": True}


def chat(text, role="assistant"):
    return [{"role": role, "content": text}]


def test_files_folders_and_saved_datasets_load(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "saved", "folder"):
        assert load_splits(str(tmp_path / name))["train"][:] == dataset[:], name


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="`dataset_name`: no file or folder .*nope.jsonl"):
        load_splits(str(tmp_path / "nope.jsonl"))
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"is not one of \.json, \.jsonl"):
        load_splits(str(tmp_path / "rows.xlsx"))
    with pytest.raises(FileNotFoundError, match="no file or folder .*nope.gguf"):
        resolve_checkpoint(str(tmp_path / "nope.gguf"))
    with pytest.raises(ValueError, match="no built-in"):
        resolve_checkpoint("builtin:huge")


def test_missing_arguments_and_splits_are_named():
    args = DCOConfig("out", eval_strategy="epoch")
    with pytest.raises(ValueError, match="`dataset_name` is missing"):
        load_train_and_eval(ScriptArguments(), args)
    with pytest.raises(
        ValueError, match="`dataset_train_split`: no split 'trian'.*'train', 'test'"
    ):
        load_train_and_eval(
            ScriptArguments(dataset_name="builtin:math", dataset_train_split="trian"), args
        )
    with pytest.raises(ValueError, match="`model_name_or_path` is missing"):
        prepare_model_args(ModelConfig(), args)
    train, test = load_train_and_eval(ScriptArguments(dataset_name="builtin:math"), args)
    assert (len(train), len(test)) == (4000, 1000)


def test_a_hold_out_is_the_same_in_every_run_of_a_seed():
    def held_out(**given):
        script_args = DataArguments(dataset_name="builtin:math", test_split_size=0.1)
        args = DCOConfig("out", eval_strategy="epoch", **given)
        train, test = load_train_and_eval(script_args, args)
        kept, drawn = ([row[0]["content"] for row in rows["prompt"]] for rows in (train, test))
        assert len(kept) == 3600 and not set(kept) & set(drawn)
        return drawn

    assert held_out(seed=1) == held_out(seed=1) == held_out(seed=2, data_seed=1)
    assert held_out(seed=1) != held_out(seed=2)


def test_rows_to_evaluate_on(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 10)
    script_args = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"))
    args = DCOConfig("out", eval_strategy="epoch")
    with pytest.raises(ValueError, match="`dataset_test_split`: no split 'test'.*Hold rows out"):
        load_train_and_eval(script_args, args)
    script_args.test_split_size = 3
    train, test = load_train_and_eval(script_args, args)
    assert (len(train), len(test)) == (7, 3)
    args.eval_strategy = "no"  # what is held out is not trained on
    train, test = load_train_and_eval(script_args, args)
    assert len(train) == 7 and test is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "`train_dataset` is required"),
        (Dataset.from_dict({"prompt": []}), "`train_dataset` is empty"),
        (Dataset.from_dict({"question": ["a"], "answer": ["b"]}), r"\['answer', 'question'\]"),
        (Dataset.from_dict({"prompt": ["a"], "completion": [" "]}), "empty in every one of 1 rows"),
    ],
)
def test_sft_rows_that_cannot_be_trained_on(rows, message):
    with pytest.raises(ValueError, match=message):
        check_sft_dataset(rows, "train_dataset")
    if rows is not None and "question" in rows.column_names:
        with pytest.raises(ValueError, match="accepted are prompt-completion rows"):
            check_sft_dataset(rows, "train_dataset")


@pytest.mark.parametrize(
    "blank",
    [
        {"prompt": "a", "completion": "  "},
        {"prompt": "a", "completion": None},
        {"prompt": chat("a", "user"), "completion": chat("")},
        {"prompt": chat("a", "user"), "completion": []},
        {"messages": [*chat("a", "user"), *chat(" ")]},
        {"messages": chat("a", "user")},
        {"text": "\n"},
    ],
)
def test_empty_completions_are_dropped_and_counted(blank, caplog):
    text = isinstance(blank.get("prompt", ""), str)
    full = {
        "prompt": "a" if text else chat("a", "user"),
        "completion": "b" if text else chat("b"),
        "messages": [*chat("a", "user"), *chat("b")],
        "text": "b",
    }
    good = {key: full[key] for key in blank}
    rows = Dataset.from_list([good, blank, good])
    with caplog.at_level(logging.WARNING):
        kept = check_sft_dataset(rows, "train_dataset")
    assert len(kept) == 2
    assert "Dropped 1 of 3 rows with an empty" in caplog.text


def test_empty_preferences_are_dropped_and_counted(caplog):
    rows = Dataset.from_dict({"prompt": ["a", "a"], "chosen": ["b", "b"], "rejected": ["c", ""]})
    assert len(check_preference_dataset(rows, "train_dataset")) == 1
    assert "Dropped 1 of 2 rows" in caplog.text
    with pytest.raises(ValueError, match="accepted are `chosen` and `rejected`"):
        check_preference_dataset(rows.remove_columns("chosen"), "train_dataset")


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
