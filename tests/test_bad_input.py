"""Every mistake of a user's on the command line is told in one line that names its argument."""

import re
from itertools import cycle

import pytest

from llmmix import cli
from llmmix.command_line.boundary import TRACEBACK
from tests import bad_inputs as bad

LINE = 400  # characters that a mistake may take, beside the paths of the tests
ROWS = {"rpo": "@pairs.jsonl", "flat": "@forget.jsonl", "unlearn": "@forget.jsonl"}


def good(script: str) -> list[str]:
    """A command line without a mistake, up to the flags that follow."""
    if script in bad.MIXTURES:
        domains = ["--domains", "a=@rows.jsonl", "b=@rows.jsonl", "--validation_rows", "1"]
        return ["run", script, "--model_name_or_path", "@model", *domains]
    if script in bad.TRAINERS:
        rows = ["--dataset_name", ROWS.get(script, "@rows.jsonl")]
        retained = ["--retain_dataset_name", "@retain.jsonl"] if script == "unlearn" else []
        return ["run", script, "--model_name_or_path", "@model", *rows, *retained]
    models = ["--model_name_or_path", "@model"]
    return {
        "pass_at_n": ["eval", "pass_at_n", *models, "--dataset_name", "@rows.jsonl"],
        "unlearning": ["eval", "unlearning", *models, "--forget", "@forget.jsonl"],
        "speed": ["eval", "speed"],
        "mixture_laws": ["eval", "mixture_laws", "--ratios", "@a.csv", "--metrics", "@b.csv"],
    }.get(script, ["run", script])


def flags() -> list:
    """(command line, what is told) of each entry."""
    scripts = cycle((*bad.TRAINERS, *bad.MIXTURES))
    settings = [*((next(scripts), *setting) for setting in bad.NUMBERS.items()), *bad.SETTINGS]
    cases = [([*good(s), f"--{flag}", value], f"`(--)?{flag}") for s, flag, value in settings]
    data = [(script, "--dataset_name") for script in (*bad.TRAINERS, "pass_at_n")]
    data += [("unlearning", "--forget"), ("unlearning", "--retain"), ("mixture", "--domains")]
    models = [*bad.TRAINERS, *bad.MIXTURES, "pass_at_n", "unlearning"]
    for (script, flag), (name, said) in zip(cycle(data), bad.DATA.items(), strict=False):
        value = f"a=@{name}" if flag == "--domains" else f"@{name}"
        cases.append(([*good(script), flag, value], f"`{flag[2:]}`.*{said}"))
    for script, (name, said) in zip(cycle(models), bad.MODELS.items(), strict=False):
        argv = [*good(script), "--model_name_or_path", f"@{name}"]
        cases.append((argv, f"`model_name_or_path`.*{said}"))
    return [*cases, *bad.COMMANDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    made = tmp_path_factory.mktemp("bad")
    bad.write_bad_files(made, checkpoint)
    (made / "model").symlink_to(checkpoint)
    return made


@pytest.fixture
def told(folder, monkeypatch, capsys, tmp_path):
    """Run a command line, and return the one line that it tells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(TRACEBACK, raising=False)
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(argv: list[str]) -> str:
        assert cli.main([part.replace("@", f"{folder}/") for part in argv]) == 2
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("llmmix")]
        assert len(lines) == 1 and said.rstrip().endswith(lines[0]) and "Traceback" not in said
        assert "Failed to load" not in said  # what datasets logs beside its error
        return lines[0].replace(str(folder), "")

    return run


@pytest.mark.parametrize(
    ("argv", "said"),
    flags(),
    ids=lambda part: " ".join(part)[-60:] if isinstance(part, list) else part,
)
def test_a_mistake_is_one_line(argv, said, told):
    line = told(argv)
    assert re.search(said, line) and len(line) <= LINE, line


@pytest.mark.parametrize("text", bad.YAML)
def test_a_mistake_in_a_yaml_file_is_one_line(text, told, tmp_path):
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    line = told([*good("dco"), "--config", "bad.yaml"])
    assert re.search(bad.YAML[text], line) and len(line) <= LINE, line


def test_the_list_is_long_and_has_every_script():
    from llmmix.command_line.scripts import KINDS, scripts_of

    cases = flags()
    assert len(cases) + len(bad.YAML) >= 120
    scripts = {path.stem for package in KINDS.values() for path in scripts_of(package)}
    assert scripts <= {part for argv, _ in cases for part in argv}
