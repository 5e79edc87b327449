"""Datasets are found by name, and what is not there is named."""

import json

import pytest
from datasets import Dataset
from trl import ModelConfig, ScriptArguments

from llmmix import DCOConfig
from llmmix.data import load_splits, load_train_and_eval
from llmmix.models import prepare_model_args, resolve_checkpoint


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
    with pytest.raises(FileNotFoundError, match="no file .*nope.gguf"):
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
