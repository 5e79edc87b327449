"""Datasets of TRL's list, joined."""

import json

import pytest
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from llmmix.rows.joined import load_joined


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, size in {"a": 10, "b": 20}.items():
        rows = [json.dumps({"text": f"{name}{n}", "n": n}) + "\n" for n in range(size)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(rows))
    (tmp_path / "data" / "c.csv").write_text("text,n\nc,1\n")  # whose cells are text


def entry(**given):
    return DatasetConfig(**{"path": "json", "data_files": "data/a.jsonl"} | given)


@pytest.mark.parametrize(
    "entries",
    [
        [entry(), entry(data_files=["data/b.jsonl"], split="train[:25%]")],
        [entry(data_files={"x": "data/*.jsonl"}, split="x", columns=["text"])],
        [entry(fraction=0.5), entry(data_files="data/b.jsonl", fraction=1.5)],
        [entry(data_files={"x": "data/a.jsonl", "y": "data/b.jsonl"}, split="y[-2:]+x")],
        [entry(data_dir="data", data_files="a.jsonl"), entry(path="data", data_files="b.jsonl")],
    ],
)
def test_the_rows_are_those_of_trl(entries):
    theirs = get_dataset(DatasetMixtureConfig(datasets=entries))["train"]
    assert load_joined(entries, streaming=False).to_list() == theirs.to_list()


def test_names_and_built_ins(tmp_path):
    (tmp_path / "data[1].csv").write_text("text\nmine\n")
    found = load_joined([DatasetConfig("data[1].csv"), entry(columns=["text"])], streaming=False)
    assert found["text"][:2] == ["mine", "a0"]
    assert len(load_joined([DatasetConfig("builtin:math", name="1", split="test")], False)) == 250
    stream = load_joined([entry(), entry(data_files="data/b.jsonl")], streaming=True)
    assert len(list(stream)) == 30


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([entry(split="valid")], r"`datasets\[0\].split`: no split 'valid'"),
        ([entry(), entry(columns=["x"])], r"`datasets\[1\]`: no column 'x' among \['text', 'n'\]"),
        ([entry(fraction=0.5), entry()], "`fraction` must be given for every entry or for none"),
        ([entry(fraction=0.0)], "`fraction` must be given"),
        ([entry(data_files="data/c.csv")], r"`datasets\[0\]`: json: ."),
        ([entry(), entry(path="csv", data_files="data/c.csv")], "columns of different types"),
    ],
)
def test_entries_that_do_not_fit(entries, told):
    with pytest.raises(ValueError, match=told):
        load_joined(entries, streaming=False)


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"`datasets\[0\]`: no file data/d.jsonl"):
        load_joined([entry(data_files="data/d.jsonl")], streaming=False)
