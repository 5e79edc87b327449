"""What a run must not do: speak to the network, import what lies about, run what a file holds."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments

from llmmix.cli import UsageError, parse_args
from llmmix.grading import Verifier
from llmmix.models import prepare_model_args
from llmmix.report import write_report

# Before anything is imported: every connection and every name that is looked up ends the process
WATCHED = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg"):
        if event == "socket.getaddrinfo" or isinstance(arguments[1], tuple):
            print("REACHED OUT:", event, arguments, file=sys.stderr, flush=True)
            os._exit(66)
sys.addaudithook(watch)
import json
from llmmix.cli import main
sys.exit(max(main(command) for command in json.loads(sys.argv[1])))
"""
SMALL = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu", "true"]


def in_folder(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, as a user does whose settings are those of a fresh machine."""
    hidden = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_runs_on_local_files_open_no_connection(checkpoint, math_rows, preference_rows, tmp_path):
    math_rows.to_json(tmp_path / "rows.jsonl")
    preference_rows.to_json(tmp_path / "pairs.jsonl")
    math_rows.remove_columns("answer").to_csv(tmp_path / "other.csv")
    model = ["--model_name_or_path", checkpoint]
    rows = [*model, "--dataset_name", "rows.jsonl"]
    commands = [
        ["run", "dco", *rows, *SMALL],
        ["run", "rpo", *model, "--dataset_name", "pairs.jsonl", *SMALL],
        ["run", "unlearn", *rows, *SMALL, "--loss", "grad_ascent"],
        ["run", "mixture", *model, "--domains", "a=rows.jsonl", "b=other.csv", *SMALL]
        + ["--validation_rows", "2"],
        ["eval", "pass_at_n", *rows, "--dataset_split", "train", "--num_samples", "2"]
        + ["--n", "1", "2", "--max_problems", "2", "--max_new_tokens", "4"],
    ]
    home = str(tmp_path / "home")
    done = in_folder(tmp_path, "-c", WATCHED, json.dumps(commands), HF_HOME=home)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs").is_dir() and done.stdout.count("Model saved to") == 4


def test_what_is_watched_would_be_seen(tmp_path):
    look_up = "import socket; socket.getaddrinfo('127.0.0.1', 80)"
    watched = WATCHED.replace("from llmmix.cli import main\n", look_up + "\n")
    done = in_folder(tmp_path, "-c", watched)
    assert done.returncode == 66 and "REACHED OUT: socket.getaddrinfo" in done.stderr


def test_a_verifier_imports_nothing_from_the_current_folder_but_what_is_named(
    tmp_path, monkeypatch
):
    said_yes = "def parse(*a, **k): return [1]\ndef verify(*a, **k): return True\n"
    (tmp_path / "math_verify.py").write_text(said_yes)
    for name in ("sitecustomize", "usercustomize", "regex", "sympy", "llmmix"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w').close()\n")
    (tmp_path / "my_judge.py").write_text("def yes(completion, answer):\n    return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    with Verifier("math", timeout=20) as verifier:
        assert verifier(r"\boxed{1}", "2") == "wrong"
    assert not Path("imported").exists()
    with Verifier("my_judge:yes", timeout=20) as verifier:
        assert verifier("1", "2") == "right"
    assert not Path("imported").exists()


class Owned:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.fixture
def nothing_owned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("owned").exists()


def loaded(model: Path) -> None:
    """Load a checkpoint as every recipe does."""
    from llmmix import DCOConfig

    given = ModelConfig(model_name_or_path=str(model), dtype="float32")
    args = DCOConfig("out", use_cpu=True)
    AutoModelForCausalLM.from_pretrained(
        prepare_model_args(given, args), **(args.model_init_kwargs or {})
    )


@pytest.mark.usefixtures("nothing_owned")
def test_a_pickled_checkpoint_is_not_opened(checkpoint, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(Path(checkpoint, "config.json").read_text())
    torch.save(Owned(), folder / "pytorch_model.bin")
    assert b"owned" in Path(folder, "pytorch_model.bin").read_bytes()
    with pytest.raises(ValueError, match="has no safetensors but pytorch_model.bin"):
        loaded(folder)


@pytest.mark.usefixtures("nothing_owned")
def test_code_beside_a_checkpoint_is_not_run(checkpoint, tmp_path):
    folder = tmp_path / "coded"
    shutil.copytree(checkpoint, folder)
    config = json.loads(Path(checkpoint, "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    config["auto_map"]["AutoModelForCausalLM"] = "mine.Mine"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("open('owned', 'w').close()\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        loaded(folder)


@pytest.mark.usefixtures("nothing_owned")
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_of_training_is_not_opened(file, checkpoint, math_rows, tmp_path):
    from llmmix import DCOConfig, DCOTrainer

    def trainer(steps):
        settings = {"max_steps": steps, "use_cpu": True, "bf16": False, "report_to": "none"}
        args = DCOConfig(str(tmp_path / "run"), disable_tqdm=True, **settings)
        return DCOTrainer(checkpoint, args=args, train_dataset=math_rows)

    trainer(1).train()
    target = tmp_path / "run" / "checkpoint-1" / file
    assert target.exists()
    torch.save(Owned(), target)
    with pytest.raises(pickle.UnpicklingError):
        trainer(2).train(resume_from_checkpoint=str(target.parent))


@pytest.mark.usefixtures("nothing_owned")
def test_a_yaml_tag_makes_no_object(tmp_path):
    tag = "!!python/object/apply:builtins.open [owned, w]"
    config = tmp_path / "run.yaml"
    config.write_text(f"dataset_name: {tag}\n")
    with pytest.raises(Exception, match="python/object/apply") as raised:
        parse_args((ScriptArguments,), "mine.py", ["--config", str(config)])
    assert isinstance(raised.value, UsageError) or type(raised.value).__module__.startswith("yaml")


def test_a_report_shows_names_as_text(tmp_path):
    script = "<script>alert(1)</script>"
    run = tmp_path / "<img src=x onerror=alert(2)>"
    run.mkdir()
    history = [{"step": n, "loss": 1.0, f"{script}": 2.0} for n in range(3)]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = write_report(tmp_path, title=script, note=script).read_text()
    assert "<script" not in page and "onerror=alert(2)>" not in page
    assert "&lt;script&gt;" in page
