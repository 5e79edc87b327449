"""A name that is here is read as it is called; patterns and hub ids come after."""

import json
import logging

import pytest
from datasets import Dataset

from llmmix.data import load_role, load_splits
from llmmix.mixing.domains import MixtureConfig, load_domains
from llmmix.rows.sources import pick_split, split_name
from llmmix.unlearning.evaluation.sets import load_roles

# Each would be a pattern, an address, an archive's member, a variable or a configuration
ODD = ("rows[1]", "a*b?{x}", "me@host", "ü p#c%20$HOME", "a::b", "zip:")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def put(path, said="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"question": f"{n}?", "answer": said}) + "\n" for n in "abc")
    )
    return path


def answers(rows):
    return {row["answer"] for row in rows}


@pytest.mark.parametrize("name", ODD)
def test_what_is_here_is_read_as_it_is_called(name, here, math_rows):
    """By every argument that takes rows, with a neighbour that the pattern would find."""
    put(here / "rows1.jsonl", "a neighbour")
    file = put(here / f"{name}.jsonl")
    put(here / name / "in" / "rows[1].jsonl")
    parquet = here / "p" / name / "rows[1].parquet"
    parquet.parent.mkdir(parents=True)
    with open(parquet, "wb") as sink:
        Dataset.from_list([{"answer": "mine"}]).to_parquet(sink)
    for given in (file, file.name, f"./{file.name}", name, parquet, parquet.parent):
        for streaming in (False, True):
            assert answers(load_splits(str(given), None, streaming)["train"]) == {"mine"}, given
    assert answers(load_role(f"{file.name}@some", "forget")) == {"mine"}
    roles = load_roles({"forget": str(file)}, [file.name])
    assert answers(roles["forget"]) == answers(roles["facts"]) == {"mine"}


def test_a_link_is_read_by_its_own_ending(here):
    put(here / "blob")
    (here / "rows.jsonl").symlink_to("blob")
    assert answers(load_splits("rows.jsonl")["train"]) == {"mine"}


def test_domains_are_found_by_the_same_rule(here, tokenizer):
    for name in ("a[1]", "me@host"):
        rows = [json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(4)]
        (here / f"{name}.jsonl").write_text("".join(rows))
    domains = ["a=a[1].jsonl", "b=me@host.jsonl"]
    args = MixtureConfig("out", domains=domains, validation_rows=1, use_cpu=True, bf16=False)
    train, _ = load_domains(args, tokenizer)
    assert {row["text"][:4] for row in train["a"]} == {"a[1]"} and len(train["b"]) == 3


def test_names_with_a_configuration(here):
    put(here / "me@host.jsonl")
    assert split_name("me@host.jsonl") == ("me@host.jsonl", None)
    assert split_name("me@host.jsonl@one") == ("me@host.jsonl", "one")
    assert split_name("org/name@one") == ("org/name", "one")
    assert split_name("builtin:math@1,3") == ("builtin:math", "1,3")
    assert split_name("none@here.jsonl") == ("none@here.jsonl", None)


def test_a_pattern_counts_where_nothing_is_called_so(here, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(here))
    for name in "ba":
        put(here / "data[1]" / f"{name}.jsonl", name)
    with caplog.at_level(logging.WARNING):
        rows = load_splits("~/data[1]/*.jsonl")["train"]
    assert rows["answer"][:] == ["a"] * 3 + ["b"] * 3  # by name
    assert "2 files" in caplog.text and "train: 6 rows of question, answer" in caplog.text
    (here / "data[1]" / "c.parquet").touch()
    with pytest.raises(ValueError, match="some files are Parquet and some are not"):
        load_splits("data[1]/**")


@pytest.mark.parametrize(
    "name", ["./x", "x.jsonl", "~/x", "a/b/c", "*.jsonl", "x.jsonl.gz", "me@x.csv", "x.zip", "a b"]
)
def test_a_local_name_that_is_missing_is_no_hub_id(name):
    with pytest.raises(FileNotFoundError, match="`retain`: no file or folder") as refused:
        load_splits(name, argument="retain")
    assert name in str(refused.value)


def test_what_holds_no_rows_is_named(here, tmp_path):
    (here / "fake.parquet").write_text("no")
    with pytest.raises(
        ValueError, match=r"`dataset_name`: fake\.parquet cannot be read as Parquet"
    ):
        load_splits("fake.parquet")
    (here / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="`dataset_name`: the folder empty has no files of"):
        load_splits("empty")
    with pytest.raises(FileNotFoundError, match="is an address. Download it, or name it in"):
        load_splits("https://example.org/rows.jsonl")
    with pytest.raises(
        FileNotFoundError, match="`dataset_name`: no file or folder some/set is here"
    ):
        load_splits("some/set")  # the tests are offline


def test_a_folder_of_csv_files_is_read_as_one_file_is(here):
    for split in ("train", "test"):
        (here / "set").mkdir(exist_ok=True)
        (here / "set" / f"{split}.csv").write_text("question,answer\nBorn when?,1987\nDied?,\n")
    splits = load_splits("set")
    assert list(splits) == ["train", "test"] and splits["test"]["answer"][:] == ["1987", None]


def test_the_only_split_serves_where_the_flag_was_left_alone(here, caplog):
    splits = load_splits(str(put(here / "a.jsonl")))
    with caplog.at_level(logging.WARNING):
        assert len(pick_split(splits, "test", "dataset_split", default="test")) == 3
    assert "`dataset_split`: took 'train', the only split" in caplog.text
    with pytest.raises(ValueError, match="`dataset_split`: no split 'valid'"):
        pick_split(splits, "valid", "dataset_split", default="test")
