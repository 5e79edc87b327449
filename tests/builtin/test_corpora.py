import math
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict

from llmmix import builtin
from llmmix.builtin import corpora
from llmmix.data import load_role, load_splits

ALL = "code,docs,cpp,math,noise,noise2"
REAL = ["code", "docs", "cpp", "math"]


@pytest.fixture(scope="module")
def made():
    return corpora.splits(ALL)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few rows and an empty cache."""
    monkeypatch.setattr(corpora, "ROWS", {"train": 16, "validation": 8, "test": 8})
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path))
    return tmp_path


def texts(made, split, domain):
    return [row["text"] for row in made[split] if row["domain"] == domain]


def test_sizes(made):
    assert list(made) == ["train", "validation", "test"]
    for split, count in {"train": 360, "validation": 50, "test": 90}.items():
        assert Counter(row["domain"] for row in made[split]) == dict.fromkeys(ALL.split(","), count)
    for domain in ALL.split(","):
        rows = [text for split in made for text in texts(made, split, domain)]
        assert all(250 <= len(row) <= 2000 for row in rows)
        assert 400_000 < sum(len(row.encode()) for row in rows) < 600_000


def test_rows_are_the_same_each_time(made):
    again = corpora.splits("math,docs")
    for split in again:
        assert texts(again, split, "docs") == texts(made, split, "docs")
        assert texts(again, split, "math") == texts(made, split, "math")
    # fixed for good: a change of these rows is a change of the built-in
    first = texts(made, "train", "math")[0].splitlines()
    assert first[0] == "Eva has 9 boxes of 7 coins and gives away 10. How many coins are left?"
    assert texts(made, "train", "noise")[0][:8] == "ċşĝČœĐœş"


def test_no_row_stands_twice(made):
    rows = [row["text"] for split in made for row in made[split]]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("domain", REAL)
def test_held_out_text_is_not_in_the_training_split(made, domain):
    """Single lines may be: an import, a heading."""
    seen = {line for row in texts(made, "train", domain) for line in row.splitlines()}
    for split in ("validation", "test"):
        lines = [line for row in texts(made, split, domain) for line in row.splitlines()]
        long = [line for line in lines if len(line) >= 30]
        assert sum(line in seen for line in long) < 0.1 * len(long)


def test_domains_are_what_they_are_called(made):
    rows = {name: texts(made, "train", name) for name in REAL}
    for mark, domain in zip(("def ", "the ", "const ", "How many"), REAL, strict=True):
        having = {name: sum(mark in row for row in rows[name]) for name in REAL}
        assert max(having, key=having.get) == domain and having[domain] > 100, having
    assert not any("LICENSE file in the root" in row for row in rows["cpp"])


def test_no_path_of_this_machine_is_in_the_rows(made):
    places = [str(Path(torch.__file__).parent), str(Path(corpora.__file__).parents[1])]
    for row in made["train"] + made["validation"] + made["test"]:
        assert set(row) == {"text", "domain"}
        assert not any(place in row["text"] for place in places)


def test_math_holds_no_problem_of_the_test_split_and_is_right(made):
    tested = {row["prompt"][0]["content"] for row in builtin.dataset("builtin:math")["test"]}
    for split in made:
        lines = [line for row in texts(made, split, "math") for line in row.splitlines()]
        assert not tested & set(lines)
        for line in (line for line in lines if line[:1].isdigit()):
            left, right = line.rsplit("=", 1)
            assert eval(left) == int(right), line


def test_noise_is_uniform_over_symbols_that_share_no_byte(made):
    alphabets = [set("".join(texts(made, "train", name))) for name in ("noise", "noise2")]
    assert [len(symbols) for symbols in alphabets] == [64, 64]
    one, two = (set("".join(symbols).encode()) for symbols in alphabets)
    assert not one & two and min(one | two) > 127
    assert all(symbol.isprintable() for symbols in alphabets for symbol in symbols)
    drawn = Counter("".join(texts(made, "train", "noise")))
    total = sum(drawn.values())
    entropy = -sum(n / total * math.log(n / total) for n in drawn.values())
    # of m symbols drawn uniformly, it falls short by about (m - 1) / (2 total)
    assert math.log(64) - entropy < 2 * 63 / (2 * total)


def test_the_order_asked_for_is_kept():
    loaded = load_splits("builtin:domains", "noise2, noise")
    assert isinstance(loaded, DatasetDict)
    for split, count in corpora.ROWS.items():
        assert loaded[split]["domain"] == ["noise2"] * count + ["noise"] * count
    test = load_role("builtin:domains@noise", "train", split="test")
    assert test["text"] == loaded["test"]["text"][90:]


def test_the_default_is_the_four_of_real_text(small):
    assert list(dict.fromkeys(builtin.dataset("builtin:domains")["test"]["domain"])) == REAL


@pytest.mark.parametrize("config", ["", "prose", "code,prose", "code,code", "code,,docs", "Code"])
def test_bad_names_are_refused(config, tokenizer):
    message = f"names domains, each once.*'code', 'docs', .*'noise2'.*got '{config}'"
    with pytest.raises(ValueError, match=message):
        builtin.dataset("builtin:domains", config)
    with pytest.raises(ValueError, match=message):
        corpora.windows(tokenizer, 64, config)


def test_missing_text_is_named_with_the_way_out(monkeypatch, tmp_path):
    def refuses(domain, what):
        message = f"{what}.* domain '{domain}' is cut from.* name other domains of .*'noise'"
        with pytest.raises(FileNotFoundError, match=message):
            corpora.splits(f"noise,{domain}")

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "find_spec", lambda name: None)
        refuses("cpp", "include folder of torch")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydoc_data.topics", None)
        refuses("docs", "pydoc_data.topics")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    refuses("code", "standard library's sources")


def test_windows_are_the_texts_of_one_domain_cut(small, tokenizer):
    windows = corpora.windows(tokenizer, 48, "docs,noise")
    rows = corpora.splits("docs,noise")
    assert list(windows) == ["train", "validation", "test"]
    for split, made in windows.items():
        assert made.column_names == ["input_ids", "domain"]
        assert {len(ids) for ids in made["input_ids"]} == {48}
        assert list(dict.fromkeys(made["domain"])) == ["docs", "noise"]
        for name in ("docs", "noise"):
            kept = [w["input_ids"] for w in made if w["domain"] == name]
            joined = "".join(text + tokenizer.eos_token for text in texts(rows, split, name))
            whole = tokenizer(joined, verbose=False)["input_ids"]
            flat = [token for ids in kept for token in ids]
            assert flat == whole[: len(flat)] and len(whole) - len(flat) < 48


def test_windows_are_tokenized_once(small, tokenizer, monkeypatch):
    first = corpora.windows(tokenizer, 32, "noise")
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_save", None)
        tokenizer("what a call leaves", truncation=True, max_length=2, padding="max_length")
        again = corpora.windows(tokenizer, 32, "noise")
        assert again["test"][:] == first["test"][:]
    patterns = [str(small), str(Path(corpora.__file__).parents[1])]
    for file in small.rglob("*.json"):
        assert not any(pattern in file.read_text() for pattern in patterns)

    def folders():
        return [path for path in (small / "domains").iterdir() if path.is_dir()]

    assert len(folders()) == 1
    corpora.windows(tokenizer, 16, "noise")
    corpora.windows(tokenizer, 32, "noise2")
    other = builtin.train_tokenizer()
    other.add_tokens("ċş")
    corpora.windows(other, 32, "noise")
    monkeypatch.setattr(corpora.platform, "python_version", lambda: "3.99.0")
    corpora.windows(tokenizer, 32, "noise")
    assert len(folders()) == 5


def test_windows_refuse_what_they_cannot_cut(small, tokenizer):
    with pytest.raises(ValueError, match="`length` is the tokens a window, 1 or more; got 0"):
        corpora.windows(tokenizer, 0)
    with pytest.raises(ValueError, match="`length=10000000`: the train split of 'noise' has 16016"):
        corpora.windows(tokenizer, 10**7, "noise")
    with pytest.raises(ValueError, match="`tokenizer` is a object; give a fast one"):
        corpora.windows(type("object", (), {"eos_token_id": 1})(), 8, "noise")
    with pytest.raises(ValueError, match="`tokenizer` has no end of sequence"):
        corpora.windows(type("object", (), {"eos_token_id": None})(), 8, "noise")
    assert not [path for path in (small / "domains").iterdir() if path.suffix == ""]
