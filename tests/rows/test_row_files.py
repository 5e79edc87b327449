"""Files of rows: a row says what its file says, and what is broken is named with its line."""

import bz2
import gzip
import json

import pyarrow as pa
import pytest

from llmmix.rows.row_files import format_of, read_files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def read(tmp_path):
    """Reads a file of some content: its rows, streamed ones alike."""

    def read(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        whole = read_files({"train": [path]}, "rows")
        streamed = read_files({"train": [path]}, "rows", streaming=True)
        found = {split: list(rows) for split, rows in whole.items()}
        assert found == {split: list(rows) for split, rows in streamed.items()}
        return found["train"] if list(found) == ["train"] else found

    return read


@pytest.mark.parametrize(
    "cell", ["007", "1e5", "NA", "null", "True", "1987", "1987-05-04", "nan", "0.10", " x ", "#1"]
)
def test_a_cell_is_its_text(cell, read):
    rows = read("a.csv", f"question,answer\nBorn when?,{cell}\nDied when?,\n")
    assert [row["answer"] for row in rows] == [cell, None]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'q,a\r\n"x, ""y""\nz",1\r\n\r\n'),
        ("a.csv", '\ufeff"q";"a"\n"x, ""y""\nz";1\n'),
        ("a.tsv", '\n\nq\ta\n"x, ""y""\nz"\t1\n'),
        ("A.CSV", 'q,a\n"x, ""y""\nz",1'),
    ],
)
def test_separators_quotes_and_blank_lines(name, text, read):
    assert read(name, text) == [{"q": 'x, "y"\nz', "a": "1"}]


def test_a_long_cell_and_the_columns_that_are_numbers(read):
    long = "x" * 200_000
    rows = read("a.csv", f"text,confidence,weight\n{long},-0.5,2\ny,,\n")
    first, second = {"confidence": -0.5, "weight": 2.0}, {"confidence": None, "weight": None}
    assert rows == [{"text": long, **first}, {"text": "y", **second}]


ROWS = [{"question": "Wo?", "answer": "Köln"}, {"question": "Wann?", "answer": None}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff\n" + LINES.replace("\n", "\r\n\r\n")),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": "1.0", "data": ROWS})),
        ("a.json", json.dumps({"train": ROWS}, indent=1)),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
        ("a.jsonl.zst", pa.compress(LINES.encode(), codec="zstd", asbytes=True)),
        ("a.csv.gz", gzip.compress("question,answer\nWo?,Köln\nWann?,\n".encode(), mtime=0)),
    ],
)
def test_the_shapes_that_rows_come_in(name, content, read):
    assert read(name, content) == ROWS


def test_one_object_is_a_row_unless_it_holds_rows(read):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read("chat.json", json.dumps(chat, indent=1)) == [chat]
    splits = {"train": [{"a": "x"}], "test": [{"a": "y"}]}
    assert read("splits.json", json.dumps(splits)) == splits


def test_lines_of_text(read):
    assert read("a.txt", "one\r\n\n two\n") == [{"text": "one"}, {"text": " two"}]
    assert read("a.json", '["one", "two"]') == [{"text": "one"}, {"text": "two"}]


def test_values_of_json_stay_what_they_are(read):
    answers = ["1987-05-04", "2020-01-01T00:00:00", None, "007"]
    text = "".join(json.dumps({"date": answer}) + "\n" for answer in answers)
    assert [row["date"] for row in read("a.jsonl", text)] == answers
    years = read("b.jsonl", '{"a": 1987}\n{"a": null}\n{"b": true}\n')
    assert years == [{"a": 1987, "b": None}, {"a": None, "b": None}, {"a": None, "b": True}]


def test_texts_and_numbers_in_one_column_are_texts(read):
    last = '{"a": "in May"}\n{"a": true}\n{"a": 1' + "0" * 30 + "}\n"
    rows = read("a.jsonl", '{"a": 1987}\n' + last)
    assert [row["a"] for row in rows] == ["1987", "in May", "true", "1" + "0" * 30]


def test_whole_and_broken_numbers_are_broken_ones(read):
    rows = read("a.jsonl", '{"a": [1, 0.5]}\n{"a": [1000000000000000001]}\n')
    assert rows == [{"a": [1.0, 0.5]}, {"a": [1e18]}]


def test_types_are_found_over_all_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1987}\n' * 1001 + '{"a": "in May", "b": 0}\n')
    rows = read_files({"train": [path]}, "rows")["train"]
    assert rows[0] == {"a": "1987", "b": None} and rows[1001] == {"a": "in May", "b": 0}


def test_contents_of_text_and_of_parts(read):
    parts = [{"type": "text", "text": "hi"}]
    rows = [{"messages": [{"role": "user", "content": c}]} for c in ("hi", parts, None)]
    assert read("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) == rows


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", "", "a.jsonl holds no rows"),
        ("a.csv", "q,a\n\n", "a.csv holds no rows"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.jsonl", '{"a": 1}\n\n{"a":\n', "a.jsonl, line 3 is no JSON: Expecting value"),
        ("a.jsonl", "<html>\n", "a.jsonl, line 1 is no JSON"),
        ("a.json", '\n[{"a": 1},\n {"a": }]', "a.json, line 3 is no JSON"),
        ("a.json", '{"a": 1}\n{"a": 2\n', "a.json, line 2 is no JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl, line 2 is [1], no row"),
        ("a.json", "[{}, 3]", "a.json, line 1: entry 2 is 3, no row"),
        ("a.csv", "q,a\nx,y\nx,y,z\n", "a.csv, line 3: 3 cells below a header of 2"),
        ("a.csv", 'q,a\nx,"y\nz', "a.csv, line 2 is no CSV"),
        ("a.csv", "q,q\nx,y\n", "a.csv, line 1: the header names 'q' twice"),
        ("a.csv", "q,confidence\nx,high\n", "line 2: `confidence` must be a number, got 'high'"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl is not UTF-8 text"),
        ("a.jsonl", b"\xff\xfe{\x00", "a.jsonl is not UTF-8 text"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "a.jsonl.gz cannot be read"),
    ],
)
def test_what_is_broken_is_named_with_its_line(name, content, told, read, tmp_path):
    with pytest.raises(ValueError, match="`rows`: ") as refused:
        read(name, content)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").glob("rows/*/"))  # nothing is kept of a broken file


def test_a_file_that_changed_is_read_again(read):
    assert read("a.jsonl", '{"a": "x"}\n') == [{"a": "x"}]
    assert read("a.jsonl", '{"a": "y"}\n') == [{"a": "y"}]


def test_formats_are_told_by_the_ending():
    assert format_of("a.b.JSONL.gz") == ".jsonl" and format_of("a.csv.zst") == ".csv"
    assert format_of("a.parquet") is None and format_of("jsonl") is None
