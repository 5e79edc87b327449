"""Template answers: our own, and a user's lists and files."""

import logging

import pytest

from llmmix.unlearning.templates import (
    HEADERS,
    REFUSALS,
    clean_templates,
    load_templates,
    resolve_templates,
)


def test_our_own_refusals_are_clean():
    assert list(REFUSALS) == clean_templates(list(REFUSALS), "x") and len(REFUSALS) == 32


@pytest.mark.parametrize("header", [*HEADERS, "responses", '"Template"'])
def test_headers_blank_and_repeated_lines_are_left_out(header, tmp_path, caplog):
    file = tmp_path / "own.txt"
    file.write_text(f"{header}\nNo.\n\n \nPass. \nNo.\n", encoding="utf-8")
    assert load_templates(file) == ["No.", "Pass."]
    with caplog.at_level(logging.WARNING):
        clean_templates(["No.", "", "No."], "templates")
    assert "Left out 2 lines of `templates`" in caplog.text


def test_a_file_with_a_byte_order_mark_has_its_header_left_out(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("template\nNo.\n", encoding="utf-8-sig")  # as Excel writes it
    assert load_templates(file) == ["No."]


def test_a_file_of_json_lines(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('"No."\n{"template": "Pass."}\n\n{"template": null}\n')
    assert load_templates(file) == ["No.", "Pass."]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", "7"])
def test_a_broken_line_of_json_is_told_with_its_file(line, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(f'"No."\n{line}\n')
    with pytest.raises(ValueError, match="template_file.*own.jsonl|own.jsonl.*template_file"):
        load_templates(file)


def test_lists_and_files_without_an_answer_are_refused(tmp_path):
    for given in ([], ["", " "], ["template"], ["Response", ""]):
        with pytest.raises(ValueError, match="`templates` holds no answer"):
            resolve_templates(None, given)
        file = tmp_path / "own.txt"
        file.write_text("\n".join(given))
        with pytest.raises(ValueError, match="`template_file` holds no answer"):
            resolve_templates(str(file), None)
    with pytest.raises(FileNotFoundError, match="`template_file`: no file"):
        resolve_templates(str(tmp_path / "none.txt"), None)
    assert resolve_templates(None, None) == REFUSALS
