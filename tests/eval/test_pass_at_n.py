import json
import os
import signal
import subprocess
import sys
import time

import pytest
from datasets import Dataset
from llmmix.eval.pass_at_n import (
    PassAtNArguments,
    _runs,
    evaluate,
    main,
    pass_at_n,
    reference_loss,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmmix.grading.evaluate import reference_answers, summarize
from llmmix.grading.sample_log import SampleLog, prompt_id

SMALL = {"dataset_config": "1", "max_problems": 3, "num_samples": 4, "n": [4, 1]}
SMALL |= {"max_new_tokens": 6, "verifier": "exact"}


@pytest.fixture
def loaded(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return model, AutoTokenizer.from_pretrained(checkpoint)


def test_evaluate_counts_what_the_verifier_says(loaded, math_rows):
    seen = []

    def verify(completion, answer):
        seen.append(answer)
        return len(seen) % 2 == 0

    rows = math_rows.select(range(3))
    result = evaluate(
        *loaded, rows, num_samples=4, n=[4, 2, 1], verifier=verify, max_new_tokens=8, seed=1
    )
    assert sum(result["n_correct"]) == 6 and result["verdicts"]["wrong"] == 6
    assert sorted(seen) == sorted(a for a in rows["answer"] for _ in range(4))
    assert list(result["pass_at_n"]) == ["1", "2", "4"]
    for n, value in result["pass_at_n"].items():
        assert value == pytest.approx(pass_at_n(4, result["n_correct"], int(n)).mean())
        low, high = result["interval"][n]
        assert low <= value <= high
    assert result["estimator"] == "unbiased" and result["problems"] == {"1": 3, "2": 3, "4": 3}
    with pytest.raises(ValueError, match="`n` must lie between 1 and the 4 samples"):
        evaluate(*loaded, rows, num_samples=4, n=[8])
    blank = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", " "]})
    with pytest.raises(ValueError, match=r"Row 1 has no `answer` \(1 such rows\)"):
        evaluate(*loaded, blank, num_samples=4, n=[1])


def test_answers_are_text_or_numbers():
    rows = Dataset.from_dict({"answer": [3.0, 2.5, float("nan")]})
    assert reference_answers(rows.take(2)) == ["3", "2.5"]
    with pytest.raises(ValueError, match="Row 2 has no `answer`"):
        reference_answers(rows)
    assert reference_answers(Dataset.from_dict({"answer": [7]})) == ["7"]
    with pytest.raises(ValueError, match="Row 0 has an `answer` of type list"):
        reference_answers(Dataset.from_dict({"answer": [["3"]]}))


def record(problem, sample, verdict, completion="", verifier="math"):
    fields = {"problem": problem, "sample": sample, "verdict": verdict, "completion": completion}
    return fields | {"tokens": 2, "finished": sample % 2 == 0, "verifier": verifier}


def test_failed_verifications_are_never_counted_as_wrong():
    records = [record(0, s, "right" if s < 2 else "failed") for s in range(4)]
    records += [record(1, s, "wrong" if s else "unparsable") for s in range(4)]
    result = summarize(records, 3, 4, [1, 2, 4], left_out=[2])
    assert result["n_judged"] == [2, 4, 0] and result["n_correct"] == [2, 0, 0]
    # pass@4 of the first problem cannot be known from two judged samples
    assert result["problems"] == {"1": 2, "2": 2, "4": 1}
    assert result["pass_at_n"] == {"1": 0.5, "2": 0.5, "4": 0.0}
    assert result["interval"]["4"] is None
    assert result["verdicts"] == {"right": 2, "wrong": 3, "unparsable": 1, "failed": 2}
    assert result["cut"] == 4 and result["left_out"] == [2]


def test_majority_votes_go_by_answer():
    said = [("7", "right"), ("7", "right"), ("8", "wrong"), ("9", "wrong"), ("", "unparsable")]
    records = [
        record(0, s, verdict, rf"so \boxed{{{answer}}}") for s, (answer, verdict) in enumerate(said)
    ]
    result = summarize(records, 1, 5, [1, 5], maj=True)
    assert result["maj_at_n"] == pytest.approx({"1": 0.4, "5": 1.0}, abs=0.03)


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


def test_reference_loss_is_the_mean_token_loss(loaded, math_rows):
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = loaded
    rows = math_rows.select(range(8))
    args = SFTConfig("out", bf16=False, use_cpu=True, disable_tqdm=True)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    expected = trainer.evaluate(rows)["eval_loss"]
    assert reference_loss(model, tokenizer, rows, batch_size=3) == pytest.approx(expected, rel=1e-5)


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


def test_another_verifier_judges_again_and_samples_nothing(checkpoint, tmp_path, monkeypatch):
    args = {"output_dir": str(tmp_path), **SMALL}
    (first,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert first["verdicts"]["right"] == 0
    monkeypatch.setattr("llmmix.sampling.completions.Engine", None)  # it would fail if it were used
    (again,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert again["verdicts"] == first["verdicts"]
    args["verifier"] = f"{__name__}:yes"
    (judged,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert judged["verdicts"]["right"] == 12
    args["verifier"] = f"{__name__}:broken"
    (failed,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert failed["verdicts"]["failed"] == 12 and failed["pass_at_n"]["1"] is None
    assert failed["errors"] == {"RuntimeError: [/b] not today": 12}
    args["verifier"] = "exact"
    (mended,) = main(PassAtNArguments([checkpoint], **args)).values()
    assert mended["verdicts"] == first["verdicts"] and mended["errors"] == {}
    args["verifier"] = f"{__name__}:yes"
    (fewer,) = main(PassAtNArguments([checkpoint], **args | {"num_samples": 2, "n": [1]})).values()
    assert fewer["n_judged"] == [2, 2, 2]


def yes(completion, answer):
    return True


def broken(completion, answer):
    raise RuntimeError("[/b] not today")


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


def flags(checkpoint, out, samples=4):
    given = f"--dataset_config 1 --max_problems 5 --num_samples {samples} --n 1 --verifier exact"
    given += f" --model_name_or_path {checkpoint} --max_new_tokens 8 --output_dir {out}"
    return ["pass_at_n", *given.split()]


def completions(folder) -> dict:
    (path,) = folder.glob("*/samples.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(line["problem"], line["sample"]): line["completion"] for line in lines}
    assert len(found) == len(lines)
    return found


def test_two_processes_sample_the_same_set(checkpoint, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", []), ("two", ["--num_processes", "2"])):
        command = [*COMMAND, *launcher, *flags(checkpoint, tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Report:") == 1
    assert completions(tmp_path / "one") == completions(tmp_path / "two")
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    for (a,), (b,) in [(one["runs"].values(), two["runs"].values())]:
        for key in ("pass_at_n", "interval", "n_correct", "n_judged", "verdicts"):
            assert a[key] == b[key]


def test_killed_and_resumed_samples_nothing_twice(checkpoint, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, *flags(checkpoint, tmp_path / "out", samples=1500)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    path = None
    while time.monotonic() < deadline:
        path = next(iter((tmp_path / "out").glob("*/samples.jsonl")), None)
        if path is not None and path.stat().st_size > 60_000:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with path.open("ab") as file:
        file.write(b'{"problem": 4, "samp')  # as a kill in the middle of a line leaves it
    before = path.read_text().splitlines()[:-1]
    assert 0 < len(before) < 7_500
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert path.read_text().splitlines()[: len(before)] == before
    found = completions(tmp_path / "out")  # which asserts that none is there twice
    assert len(found) == 7_500
    whole = [*COMMAND, *flags(checkpoint, tmp_path / "whole", samples=1500)]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and completions(tmp_path / "whole") == found


def test_a_log_reads_the_first_of_two(tmp_path):
    log = SampleLog(tmp_path, {"seed": 0})
    log.append([{"problem": 0, "sample": 0, "x": 1}])
    log.append([{"problem": 0, "sample": 0, "x": 2}, {"problem": 0, "sample": 1, "x": 3}])
    log.append([])
    assert [r["x"] for r in SampleLog(tmp_path, {"seed": 0}).read()] == [1, 3]
    log.replace([{"problem": 0, "sample": 0, "x": 5}])
    assert [r["x"] for r in log.read()] == [5]
