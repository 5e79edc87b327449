"""Every recipe runs, and every YAML file holds nothing but known keys."""

import ast
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from llmmix import cli

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "__init__")
SMALL = "--max_steps 2 --disable_tqdm true --save_strategy no".split()


@pytest.mark.parametrize("name", SCRIPTS)
def test_defaults_parse_and_the_script_is_short(name):
    script = RECIPES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= (240 if name.endswith("_study") else 120)
    call = [
        node
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_args"
    ]
    module = importlib.import_module(f"llmmix.recipes.{name}")
    types = tuple(getattr(module, element.id) for element in call[0].args[0].elts)
    parsed = cli.parse_args(types, str(script), [])
    defaults = script.with_suffix(".yaml")
    if not defaults.exists():
        return
    plain = yaml.safe_load(defaults.read_text())
    adapted = plain | plain.pop("with_adapter")
    assert plain.get("warmup_steps", 0) < 1, "a share of the run"
    assert adapted["learning_rate"] >= 10 * plain["learning_rate"]
    with_adapter = cli.parse_args(types, str(script), ["--use_peft"])
    for settings, found in ((plain, parsed), (adapted, with_adapter)):
        for key, value in settings.items():
            assert any(getattr(part, key, None) == value for part in found), key


@pytest.mark.parametrize("kind", ["recipes", "eval"])
def test_every_program_claims_its_folder(kind):
    for script in (RECIPES.parent / kind).glob("[!_]*.py"):
        calls = [n for n in ast.walk(ast.parse(script.read_text())) if isinstance(n, ast.Call)]
        claimed = [ast.unparse(n.args[0]) for n in calls if getattr(n.func, "id", "") == "claim"]
        assert len(claimed) == 1 and claimed[0].endswith("args.output_dir"), script


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_configs_load(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.fixture
def rows(math_rows, preference_rows, tmp_path):
    math_rows.remove_columns("confidence").to_json(tmp_path / "math.jsonl")
    preference_rows.to_json(tmp_path / "preferences.jsonl")
    return tmp_path


LORA = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.mark.parametrize("lora", [[], pytest.param(LORA, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dco", "rpo", "sftmix", "token_losses"])
def test_recipe_trains_and_saves(name, lora, rows, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("LLMMIX_CACHE", str(rows / "cache"))
    data = rows / ("preferences.jsonl" if name == "rpo" else "math.jsonl")
    out = rows / "out"
    argv = ["run", name, "--model_name_or_path", checkpoint, "--dataset_name", str(data)]
    argv += ["--output_dir", str(out), "--logging_steps", "1", *SMALL, *lora]
    assert cli.main(argv) == 0
    assert AutoModelForCausalLM.from_pretrained(out) is not None
    assert (out / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()
    assert "data:image/png;base64" in (out / "report.html").read_text()
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"][0]
    prefix = f"{name}/"
    assert any(key.startswith(prefix) for key in logged)
    if name == "sftmix":
        scored = [json.loads(line) for line in (out / "confidence.jsonl").read_text().splitlines()]
        assert len(scored) == 24 and all(row["confidence"] < -1 for row in scored)
        # what it wrote is what a second run starts from, without a reference
        again = [str(out / "confidence.jsonl") if part == str(data) else part for part in argv]
        again = [str(rows / "again") if part == str(out) else part for part in again]
        assert cli.main(again) == 0
        assert not list((rows / "again").glob("reference-*"))


def logged(out) -> dict:
    """Every metric of a run, and its last value."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {key: value for entry in history for key, value in entry.items()}


def test_dco_by_steps(rows, checkpoint, capsys):
    steps = [
        {"prompt": "What is (2+3)*4? ", "steps": ["2+3=5", "5*4=\\boxed{20}"]},
        {"prompt": "What is 9-4? ", "steps": ["9-4=\\boxed{5}"]},
    ]
    (rows / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    argv = ["run", "dco", "--model_name_or_path", checkpoint, "--output_dir", str(rows / "out")]
    argv += ["--dataset_name", str(rows / "steps.jsonl"), "--logging_steps", "1", *SMALL]
    argv += ["--per_device_train_batch_size", "3"]
    assert cli.main(argv) == 2 and "split_steps" in capsys.readouterr().err
    assert cli.main([*argv, "--stepwise", "true", "--n_samples", "8"]) == 0
    assert logged(rows / "out")["epoch"] == 2  # three examples are one step


def test_dco_leaves_out_what_is_likely(rows, checkpoint):
    argv = ["run", "dco", "--model_name_or_path", checkpoint, "--output_dir", str(rows / "out")]
    argv += ["--dataset_name", str(rows / "math.jsonl"), "--logging_steps", "1", *SMALL]
    assert cli.main([*argv, "--likelihood_threshold", "0.1", "--max_steps", "22"]) == 0
    assert logged(rows / "out")["filter/kept"] == 1  # a random model is sure of nothing


@pytest.mark.parametrize("lora", [[], pytest.param(LORA, marks=pytest.mark.slow)])
def test_dco_for_chains_of_thought(lora, rows, checkpoint):
    argv = ["run", "dco_cot", "--model_name_or_path", checkpoint, "--max_new_tokens", "8", *lora]
    argv += ["--dataset_name", str(rows / "math.jsonl"), "--output_dir", str(rows / "out"), *SMALL]
    argv += ["--solve_samples", "4", "--unfiltered_steps", "1", "--max_steps", "3"]
    assert cli.main([*argv, "--logging_steps", "1"]) == 0
    found = logged(rows / "out")
    assert found["solve_rate/mean"] == 0 and found["dco/weight"] == 1 and found["filter/kept"] == 1


def test_dco_study_runs_small(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tiny-1").symlink_to(checkpoint)
    argv = ["run", "dco_study", "--n_samples", "1", "4", "--seeds", "0", "1", "--steps", "2", "3"]
    argv += ["--num_samples", "4", "--n", "1", "4", "--test_rows", "3", "--train_rows", "8"]
    assert cli.main([*argv, "--batch_size", "4", "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "dco_study.json").read_text())
    assert len(found) == 4 and set(found["N=4 seed=1"]) == {"2", "3"}
    assert (tmp_path / "out" / "dco_study.png").read_bytes().startswith(b"\x89PNG")
    assert "cross-entropy" in capsys.readouterr().out


def test_token_losses_study_runs_small(checkpoint, tmp_path, monkeypatch, capsys):
    """In this process."""
    study = importlib.import_module("llmmix.recipes.token_losses_study")
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tiny-1").symlink_to(checkpoint)
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    sizes = {"rows": 8, "few_rows": 2, "batch_size": 2, "test_rows": 2, "num_samples": 2}
    steps = {"teach_steps": 1, "steps": 1, "wrong_share": 0.5}
    args = study.StudyArguments(
        str(tmp_path / "out"), losses=["gce 0.7"], seeds=[5], **sizes, **steps
    )
    study.main(args)
    found = json.loads((tmp_path / "out" / "token_losses_study.json").read_text())
    assert set(found) == {"before", "clean, gce 0.7", "wrong, gce 0.7", "few, gce 0.7"}
    assert (tmp_path / "out" / "token_losses_study.png").read_bytes().startswith(b"\x89PNG")
    assert "wrong: mean and range" in capsys.readouterr().out
    sets = study.prepare(args, seed=5)
    known = set(map(str, sets["clean"]["prompt"])) | set(map(str, sets["test"]["prompt"]))
    assert not known & set(map(str, sets["taught"]["prompt"]))
    assert len(sets["few"]) == 2 and sets["wrong"]["prompt"] == sets["clean"]["prompt"]
    right = [
        [f"{{{row['answer']}}}" in row["completion"][0]["content"] for row in sets[name]]
        for name in ("clean", "wrong")
    ]
    assert all(right[0]) and 0 < sum(right[1]) < 8


def test_report_to_tensorboard(rows, checkpoint):
    argv = ["run", "dco", "--model_name_or_path", checkpoint, "--output_dir", str(rows / "out")]
    argv += ["--dataset_name", str(rows / "math.jsonl"), "--report_to", "tensorboard", *SMALL]
    assert cli.main(argv) == 0
    assert list((rows / "out").rglob("events.out.tfevents.*"))


def test_confidence_recipe_with_given_checkpoints(rows, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("LLMMIX_CACHE", str(rows / "cache"))
    argv = ["run", "confidence", "--dataset_name", str(rows / "math.jsonl"), *SMALL]
    argv += ["--output_dir", str(rows / "out"), "--checkpoints", checkpoint, checkpoint]
    assert cli.main(argv) == 0
    assert "24 rows with confidence" in capsys.readouterr().out
    assert len((rows / "out" / "confidence.jsonl").read_text().splitlines()) == 24


@pytest.mark.slow
def test_all_three_stages_on_two_processes(rows, checkpoint):
    """Stage 1 too runs on every rank: one reference, rows scored in shards, one file."""
    command = [sys.executable, "-m", "llmmix.cli", "run", "--num_processes", "2", "sftmix"]
    command += ["--model_name_or_path", checkpoint, "--dataset_name", str(rows / "math.jsonl")]
    command += ["--output_dir", str(rows / "out"), "--num_checkpoints", "2", *SMALL]
    command += ["--per_device_train_batch_size", "2", "--logging_steps", "1"]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",  # NCCL refuses two ranks on one GPU
        "LLMMIX_CACHE": str(rows / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report:") == 1  # one main process: the ranks train together
    logged = json.loads((rows / "out" / "trainer_state.json").read_text())["log_history"]
    assert logged[0]["epoch"] == pytest.approx(1 / 6, abs=1e-3)  # 4 rows a step of 24, not 2
    assert len((rows / "out" / "confidence.jsonl").read_text().splitlines()) == 24
    assert (rows / "out" / "model.safetensors").exists() and (rows / "out" / "report.html").exists()
    assert len(list((rows / "cache" / "confidence").glob("*.npy"))) == 2


def test_quickstart_trains_three_times_and_evaluates_the_three(
    checkpoint, tmp_path, monkeypatch, capsys
):
    """Its training in this process; the evaluation, a command, is only written down."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tiny-1").symlink_to(checkpoint)
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    commands, run = [], subprocess.run

    def note(command, *args, **given):
        if "pass_at_n" in command:
            commands.append(command)
            return subprocess.CompletedProcess(command, 0)
        return run(command, *args, **given)  # Triton compiles its kernels where there is a GPU

    monkeypatch.setattr(subprocess, "run", note)
    argv = ["run", "quickstart", "--max_steps", "3", "--train_rows", "8", "--batch_size", "4"]
    assert cli.main([*argv, "--num_samples", "4", "--output_dir", str(tmp_path / "out")]) == 0
    trained = [str(tmp_path / "out" / name) for name in ("SFT", "SFTMix", "DCO")]
    assert all((Path(folder) / "model.safetensors").exists() for folder in trained)
    (command,) = commands
    flags = command[command.index("pass_at_n") + 1 :]
    assert flags[:3] == ["--n", "1", "4"] and set(trained) <= set(flags)


@pytest.mark.slow
def test_quickstart_runs_small(checkpoint, tmp_path, monkeypatch):
    """The whole of it on a random model; what it shows is for a real run."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tiny-1").symlink_to(checkpoint)
    command = [sys.executable, "-m", "llmmix.cli", "run", "quickstart", "--max_steps", "20"]
    command += ["--train_rows", "16", "--test_rows", "4", "--num_samples", "4", "--batch_size", "4"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")],
        env={**os.environ, "LLMMIX_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name in done.stdout for name in ("SFT", "SFTMix", "DCO", "pass@4", "report.html"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2


@pytest.fixture
def roles(tmp_path):
    """Files of questions to forget and to retain, as builtin:authors has them."""
    for role in ("forget", "retain"):
        rows = [{"question": f"Who wrote {role} {n}?", "answer": f"Author {n}."} for n in range(6)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{role}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "flags", "metrics"),
    [
        ("flat", [], ["flat/template_prob", "flat/forget_prob", "flat/loss"]),
        ("flat", [*LORA, "--divergence", "Total-Variation"], ["flat/loss"]),
        ("flat", ["--retain_weight", "0.5"], ["flat/retain_loss"]),
        ("unlearn", [], ["unlearn/forget_loss", "unlearn/retain_loss"]),
        ("unlearn", ["--loss", "rmu", *LORA], ["unlearn/retain_loss"]),
        ("unlearn", ["--loss", "ceu"], ["unlearn/forget_prob"]),
        ("unlearn", ["--loss", "pdu", "--epsilon", "1"], ["unlearn/multiplier"]),
        ("unlearn", ["--loss", "dpo", "--reference", "copy"], ["unlearn/template_prob"]),
    ],
    ids=str,
)
def test_unlearning_recipes_train_and_save(name, flags, metrics, roles, checkpoint, capsys):
    out = roles / "out"
    argv = ["run", name, "--model_name_or_path", checkpoint, "--output_dir", str(out), *SMALL]
    argv += ["--dataset_name", str(roles / "forget.jsonl"), *flags]
    if "unlearn/retain_loss" in metrics or {"--retain_weight", "pdu", "dpo"} & set(flags):
        argv += ["--retain_dataset_name", str(roles / "retain.jsonl")]
    assert cli.main(argv) == 0
    assert AutoModelForCausalLM.from_pretrained(out) is not None
    adapter = "--use_peft" in flags
    assert (out / ("adapter_model.safetensors" if adapter else "model.safetensors")).exists()
    assert "data:image/png;base64" in (out / "report.html").read_text()
    assert set(metrics) <= set(logged(out))
    assert f"Model saved to {out}" in capsys.readouterr().out


def test_unlearning_recipes_take_splits_of_the_builtin_authors(roles, checkpoint):
    argv = ["run", "unlearn", "--model_name_or_path", checkpoint, "--output_dir", str(roles / "o")]
    argv += ["--dataset_name", "builtin:authors", "--retain_dataset_name", "builtin:authors"]
    assert cli.main([*argv, *SMALL, "--max_steps", "1"]) == 0
    assert "unlearn/retain_loss" in logged(roles / "o")


@pytest.mark.parametrize("loss", ["npo", "grad_diff", "kl", "rmu", "pdu", "idk"])
def test_a_loss_without_its_rows_says_so_before_the_model_is_loaded(loss, roles, capsys):
    argv = ["run", "unlearn", "--model_name_or_path", "no/such-checkpoint", "--loss", loss]
    argv += ["--epsilon", "1.0", "--dataset_name", str(roles / "forget.jsonl"), *SMALL]
    assert cli.main([*argv, "--output_dir", str(roles / "out")]) == 2
    said = capsys.readouterr().err
    assert f"loss='{loss}'" in said and "`retain_dataset_name`" in said and "checkpoint" not in said


def test_flat_with_a_retain_weight_alone_says_so_before_the_model_is_loaded(roles, capsys):
    argv = ["run", "flat", "--model_name_or_path", "no/such-checkpoint", *SMALL]
    argv += ["--dataset_name", str(roles / "forget.jsonl"), "--output_dir", str(roles / "out")]
    assert cli.main([*argv, "--retain_weight", "0.5"]) == 2
    assert "`retain_weight`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("unlearn", ["--loss", "pdu"], "set it"),
        ("unlearn", ["--retain_weight", "0", "--beta", "0"], "`beta` must be positive"),
    ],
    ids=str,
)
def test_mistakes_in_unlearning_flags_are_told_without_a_traceback(
    name, flags, said, roles, checkpoint, capsys
):
    argv = ["run", name, "--model_name_or_path", checkpoint, *SMALL, *flags]
    argv += ["--dataset_name", str(roles / "forget.jsonl"), "--output_dir", str(roles / "out")]
    assert cli.main(argv) == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_unlearning_study_runs_small(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tiny-1").symlink_to(checkpoint)
    argv = ["run", "unlearning_study", "--losses", "flat+retain", "npo", "--seeds", "0", "1"]
    argv += ["--learning_rates", "1e-3", "--rows", "4", "6", "4", "--teach_epochs", "1"]
    argv += ["--epochs", "1", "--processes", "1", "--output_dir", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    found = json.loads((tmp_path / "out" / "unlearning_study.json").read_text())
    assert set(found) == {"original", "retrained", "flat+retain 0.001", "npo 0.001"}
    assert len(found["npo 0.001"]) == 2
    assert found["retrained"][0]["metrics"]["forget_quality"]["value"] == 1  # to itself
    assert (tmp_path / "out" / "unlearning_study.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "training").exists()
    assert "npo 0.001" in capsys.readouterr().out
