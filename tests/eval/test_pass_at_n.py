import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from datasets import Dataset
from llmmix.eval import pass_at_n
from llmmix.eval.pass_at_n import PassAtNArguments, _runs, evaluate, main
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmmix.cli import parse_args
from llmmix.grading.sample_log import prompt_id
from tests.dying import another_process_in

SMALL = {"dataset_config": "1", "max_problems": 3, "num_samples": 4, "n": [4, 1]}
SMALL |= {"max_new_tokens": 6, "verifier": "exact"}


@pytest.fixture
def loaded(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model, AutoTokenizer.from_pretrained(checkpoint)


def test_prompts_without_room_are_left_out_and_told(loaded, math_rows, tmp_path, capsys):
    rows = Dataset.from_dict({"prompt": ["1+1=", "1" * 300], "answer": ["2", "3"]})
    result = evaluate(*loaded, rows, num_samples=2, n=[1], verifier="exact", max_new_tokens=8)
    assert result["left_out"] == [1] and result["problems"] == {"1": 1}
    rows.to_json(tmp_path / "rows.jsonl")
    main(
        PassAtNArguments(
            [loaded[0].name_or_path],
            dataset_name=str(tmp_path / "rows.jsonl"),
            dataset_split="train",
            output_dir=str(tmp_path / "out"),
            num_samples=2,
            n=[1],
            max_new_tokens=8,
            verifier="exact",
        )
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "1 problems left out" in told and "(first: row 1)" in told


def test_each_run_has_a_folder_of_its_own():
    def names(*models, **given):
        return [run.name for run in _runs(PassAtNArguments(list(models), **given))]

    assert names("a/checkpoint-1", "b/checkpoint-1", "./c") == [
        "a-checkpoint-1",
        "b-checkpoint-1",
        "c",
    ]
    assert names("a/x", "builtin:tiny") == ["x", "builtin-tiny"]
    assert names("a/x", temperature=[0.5, 1.0]) == ["x-T0.5", "x-T1"]
    assert names("a/x", adapter=["none", "l1", "l2"]) == ["x", "l1", "l2"]
    for given, message in (
        ({"temperature": [1.0, 1.0]}, "`temperature` names one twice"),
        ({"backend": "tgi"}, "`backend` must be"),
        ({"adapter": ["l", "l"]}, "names one twice"),
    ):
        with pytest.raises(ValueError, match=message):
            names("a/x", **given)
    with pytest.raises(ValueError, match="names one twice"):
        names("a/x", "a/x")
    with pytest.raises(ValueError, match="one `model_name_or_path`"):
        names("a", "b", adapter=["l"])


def test_program_compares_models_and_writes_everything(checkpoint, tmp_path, capsys):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"]),
    )
    model.save_pretrained(tmp_path / "lora")
    args = PassAtNArguments(
        [checkpoint],
        adapter=["none", str(tmp_path / "lora")],
        output_dir=str(tmp_path / "out"),
        maj=True,
        **SMALL,
    )
    results = main(args)
    plain, adapted = results
    assert adapted == "lora"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["runs"]) == [plain, "lora"]
    assert set(summary["differences"]["lora"]["4"]) == {"difference", "interval", "problems"}
    samples = {
        run: [
            json.loads(line)
            for line in (tmp_path / "out" / run / "samples.jsonl").read_text().splitlines()
        ]
        for run in results
    }
    assert {len(lines) for lines in samples.values()} == {12}
    assert {line["verdict"] for line in samples[plain]} <= {"right", "wrong", "unparsable"}
    assert [s["completion"] for s in samples[plain]] != [s["completion"] for s in samples["lora"]]
    document = json.loads((tmp_path / "out" / plain / "pass_at_n.json").read_text())
    assert document["eval"] == "pass_at_n" and len(document["n_correct"]) == 3
    assert "data:image/png;base64" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "figures" / "pass_at_n.png").exists()
    out = capsys.readouterr().out
    assert "pass@4" in out and "maj@4" in out and "minus that of" in out


def test_what_can_be_known_is_refused_before_a_model_is_loaded(checkpoint, tmp_path, monkeypatch):
    """And the second model's faults before the first is sampled."""
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    monkeypatch.setattr("llmmix.models.Loader.model", None)  # it would fail if it were called
    given = {"output_dir": str(tmp_path / "out"), **SMALL}
    for models, wrong, message in (
        ([checkpoint, str(bare)], {}, "the tokenizer has no chat template"),
        ([checkpoint], {"n": [8]}, "`n` must lie between 1 and the 4 samples"),
        ([checkpoint], {"top_p": 0.0}, "`top_p` must lie"),
        ([checkpoint], {"temperature": [1.0, -1.0]}, "`temperature` must be 0"),
        ([checkpoint], {"max_new_tokens": 0}, "`max_new_tokens` must be 1 or more"),
        ([checkpoint], {"max_problems": 0}, "`max_problems` must be 1 or more"),
        ([checkpoint], {"verifier": "no_such:function"}, "no_such"),
    ):
        with pytest.raises(ValueError, match=message):
            main(PassAtNArguments(models, **given | wrong))


