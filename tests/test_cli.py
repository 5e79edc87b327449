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

MODEL = ["--model_name_or_path", "m"]


@dataclass
class Arguments:
    learning_rate: float = field(default=1.0)
    n_samples: int = field(default=1)
    names: list[str] | None = field(default=None)
    rates: list[float] | None = field(default=None)


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


def test_a_home_folder_is_expanded_where_the_shell_did_not(monkeypatch, tmp_path):
    from llmmix.eval.pass_at_n import PassAtNArguments

    monkeypatch.setenv("HOME", str(tmp_path))
    (args,) = parse_args((PassAtNArguments,), "none.py", [*MODEL, "--output_dir=~/run"])
    assert args.output_dir == str(tmp_path / "run")


@dataclass
class AdapterArguments:
    use_peft: bool = field(default=False)


def test_an_adapter_takes_the_rate_that_fits_it_unless_one_is_given(script, tmp_path, caplog):
    with open(tmp_path / "mine.yaml", "a") as defaults:
        defaults.write("with_adapter:\n  learning_rate: 3.0e-4\n")
    other = tmp_path / "other.yaml"

    def rate(*flags, config=None):
        if config is not None:
            other.write_text(config)
            flags = ("--config", str(other), *flags)
        return parse_args((Arguments, AdapterArguments), script, [*flags])[0].learning_rate

    assert rate() == 2e-5 and not caplog.records
    assert rate("--use_peft") == rate(config="use_peft: true") == 3e-4
    said = {record.getMessage() for record in caplog.records}
    assert said == {
        "With an adapter `learning_rate` is 0.0003, in place of 2e-05; a value that you give wins."
    }
    caplog.clear()
    assert rate("--use_peft", "--learning_rate", "2e-5") == 2e-5
    assert rate("--use_peft", config="learning_rate: 1.0e-6") == 1e-6
    assert not caplog.records
    own = "learning_rate: 1.0e-6\nwith_adapter:\n  learning_rate: 1.0e-3\n"
    assert rate("--use_peft", config=own) == 1e-3 and rate(config=own) == 1e-6
    for wrong, said in (("learning_rte: 1", "did you mean 'learning_rate'"), ("- 1", "must hold")):
        with pytest.raises(UsageError, match=said):
            rate(config=f"with_adapter:\n  {wrong}\n")


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
        (["eval", "pass_at_k"], "did you mean 'pass_at_n'"),
        (["run", "dco_cot", "--solve_samples", "0"], "between 1 and `solve_samples`"),
        (["eval", "unlearning", *MODEL, "--forget", "f", "--leak_samples", "-1"], "`leak_samples`"),
        (["run", "dco"], "`dataset_name` is missing"),
        (["run", "dco", "--model_name_or_path", "builtin:tiny"], "`dataset_name` is missing"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmmix.models.tiny_checkpoint", lambda name: "unused")
    assert cli.main(argv) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


@pytest.mark.parametrize(
    ("argv", "count", "config", "end"),
    [
        (["run", "--num_processes", "2", "dco", "--n", "3"], 2, None, ["dco", "--n", "3"]),
        (["eval", "--accelerate_config", "fsdp2", "pass_at_n"], None, "fsdp2.yaml", ["pass_at_n"]),
        (["run", "dco", "--num_processes", "2", "--n", "3"], 2, None, ["dco", "--n", "3"]),
        (["run", "dco", "--n", "3", "--num_processes=2"], 2, None, ["dco", "--n", "3"]),
        (["eval", "pass_at_n", "--accelerate_config", "fsdp2"], None, "fsdp2.yaml", ["pass_at_n"]),
    ],
)
def test_launcher_flags_stand_before_the_name_or_behind_it(argv, count, config, end, monkeypatch):
    """And each process runs the same command line alone."""
    started = []
    monkeypatch.setattr(cli, "run_processes", lambda *given: started.append(given) or 0)
    assert cli.main(argv) == 0
    ((command, title, *how),) = started
    assert command[command.index("-m") + 1 :][:2] == ["llmmix.cli", argv[0]]
    assert "-P" in command and command[-len(end) :] == end
    assert title == f"llmmix {argv[0]} {end[0]}"
    assert how[0] == count and (how[1] == config or how[1].endswith(config))


def test_a_flag_of_the_scripts_own_is_not_the_launchers(tmp_path, capfd):
    for own in ("num_processes: int = 3", "add_argument('--num_processes')"):
        script = tmp_path / "mine.py"
        script.write_text(f"import sys\nprint(sys.argv[1:])\nif 0:\n    {own}\n")
        assert cli.main(["run", str(script), "--num_processes", "2"]) == 0
        assert "['--num_processes', '2']" in capfd.readouterr().out


def test_the_command_alone_prints_help(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: llmmix") and "copy a recipe" in said


def test_a_users_error_is_told_and_a_fault_of_the_program_shown(tmp_path, capsys, monkeypatch):
    """And `--traceback`, or its variable, shows where the first arose."""
    script = tmp_path / "mine.py"
    argv = ["run", str(script)]
    for text in (
        "from pathlib import Path; Path('nowhere').read_bytes()",
        "from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('a b')",
        "import datasets; datasets.load_dataset('csv', data_files='nowhere.csv')",
    ):
        script.write_text(text)
        monkeypatch.setenv("LLMMIX_TRACEBACK", "")
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith(f"llmmix run {script}: ") and "Trace" not in said
        assert cli.main([*argv, "--traceback"]) == 2
        shown = capsys.readouterr().err
        assert "Traceback" in shown and said.splitlines()[-1] == shown.splitlines()[-1]
    for text, error in (
        ("int('x')", ValueError),
        ("{}['x']", KeyError),
        ("import numpy; numpy.zeros(2) @ numpy.zeros(3)", ValueError),
        ("from transformers import LlamaConfig; LlamaConfig().nothing", AttributeError),
    ):
        script.write_text(text)
        with pytest.raises(error):
            cli.main(argv)


def test_one_target_module_is_a_name_and_no_pattern(script):
    from trl import ModelConfig

    for given, kept in (
        (["q_proj"], ["q_proj"]),
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
    ):
        flags = ["--lora_target_modules", *given]
        script_yaml = script.replace("mine", "other")
        assert parse_args((ModelConfig,), script_yaml, flags)[0].lora_target_modules == kept


def test_help_is_asked_of_one_process(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--num_processes", "2", "quickstart", "--help"])
    assert capsys.readouterr().out.count("usage:") == 1


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
    assert "`dataset_name` is missing" in capsys.readouterr().err


def test_a_number_is_finite(script, tmp_path):
    for flags in (["--learning_rate", "nan"], ["--learning_rate=-inf"], ["--rates", "1", "nan"]):
        with pytest.raises(ValueError, match=f"`{flags[0].split('=')[0][2:]}` must be a finite"):
            parse_args((Arguments,), script, flags)
    for text in (".nan", "nan"):  # YAML's word, and the flags'
        (tmp_path / "bad.yaml").write_text(f"learning_rate: {text}\n")
        with pytest.raises(ValueError, match="`learning_rate` must be a finite number, got nan"):
            parse_args((Arguments,), script, ["--config", str(tmp_path / "bad.yaml")])
    assert parse_args((Arguments,), script, ["--names", "nan"])[0] == Arguments(2e-5, 4, ["nan"])


def test_a_file_of_flags_in_the_current_folder_is_not_read(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mine"])
    (tmp_path / "mine.args").write_text("--n_samples 16")
    assert parse_args((Arguments,), script)[0] == Arguments(2e-5, 4)


@pytest.mark.parametrize("argv", [["ls"], ["run", "quickstart", "--help"]])
def test_a_reader_that_goes_leaves_no_traceback(argv):
    """As `llmmix ls | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "llmmix.cli", *argv]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode in (0, 141)
