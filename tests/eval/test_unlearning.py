import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from llmmix.eval.unlearning import UnlearningArguments, load_sets, main
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from llmmix import data
from llmmix.unlearning.evaluation.document import as_rows
from llmmix.unlearning.evaluation.scores import score_answers


@pytest.fixture(scope="module")
def reseeded(checkpoint, tmp_path_factory):
    """Another random checkpoint of the same kind: stands for one trained without the forget set."""
    folder = tmp_path_factory.mktemp("reseeded")
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(1)
    model.lm_head.weight.data += 0.1 * torch.randn_like(model.lm_head.weight)
    model.save_pretrained(folder)
    for file in os.listdir(checkpoint):
        if "token" in file or "template" in file:
            (folder / file).write_bytes(open(f"{checkpoint}/{file}", "rb").read())
    return str(folder)


def flags(checkpoint, reseeded, folder, **given) -> UnlearningArguments:
    names = dict.fromkeys(("forget", "retain", "holdout"), "builtin:authors")
    given = {"retain_model": reseeded, "leak_samples": 2, "max_new_tokens": 6} | given
    return UnlearningArguments(
        [checkpoint],
        **names,
        facts=["builtin:authors"],
        max_rows=4,
        leak_max_new_tokens=5,
        output_dir=str(folder),
        **given,
    )


def test_program_writes_everything_and_measures_once(
    checkpoint, reseeded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    calls = []
    forward = LlamaForCausalLM.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    probes = ["relearn", "paraphrase", "int8", "int4"]
    given = {"original": reseeded, "probes": probes, "compat": "open_unlearning"}
    args = flags(checkpoint, reseeded, tmp_path / "out", gradient_norms=True, **given)
    (first,) = main(args).values()
    assert calls
    folder = tmp_path / "out" / os.path.basename(checkpoint)
    text = (folder / "unlearning.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    document = json.loads(text)
    assert document["versions"].keys() >= {"torch", "transformers", "llmmix"}
    assert document["metrics"]["leak@1"]["scorer"] == "extraction"
    assert set(document["probes"]) == set(probes) and document["probes"]["relearn"]["rows"] == 2
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and {line["set"] for line in lines} == set(first["items"])
    compat = json.loads((folder / "open_unlearning" / "TOFU_EVAL.json").read_text())
    summary = json.loads((folder / "open_unlearning" / "TOFU_SUMMARY.json").read_text())
    assert summary == {name: entry["agg_value"] for name, entry in compat.items()}
    assert set(compat["forget_truth_ratio"]["value_by_index"]) == set("0123")
    assert summary["forget_quality"] == pytest.approx(first["metrics"]["forget_quality"]["value"])
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]) == {folder.name}
    out = capsys.readouterr().out
    assert "forget quality" in out and "↓" in out and "forget rouge, int4" in out

    calls.clear()
    (second,) = main(args).values()
    assert not calls
    assert json.dumps(second) == json.dumps(first)
    log = str(tmp_path / "out" / "retain_model" / "unlearning.json")
    (third,) = main(flags(checkpoint, None, tmp_path / "log", retain_log=log)).values()
    assert third["metrics"]["forget_quality"] == first["metrics"]["forget_quality"]
    with pytest.raises(ValueError, match="another forget set"):
        broken = tmp_path / "broken.json"
        broken.write_text(json.dumps(json.loads(open(log).read()) | {"data": {}}))
        main(flags(checkpoint, None, tmp_path / "log", retain_log=str(broken)))


