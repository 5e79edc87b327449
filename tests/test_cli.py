import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, field

import pytest
import yaml

from llmmix import cli
from llmmix.cli import UsageError, parse_args


@dataclass
class Arguments:
    learning_rate: float = field(default=1.0)
    n_samples: int = field(default=1)
    names: list[str] | None = field(default=None)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rate: 2.0e-5\nn_samples: 4\n")
    return str(tmp_path / "mine.py")


def test_later_wins_default_yaml_config_flag(script, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("n_samples: 8\n")
    assert parse_args((Arguments,), script, [])[0] == Arguments(2e-5, 4)
    given = ["--config", str(other)]
    assert parse_args((Arguments,), script, given)[0] == Arguments(2e-5, 8)
    assert parse_args((Arguments,), script, [f"--config={other}"])[0] == Arguments(2e-5, 8)
    other.write_text("# n_samples: 8\n")
    assert parse_args((Arguments,), script, given)[0] == Arguments(2e-5, 4)
    other.write_text("n_samples: 8\n")
    given += ["--n_samples", "16", "--names", "a", "b"]
    assert parse_args((Arguments,), script, given)[0] == Arguments(2e-5, 16, ["a", "b"])


def test_yaml_may_name_one_value_of_a_list_and_set_the_environment(script, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMIX_TEST", "before")
    other = tmp_path / "other.yaml"
    other.write_text("names: runs/a\nenv:\n  LLMMIX_TEST: 1\n")
    assert parse_args((Arguments,), script, ["--config", str(other)])[0].names == ["runs/a"]
    assert os.environ["LLMMIX_TEST"] == "1"


def test_unknown_keys_name_the_nearest(script, tmp_path):
    with pytest.raises(
        UsageError, match="'n_sample' in the command line; did you mean 'n_samples'"
    ):
        parse_args((Arguments,), script, ["--n_sample", "3"])
    bad = tmp_path / "bad.yaml"
    bad.write_text("learning_rte: 1\n")
    with pytest.raises(
        UsageError, match="'learning_rte' in .*bad.yaml; did you mean 'learning_rate'"
    ):
        parse_args((Arguments,), script, ["--config", str(bad)])
    bad.write_text("- a list\n")
    with pytest.raises(UsageError, match="must hold `key: value` lines"):
        parse_args((Arguments,), script, ["--config", str(bad)])
    with pytest.raises(UsageError, match="`--config` names no file"):
        parse_args((Arguments,), script, ["--config", "nowhere.yaml"])
    bad.write_text("no_names: true\n")
    with pytest.raises(UsageError, match="unknown option 'no_names'"):
        parse_args((Arguments,), script, ["--config", str(bad)])
    with pytest.raises(UsageError, match="unexpected 'stray'"):
        parse_args((Arguments,), script, ["stray"])


def test_ls_lists_the_folders():
    command = [sys.executable, "-m", "llmmix.cli", "ls"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("dco", "sftmix", "rpo", "confidence", "quickstart", "pass_at_n"):
        assert f"\n  {name} " in done.stdout


def test_cp_copies_a_recipe_that_runs_from_anywhere(tmp_path, capsys):
    assert cli.main(["cp", "dco", str(tmp_path / "mine")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mine.py", "mine.yaml"}
    defaults = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert defaults["n_samples"] == 64 and defaults["output_dir"] == "runs/mine"
    assert cli.main(["cp", "dco", str(tmp_path / "mine.py")]) == 2
    assert "exists" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(tmp_path / "mine.py"), "--help"])
    assert stop.value.code == 0
    assert "--n_samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "sftmx"], "did you mean 'sftmix'"),
        (["run", "nowhere.py"], "no file nowhere.py"),
        (["eval", "pass_at_k"], "did you mean 'pass_at_n'"),
        (["run", "--accelerate_config", "fsdp9", "dco"], "is neither a file nor"),
        (["run", "dco", "--n_sample", "3"], "did you mean 'n_samples'"),
        (["run", "dco"], "`model_name_or_path` is missing"),
        (["run", "dco", "--model_name_or_path", "builtin:tiny"], "`dataset_name` is missing"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmmix.models.tiny_checkpoint", lambda name: "unused")
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "module", "start"),
    [
        (
            ["run", "--num_processes", "2", "dco", "--n_samples", "3"],
            "torch.distributed.run",
            ["--standalone", "--nproc_per_node=2", "-m", "--", "llmmix.recipes.dco", "--n_samples"],
        ),
        (
            ["run", "--accelerate_config", "fsdp2", "--num_processes", "4", "rpo"],
            "accelerate.commands.launch",
            ["--config_file"],
        ),
    ],
)
def test_launcher_flags_stand_before_the_name(argv, module, start, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "_become", lambda *given: started.append(given) or 0)
    assert cli.main(argv) == 0
    assert started[0][0] == module and started[0][1][: len(start)] == start


@pytest.mark.parametrize(("command", "name"), [("run", "aioli"), ("eval", "unlearning")])
def test_help_begins_with_what_it_is_and_says_a_default_once(command, name, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, name, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: llmmix {command} {name} [--config FILE.yaml] [flags]\n\n")
    summary = next(line for line in said.splitlines()[2:] if line)
    assert summary and not summary.startswith("options")
    assert "(default: None)" not in said and "(default: [])" not in said
    for option in said.split("\n  --"):
        assert len(re.findall(r"\bDefault: |\(default:|by default", option.replace("\n", " "))) <= 1


def test_a_script_that_was_imported_runs_without_a_warning(capsys):
    import llmmix.recipes.dco  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert cli.main(["run", "dco"]) == 2
    assert "`model_name_or_path` is missing" in capsys.readouterr().err


def test_a_mistyped_value_is_told_in_two_lines(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "dco", "--max_steps", "many"])
    assert len(capsys.readouterr().err.splitlines()) == 2
