"""Datasets are found by name, and what is not there is named."""

import json

import pytest
from datasets import Dataset
from trl import ModelConfig, ScriptArguments

from llmmix import DCOConfig
from llmmix.data import DataArguments, load_splits, load_train_and_eval, pad
from llmmix.models import prepare_model_args, resolve_checkpoint
from llmmix.rows.prompts import Encoded


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


def test_padding_is_known_from_lengths():
    rows = [Encoded([5, 6, 0, 0], 2), Encoded([7, 0], 1)]
    for pad_id in (0, None, 9):
        batch = pad(rows, pad_id)
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert batch["labels"].tolist() == [[-100, -100, 0, 0], [-100, 0, -100, -100]]
        assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [7, 0, pad_id or 0, pad_id or 0]]