def test_a_checkpoint_trained_anew_is_measured_anew(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    data.load_splits("builtin:authors")["forget"].take(3).to_json(tmp_path / "rows.jsonl")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    args = UnlearningArguments(
        [str(folder)],
        str(tmp_path / "rows.jsonl"),
        max_new_tokens=4,
        leak_samples=1,
        output_dir=str(tmp_path / "out"),
    )
    (before,) = main(args).values()
    told = capsys.readouterr().out
    assert "mia loss" in told and "needs a holdout set" in told
    model.lm_head.weight.data *= 0.5
    model.save_pretrained(folder)
    (after,) = main(args).values()
    assert before["fingerprint"] != after["fingerprint"]
    nlls = [r["items"]["forget"][0]["nll"] for r in (before, after)]
    assert abs(nlls[0] - nlls[1]) > 0.1


def test_adapters_are_runs_of_their_own(checkpoint, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "lora")
    args = UnlearningArguments(
        [checkpoint],
        "builtin:authors",
        adapter=["none", str(tmp_path / "lora")],
        max_rows=2,
        max_new_tokens=4,
        probes=["relearn"],
        output_dir=str(tmp_path / "out"),
    )
    plain, lora = main(args).values()
    rows = as_rows(data.load_splits("builtin:authors")["forget"].take(2), "forget", tokenizer)
    for result in (lora, plain):
        nlls = [record["nll"] for record in result["items"]["forget"]]
        expected = [score.nll for score in score_answers(adapted, tokenizer, rows)]
        assert nlls == pytest.approx(expected, rel=1e-4)
        adapted = adapted.unload() if result is lora else adapted
    assert lora["items"]["forget"][0]["nll"] != plain["items"]["forget"][0]["nll"]


def test_sets_are_found_by_role_and_format(tmp_path):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "gt": ["1", "2"]})
    rows.to_json(tmp_path / "verbatim.jsonl")
    Dataset.from_dict({"text": ["c"]}).to_json(tmp_path / "news_perturbed.jsonl")
    names = [str(tmp_path / "news_perturbed.jsonl"), "builtin:authors@medium"]
    args = UnlearningArguments(
        ["m"], str(tmp_path / "verbatim.jsonl"), retain="builtin:authors@small", facts=names
    )
    found = load_sets(args)
    assert {role: len(rows) for role, rows in found.items()} == {
        "forget": 2,
        "retain": 160,
        "news": 1,
        "medium": len(found["medium"]),
    }
    assert set(found["forget"].column_names) == {"prompt", "gt"}
    args.facts = [names[0], names[0]]
    with pytest.raises(ValueError, match="`facts` names one twice"):
        load_sets(args)
    args.facts, args.retain = None, "builtin:math"
    assert len(load_sets(args)["retain"]) == len(data.load_splits("builtin:math")["train"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probes": ["int2"]}, "`probes`: no 'int2'; there are relearn"),
        ({"compat": "tofu"}, "`compat` must be 'open_unlearning'"),
        ({"retain_log": "x", "retain_model": "y"}, "not both"),
        ({"leak_n": [4], "leak_samples": 2}, "`leak_n` of 4 needs as many samples"),
        ({"rouge_words": "greek"}, "`rouge_words` must be"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(given, message):
    with pytest.raises(ValueError, match=message):
        main(UnlearningArguments(["m"], "builtin:authors", **given))


def test_two_processes_give_the_numbers_of_one(checkpoint, tmp_path, monkeypatch):
    given = {"max_rows": 3, "leak_samples": 2, "max_new_tokens": 5, "leak_max_new_tokens": 4}
    given |= {"holdout": "builtin:authors", "gradient_norms": True}
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))

    def launch(processes: int, folder: str) -> None:
        command = [sys.executable, "-m", "llmmix.cli", "eval", "--num_processes", str(processes)]
        command += ["unlearning", "--model_name_or_path", checkpoint, "--forget", "builtin:authors"]
        command += ["--probes", "int8", "--output_dir", str(tmp_path / folder)]
        command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["LLMMIX_CACHE"] = str(tmp_path / f"cache of {folder}")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Results:") == 1

    if torch.cuda.is_available():  # this process would measure on a GPU, and two share no GPU
        launch(1, "one")
    else:
        main(
            UnlearningArguments(
                [checkpoint],
                "builtin:authors",
                probes=["int8"],
                output_dir=str(tmp_path / "one"),
                **given,
            )
        )
    launch(2, "two")
    one, two = (
        json.loads(next((tmp_path / name).glob("*/unlearning.json")).read_text())
        for name in ("one", "two")
    )
    assert one == two


def test_the_current_folder_is_the_last_place_of_a_named_function(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (tmp_path / "colorsys.py").write_text("")
    (tmp_path / "mine.py").write_text("import colorsys\nraise RuntimeError(colorsys.__file__)\n")
    with pytest.raises(RuntimeError) as error:
        main(UnlearningArguments([checkpoint], "builtin:authors", fluency="mine:score"))
    assert not str(error.value).startswith(str(tmp_path))