def test_no_result_is_lost_for_the_loss_of_references(checkpoint, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise IndexError("index out of range in self")

    monkeypatch.setattr(pass_at_n, "reference_loss", fails)
    (result,) = main(PassAtNArguments([checkpoint], output_dir=str(tmp_path), **SMALL)).values()
    assert result["loss"] is None and len(result["n_correct"]) == 3
    assert "No loss of the reference completions: IndexError: index out" in capsys.readouterr().out


def test_temperature_zero_gives_one_answer_a_problem(tied_checkpoint, tmp_path):
    args = {"output_dir": str(tmp_path), **SMALL, "temperature": [0.0]}
    main(PassAtNArguments([tied_checkpoint], **args))
    (file,) = tmp_path.glob("*/samples.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 12
    assert len({(line["problem"], line["completion"]) for line in samples}) == 3


def test_names_that_look_like_mathematics_and_a_report_that_fails(
    checkpoint, tmp_path, monkeypatch, capsys
):
    names = ["$a$ $", r"$\frac$", "_c"]
    models = [str(shutil.copytree(checkpoint, tmp_path / name)) for name in names]
    args = {"output_dir": str(tmp_path / "out"), **SMALL, "temperature": [0.5, 1.0]}
    main(PassAtNArguments(models, **args))
    said = capsys.readouterr().out
    assert "since it failed" not in said and "Report: " in said
    assert (tmp_path / "out" / "report.html").read_text().count("<img") == 2

    def fails(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr("llmmix.report._page", fails)
    results = main(PassAtNArguments(models, **args))
    said = capsys.readouterr().out
    assert f"No report of {tmp_path / 'out'}, since it failed: RuntimeError: no room" in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["runs"].keys() == set(
        results
    )


def test_a_folder_that_another_evaluation_has_is_refused(checkpoint, tmp_path):
    with another_process_in(tmp_path), pytest.raises(ValueError, match="is in use by another run"):
        main(PassAtNArguments([checkpoint], output_dir=str(tmp_path), **SMALL))


def test_another_verifier_judges_again_and_samples_nothing(checkpoint, tmp_path, monkeypatch):
    args = {"output_dir": str(tmp_path), **SMALL}
    (first,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert first["verdicts"]["right"] == 0
    monkeypatch.setattr("llmmix.sampling.completions.Engine", None)  # it would fail if it were used
    (again,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert again["verdicts"] == first["verdicts"]
    args["verifier"] = "tests.grading.judges:yes"
    (judged,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert judged["verdicts"]["right"] == 12
    args["verifier"] = "tests.grading.judges:broken"
    (failed,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert failed["verdicts"]["failed"] == 12 and failed["pass_at_n"]["1"] is None
    assert failed["errors"] == {"RuntimeError: [/b] not today": 12}
    args["verifier"] = "exact"
    (mended,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert mended["verdicts"] == first["verdicts"] and mended["errors"] == {}
    args["verifier"] = "tests.grading.judges:yes"
    (fewer,) = main(PassAtNArguments([checkpoint], **args | {"num_samples": 2, "n": [1]})).values()
    assert fewer["n_judged"] == [2, 2, 2]


def test_samples_of_other_settings_are_not_mixed_in(checkpoint, tmp_path):
    args = {"output_dir": str(tmp_path), **SMALL}
    main(PassAtNArguments([checkpoint], **args))
    with pytest.raises(ValueError, match="drawn with temperature 1.0, not temperature 0.5"):
        main(PassAtNArguments([checkpoint], temperature=[0.5], **args))
    with pytest.raises(ValueError, match="samples of another prompt in row 0"):
        main(PassAtNArguments([checkpoint], **texts(tmp_path, args)))
    args = texts(tmp_path, args) | {"output_dir": str(tmp_path / "texts")}
    main(PassAtNArguments([checkpoint], **args))
    with pytest.raises(ValueError, match="samples of another prompt in row 0"):
        main(PassAtNArguments([checkpoint], prompt_template="Q: {prompt}", **args))


def test_samples_are_those_of_the_checkpoints_contents(checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(checkpoint, tmp_path / "model", copy_function=shutil.copyfile)
    args = PassAtNArguments([str(folder)], output_dir=str(tmp_path / "out"), **SMALL)
    (first,) = main(args).values()
    for file in folder.iterdir():
        os.utime(file, ns=(0, 0))
    with monkeypatch.context() as patched:
        patched.setattr("llmmix.sampling.completions.Engine", None)  # it would fail if it were used
        (again,) = main(args).values()
    assert again["n_correct"] == first["n_correct"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="holds samples drawn with model '"):
        main(args)


def texts(tmp_path, args) -> dict:
    """The same run on prompts of text."""
    rows = Dataset.from_dict({"prompt": ["1+1=", "2+2=", "3+3="], "answer": ["2", "4", "6"]})
    rows.to_json(tmp_path / "rows.jsonl")
    args = {key: value for key, value in args.items() if key != "dataset_config"}
    return args | {"dataset_name": str(tmp_path / "rows.jsonl"), "dataset_split": "train"}


def test_columns_templates_and_chat(checkpoint, tmp_path):
    rows = Dataset.from_dict({"problem": ["1+1="], "gold": ["2"], "prompt": ["not this"]})
    rows.to_json(tmp_path / "rows.jsonl")
    shared = {"dataset_name": str(tmp_path / "rows.jsonl"), "dataset_split": "train"}
    shared |= {"num_samples": 1, "n": [1], "max_new_tokens": 4, "verifier": "exact"}
    given = {"prompt_column": "problem", "answer_column": "gold", "apply_chat_template": True}
    given["prompt_template"] = "Solve {prompt} {x}"
    (result,) = main(
        PassAtNArguments([checkpoint], output_dir=str(tmp_path / "a"), **shared, **given)
    ).values()
    assert result["rows"] == 1
    (line,) = (tmp_path / "a" / "checkpoint0" / "samples.jsonl").read_text().splitlines()
    message = [{"role": "user", "content": "Solve 1+1= {x}"}]
    assert json.loads(line)["prompt_id"] == prompt_id(message) and json.loads(line)["answer"] == "2"
    for wrong, message in (
        ({"prompt_column": "question"}, r"`prompt_column`: no 'question' among"),
        ({"answer_column": "answer"}, r"`answer_column`: no 'answer' among"),
        ({"answer_column": "gold", "prompt_template": "hello"}, "`prompt_template` lacks"),
    ):
        with pytest.raises(ValueError, match=message):
            main(PassAtNArguments([checkpoint], output_dir=str(tmp_path), **shared, **wrong))


COMMAND = [sys.executable, "-m", "llmmix.cli", "eval"]
KILLED = """
import os, signal
from llmmix.cli import parse_args
from llmmix.eval import pass_at_n
from llmmix.grading import sample_log

sample_log.SECONDS_UNWRITTEN = 0  # each sample is written as it comes
append, written = sample_log.SampleLog.append, 0

def append_until_killed(log, records):
    global written
    append(log, records)
    written += len(records)
    if written >= 40:
        os.kill(os.getpid(), signal.SIGKILL)

sample_log.SampleLog.append = append_until_killed
pass_at_n.main(*parse_args((pass_at_n.PassAtNArguments,), pass_at_n.__file__))
"""


def flags(checkpoint, out) -> list[str]:
    given = "--dataset_config 1 --max_problems 5 --num_samples 30 --n 1 --verifier exact"
    given += f" --model_name_or_path {checkpoint} --max_new_tokens 8 --output_dir {out}"
    return given.split()


def run(command, ends_with=0) -> str:
    """What a process prints; on the CPU, since two ranks cannot share a GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == ends_with, done.stderr[-3000:]
    return done.stdout


def run_alone(flags) -> str:
    """What one process prints: this one, which has imported all, unless it would use a GPU."""
    if torch.cuda.is_available():
        return run([*COMMAND, "pass_at_n", *flags])
    with redirect_stdout(io.StringIO()) as out:
        main(*parse_args((PassAtNArguments,), pass_at_n.__file__, flags))
    return out.getvalue()


def completions(folder) -> dict:
    (path,) = folder.glob("*/samples.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(line["problem"], line["sample"]): line["completion"] for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The folder of an evaluation by one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_alone(flags(checkpoint, folder)).count("Report:") == 1
    return folder


def test_two_processes_sample_the_same_set(checkpoint, whole, tmp_path):
    launch = ["--num_processes", "2", "pass_at_n"]
    assert run([*COMMAND, *launch, *flags(checkpoint, tmp_path)]).count("Report:") == 1
    assert completions(whole) == completions(tmp_path)
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (whole, tmp_path))
    ((a,), (b,)) = one["runs"].values(), two["runs"].values()
    for key in ("pass_at_n", "interval", "n_correct", "n_judged", "verdicts"):
        assert a[key] == b[key]


def test_killed_and_resumed_samples_nothing_twice(checkpoint, whole, tmp_path):
    command = [sys.executable, "-c", KILLED, *flags(checkpoint, tmp_path)]
    run(command, ends_with=-signal.SIGKILL)
    (path,) = tmp_path.glob("*/samples.jsonl")
    with path.open("ab") as file:
        file.write(b'{"problem": 4, "samp')  # as a kill in the middle of a line leaves it
    before = path.read_text().splitlines()[:-1]
    assert len(before) == 40
    run_alone(flags(checkpoint, tmp_path))
    assert path.read_text().splitlines()[:40] == before
    found = completions(tmp_path)  # which asserts that none is there twice
    assert len(found) == 150 and found == completions(whole)
