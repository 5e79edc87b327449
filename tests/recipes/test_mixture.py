"""The recipes of mixtures, from files of rows to a model, a record and a page."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from llmmix import cli
from llmmix.files import CLAIM, read_record
from llmmix.laws.sweep import SweepArguments, choose_mixtures
from llmmix.mixing.domains import MixtureConfig, load_domains
from llmmix.mixing.record import drawn_shares
from tests.dying import another_process_in

SMALL = (
    "--max_steps 6 --per_device_train_batch_size 4 --validation_rows 4 --logging_steps 2".split()
)
SMALL += "--disable_tqdm true --save_strategy no --report_to none".split()
FORMATS = {
    "text": [{"text": f"{i}+{i}={2 * i}"} for i in range(24)],
    "pairs": [{"prompt": f"What is {i}*3? ", "completion": f"{3 * i}"} for i in range(24)],
    "chat": [
        {
            "messages": [
                {"role": "user", "content": f"{i} less 1?"},
                {"role": "assistant", "content": f"{i - 1}"},
            ]
        }
        for i in range(24)
    ],
}


@pytest.fixture
def files(tmp_path):
    for name, rows in FORMATS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(recipe, files, checkpoint, *flags, domains=("text", "pairs", "chat")) -> int:
    argv = ["run", recipe, "--model_name_or_path", checkpoint, "--output_dir", str(files / "out")]
    argv += ["--domains", *(f"{name}={files / name}.jsonl" for name in domains)]
    return cli.main([*argv, *SMALL, *flags])


def test_a_fixed_mixture_of_three_formats(files, checkpoint, capsys):
    weights = ["--weights", "0.5", "0.25", "0.25", "--draws", "even"]
    assert run("mixture", files, checkpoint, *weights) == 0
    out = files / "out"
    assert AutoModelForCausalLM.from_pretrained(out) is not None
    shares = drawn_shares(out)
    assert shares == pytest.approx({"text": 0.5, "pairs": 0.25, "chat": 0.25}, abs=2 / 24)
    header, entries = read_record(out)
    assert header["domains"] == header["targets"] == ["text", "pairs", "chat"]
    assert all(sum(e["counts"]) == 4 for e in entries if "counts" in e)
    shown = capsys.readouterr().out
    assert "Validation losses: text" in shown and "Share of the rows drawn: text" in shown
    assert "The mixture, and what was measured for it" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "method",
    [
        "aioli",
        "skillit",
        "doremi",
        "doge",
        pytest.param("odm", marks=pytest.mark.slow),  # made as skillit is
        "stratified",
    ],
)
def test_every_method_on_the_same_command(method, files, checkpoint):
    flags = ["--method", method, "--weights", "0.6", "0.4"]
    assert run("aioli", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    header, entries = read_record(files / "out")
    final = next(entry["final"] for entry in entries if "final" in entry)
    assert len(final) == 2 and np.isfinite(final).all()
    stages = {path.name for path in (files / "out").iterdir() if path.is_dir()}
    before = {"doremi": {"reference", "proxy"}, "doge": {"proxy"}}.get(method, set())
    assert before <= stages and (files / "out" / "model.safetensors").exists()
    if method in before:
        _, proxy = read_record(files / "out" / "proxy")
        average = [entry["average"] for entry in proxy if "average" in entry][-1]
        assert header["weights"] == pytest.approx(average)
    if method == "stratified":
        assert header["weights"] == [0.5, 0.5]


def test_a_mixture_without_padding_is_the_padded_one(files, checkpoint):
    """Its losses in training, and those of the domains."""
    found = []
    for flags in ([], ["--padding_free", "true"]):
        assert run("mixture", files, checkpoint, *flags, domains=("text", "pairs")) == 0
        state = json.loads((files / "out" / "trainer_state.json").read_text())
        losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        final = next(e["final"] for e in read_record(files / "out")[1] if "final" in e)
        found.append([*losses, *final])
        facts = json.loads((files / "out" / "run.json").read_text())
        assert facts.get("padding free", False) is bool(flags)
        shutil.rmtree(files / "out")
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_doremi_with_adapters(files, checkpoint):
    """The reference is an adapter's folder then, on the same model."""
    flags = ["--method", "doremi", "--use_peft", "--lora_target_modules", "q_proj", "v_proj"]
    assert run("aioli", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    assert (files / "out" / "reference" / "adapter_model.safetensors").exists()
    assert (files / "out" / "adapter_model.safetensors").exists()


def test_the_options_of_a_method_reach_it(files, checkpoint, capsys):
    flags = ["--method", "odm", "--method_options", "reward=losses", "decay=2"]
    assert run("aioli", files, checkpoint, *flags, domains=("text", "pairs")) == 2
    assert "`decay`" in capsys.readouterr().err
    assert run("aioli", files, checkpoint, "--method", "best") == 2
    assert "`method` must be one of" in capsys.readouterr().err


def test_a_sweep_writes_two_tables_and_goes_on(files, checkpoint):
    flags = ["--mixtures", "2", "--max_steps", "2"]
    assert run("mixture_sweep", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    tables = {}
    for name in ("ratios", "metrics"):
        with (files / "out" / f"{name}.csv").open() as file:
            tables[name] = list(csv.DictReader(file))
    assert [row["run_id"] for row in tables["ratios"]] == ["run-0000", "run-0001"]
    assert list(tables["metrics"][0]) == ["run_id", "name", "text_val_loss", "pairs_val_loss"]
    for row in tables["ratios"]:
        assert float(row["text"]) + float(row["pairs"]) == pytest.approx(1, abs=1e-9)
    before = (files / "out" / "metrics.csv").read_text()
    flags = ["--mixtures", "3", "--max_steps", "2"]
    assert run("mixture_sweep", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    after = (files / "out" / "metrics.csv").read_text()
    assert after.startswith(before) and len(after.splitlines()) == 4


def test_true_says_so_before_a_proxy_is_trained(files, checkpoint, capsys):
    flags = ["--method", "doge", "--resume_from_checkpoint", "true"]
    assert run("aioli", files, checkpoint, *flags, domains=("text", "pairs")) == 2
    assert "Give `auto`" in capsys.readouterr().err
    assert not (files / "out" / "proxy").exists()


def test_a_stage_of_doge_goes_on_from_its_complete_checkpoint(files, checkpoint, caplog):
    flags = ["--method", "doge", "--save_strategy", "steps", "--save_steps", "1"]
    flags += ["--max_steps", "2", "--resume_from_checkpoint"]
    assert run("aioli", files, checkpoint, *flags, "auto", domains=("text", "pairs")) == 0
    whole = (files / "out/proxy/model.safetensors").read_bytes()
    for step in (1, 2):
        shutil.rmtree(files / f"out/checkpoint-{step}")
    (files / "out/proxy/checkpoint-2/trainer_state.json").unlink()
    caplog.clear()
    assert run("aioli", files, checkpoint, *flags, "true", domains=("text", "pairs")) == 0
    assert f"goes on from {files / 'out/proxy/checkpoint-1'}" in caplog.text
    assert (files / "out/proxy/model.safetensors").read_bytes() == whole


def test_a_run_of_a_sweep_goes_on_from_its_checkpoint(files, checkpoint, monkeypatch):
    flags = ["--mixtures", "1", "--max_steps", "2", "--save_strategy", "steps"]
    flags += ["--save_steps", "1", "--keep_models", "true", "--resume_from_checkpoint", "auto"]
    assert run("mixture_sweep", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    metrics = (files / "out/metrics.csv").read_text()
    for name in ("ratios", "metrics"):
        (files / f"out/{name}.csv").unlink()
    monkeypatch.setattr(SFTTrainer, "training_step", None)  # a step would fail
    assert run("mixture_sweep", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    assert (files / "out/metrics.csv").read_text() == metrics


def test_a_sweep_of_other_mixtures_is_refused(files, checkpoint, capsys):
    flags = ["--mixtures", "1", "--max_steps", "1"]
    assert run("mixture_sweep", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    flags += ["--seed", "5"]
    assert run("mixture_sweep", files, checkpoint, *flags, domains=("text", "pairs")) == 2
    assert "a sweep of other mixtures" in capsys.readouterr().err


def test_a_sweep_cut_off_within_a_number_goes_on_to_the_same_tables(files, checkpoint, caplog):
    flags = ["--mixtures", "2", "--max_steps", "2"]
    assert run("mixture_sweep", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    tables = [files / "out" / name for name in ("ratios.csv", "metrics.csv")]
    whole = [table.read_bytes() for table in tables]
    tables[1].write_bytes(whole[1][:-6])
    assert run("mixture_sweep", files, checkpoint, *flags, domains=("text", "pairs")) == 0
    assert [table.read_bytes() for table in tables] == whole
    assert "metrics.csv: not whole and left out: 1 of its lines" in caplog.text


ODD = ["$a$ $", r"$\frac$", "_web"]


def test_names_that_look_like_mathematics_do_not_end_a_run(files, checkpoint, capsys):
    for name, rows in zip(ODD, FORMATS, strict=True):
        (files / f"{name}.jsonl").write_bytes((files / f"{rows}.jsonl").read_bytes())
    assert run("aioli", files, checkpoint, "--logging_steps", "1", domains=ODD) == 0
    shown = capsys.readouterr().out
    assert "Report: " in shown and "since it failed" not in shown
    assert (files / "out" / "report.html").read_text().count("<img") == 2
    assert drawn_shares(files / "out").keys() == set(ODD)


def test_a_figure_that_fails_does_not_end_a_run(files, checkpoint, monkeypatch, capsys):
    def fails(_):
        raise RuntimeError("no room")

    monkeypatch.setattr("llmmix.report.draw_mixture", fails)
    assert run("mixture", files, checkpoint) == 0
    shown = capsys.readouterr().out
    assert "No figure mixture.png in the report, since it failed: RuntimeError: no room" in shown
    assert "Report: " in shown and (files / "out" / "model.safetensors").exists()


def test_a_folder_that_another_run_has_is_refused(files, checkpoint, capsys):
    with another_process_in(files / "out"):
        assert run("mixture", files, checkpoint) == 2
    assert f"`--output_dir` {files / 'out'} is in use" in capsys.readouterr().err
    assert [path.name for path in (files / "out").iterdir()] == [CLAIM]


def test_all_ranks_end_where_another_run_has_the_folder(files, checkpoint):
    command = [sys.executable, "-m", "llmmix.cli", "run", "--num_processes", "2", "mixture"]
    command += ["--model_name_or_path", checkpoint, "--output_dir", str(files / "out")]
    command += ["--domains", f"text={files / 'text.jsonl'}", *SMALL]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with another_process_in(files / "out"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "is in use by another run" in done.stderr
    assert [path.name for path in (files / "out").iterdir()] == [CLAIM]


def test_samples_of_mixtures():
    prior = np.array([0.5, 0.3, 0.2])
    drawn = choose_mixtures(SweepArguments(mixtures=300), prior, seed=0)
    assert drawn.shape == (300, 3) and np.allclose(drawn.sum(1), 1)
    assert drawn.mean(0) == pytest.approx(prior, abs=0.06)
    grid = choose_mixtures(SweepArguments(sample="grid", grid_steps=2), prior, seed=0)
    assert len(grid) == 6 and {tuple(row) for row in grid} >= {(1, 0, 0), (0.5, 0.5, 0)}
    with pytest.raises(ValueError, match="`sample` must be dirichlet"):
        choose_mixtures(SweepArguments(sample="sobol"), prior, seed=0)
    with pytest.raises(ValueError, match="`grid_steps` must be at least 1, got 0"):
        choose_mixtures(SweepArguments(sample="grid", grid_steps=0), prior, seed=0)
    for wrong in ([], [1.0, 0.0], [float("inf")], [float("nan")]):
        with pytest.raises(ValueError, match="`concentration` must be positive numbers"):
            choose_mixtures(SweepArguments(concentration=wrong), prior, seed=0)


def test_mixtures_of_a_table(tmp_path):
    table = tmp_path / "next.csv"
    table.write_text("run_id,name,b,a\nnext-0000,next-0000,0.2500,0.75\nnext-0001,x,1,0\n")
    args = SweepArguments(sample=str(table))
    table.write_text("\ufeff" + table.read_text().replace(",", ";"))  # as a spreadsheet saves it
    drawn = choose_mixtures(args, np.array([0.5, 0.5]), 0, ["a", "b"])
    assert drawn.tolist() == [[0.75, 0.25], [0.0, 1.0]]
    with pytest.raises(ValueError, match="`sample`: .* must have a column for each of"):
        choose_mixtures(args, np.array([0.5, 0.5]), 0, ["a", "c"])
    table.write_text("run_id,a,b\n0,0.5,0.6\n")
    with pytest.raises(ValueError, match="`sample`: the shares of run 0 sum to 1.1"):
        choose_mixtures(args, np.array([0.5, 0.5]), 0, ["a", "b"])


def config(tmp_path, **options) -> MixtureConfig:
    return MixtureConfig(str(tmp_path / "out"), report_to="none", **options)


def test_domains_of_one_format_are_left_to_the_trainer(files, tokenizer):
    args = config(files, domains=[f"a={files / 'text'}.jsonl"], validation_rows=4)
    train, validation = load_domains(args, tokenizer)
    assert train["a"].column_names == ["text"] and len(train["a"]) == 20
    assert not {row["text"] for row in train["a"]} & {row["text"] for row in validation["a"]}


def test_domains_of_several_formats_are_scored_as_the_trainer_would(files, tokenizer):
    names = ("text", "pairs")
    args = config(
        files, domains=[f"{n}={files / n}.jsonl" for n in names], validation_rows=4, max_length=32
    )
    train, _ = load_domains(args, tokenizer)
    text, pair = train["text"][0], train["pairs"][0]
    assert text["labels"] == text["input_ids"] and text["labels"][-1] == tokenizer.eos_token_id
    scored = [token for token in pair["labels"] if token != -100]
    assert pair["labels"][0] == -100 and tokenizer.decode(scored[:-1]).strip().isdigit()


@pytest.mark.parametrize(
    ("domains", "options", "message"),
    [
        ([], {}, "`domains` is missing"),
        (["code.jsonl"], {}, "is not NAME=ROWS"),
        (["a={text}", "a={pairs}"], {}, "'a' is named twice"),
        (["a={text}"], {"validation_rows": 24}, "'a' has 24 rows and no validation split"),
        (["a={text}", "b={pairs}"], {"weights": [1.0]}, "`weights` must have one value"),
        (["a={text}", "b={pairs}"], {"weights": [0.0, 0.0]}, "all zero"),
        (["a={both}"], {"validation_rows": 4}, "rows of two formats"),
        (["a={odd}"], {"validation_rows": 1}, "has the columns"),
    ],
)
def test_what_is_amiss_with_domains_is_said(domains, options, message, files, tokenizer):
    both = [*FORMATS["text"], *FORMATS["pairs"]]
    (files / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    (files / "odd.jsonl").write_text('{"words": "x"}\n{"words": "y"}\n')
    paths = {name: files / f"{name}.jsonl" for name in (*FORMATS, "both", "odd")}
    args = config(files, domains=[d.format(**paths) for d in domains], **options)
    with pytest.raises(ValueError, match=message):
        load_domains(args, tokenizer)


@pytest.mark.slow
def test_the_study_runs_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    argv = ["run", "mixing_study", "--domains", "noise", "noise2", "--seeds", "2"]
    argv += ["--aioli_seeds", "2", "--max_steps", "24", "--batch_size", "2", "--test_rows", "4"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "mixing_study.json").read_text())
    assert {len(runs) for runs in found.values()} == {2} and len(found) == 9
    assert (tmp_path / "out" / "mixing_study.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "fixed, as Aioli drew" in shown and "DoReMi" in shown
