import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from llmmix.eval.unlearning import UnlearningArguments, load_sets, main, truth_ratio
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from llmmix import data
from llmmix.unlearning.evaluation import open_unlearning
from llmmix.unlearning.evaluation.evaluation import as_rows, evaluate_unlearning
from llmmix.unlearning.evaluation.metrics import membership_auc, option_probability
from llmmix.unlearning.evaluation.open_unlearning import (
    open_unlearning_exact_memorization,
    open_unlearning_extraction_strength,
    open_unlearning_privleak,
    open_unlearning_truth_ratios,
    open_unlearning_truth_value,
)
from llmmix.unlearning.evaluation.scores import AnswerScore, score_answers
from llmmix.unlearning.evaluation.texts import rouge, unicode_words


@pytest.fixture(scope="module")
def sets():
    splits = data.load_splits("builtin:authors")
    return {role: splits[role].take(6) for role in ("forget", "retain", "holdout", "facts")}


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


FEW = {"max_new_tokens": 6}


def test_metrics_follow_from_the_items(model, tokenizer, sets):
    model.train()
    result = evaluate_unlearning(model, tokenizer, sets, gradient_norms=True, **FEW)
    assert model.training
    metrics, items = result["metrics"], result["items"]
    rows = as_rows(sets["forget"], "forget", tokenizer)
    scores = score_answers(model, tokenizer, rows)
    chances = [np.exp(-score.nll) for score in scores]
    assert metrics["forget_probability"]["value"] == pytest.approx(np.mean(chances), rel=1e-4)
    paraphrased = rows.remove_columns("answer").rename_column("paraphrased_answer", "answer")
    correct = [score.nll for score in score_answers(model, tokenizer, paraphrased)]
    wrong = []
    for place in range(3):
        answers = [texts[place] for texts in rows["perturbed_answer"]]
        other = rows.remove_columns("answer").add_column("answer", answers)
        wrong.append([score.nll for score in score_answers(model, tokenizer, other)])
    expected = truth_ratio(correct, np.transpose(wrong).tolist())
    assert metrics["forget_truth_ratio"]["value"] == pytest.approx(expected.value, rel=1e-4)
    assert metrics["forget_truth_ratio"]["ratios"] == pytest.approx(expected.ratios, rel=1e-4)
    for record, row in zip(items["forget"], rows, strict=True):
        assert (
            record["rougeL_recall"] == rouge(record["generation"], row["answer"])["rougeL_recall"]
        )
    facts = [option_probability(r["nll"], r["wrong_nlls"]) for r in items["facts"]]
    assert metrics["facts_probability"]["value"] == pytest.approx(np.mean(facts))
    auc = membership_auc(*([r["min_k"] for r in items[role]] for role in ("forget", "holdout")))
    assert metrics["mia_min_k"]["value"] == auc.value
    assert metrics["mia_gradnorm"]["value"] is not None
    assert metrics["privacy_leakage"]["reference"] == "chance"
    assert metrics["forget_quality"]["reason"] == "needs --retain_model or --retain_log"
    assert metrics["mia_reference"]["reason"] == "needs --original"
    # The right answer ends in EOS, which says nothing of whether it is memorised
    bare = [score.without_last(tokenizer.eos_token_id) for score in scores]
    found = [np.mean(s.labels == s.predictions) for s in bare]
    assert metrics["forget_exact_memorization"]["value"] == pytest.approx(np.mean(found))


def test_comparison_with_a_retain_model(model, tokenizer, sets, reseeded):
    other = LlamaForCausalLM.from_pretrained(reseeded)
    retained = evaluate_unlearning(other, tokenizer, sets, **FEW)
    given = {"retained": retained, "original": (other, tokenizer), **FEW}
    mine = evaluate_unlearning(
        model, tokenizer, sets, fluency=lambda texts: [1.0] * len(texts), **given
    )
    same = evaluate_unlearning(other, tokenizer, sets, **given)["metrics"]
    assert same["forget_quality"]["value"] == 1 and same["forget_quality"]["statistic"] == 0
    assert same["mia_reference"]["value"] == 0.5  # all differences are zero
    assert same["privacy_leakage"]["value"] == 0
    metrics = mine["metrics"]
    assert 0 < metrics["forget_quality"]["value"] <= 1
    assert metrics["forget_quality"]["n_retain"] == 6
    assert metrics["privacy_leakage"]["reference"] == "the retain model"
    assert metrics["forget_perplexity"]["value"] > 1 and metrics["forget_fluency"]["value"] == 1
    utility = metrics["model_utility"]
    assert len(utility["components"]) == 6 and utility["missing"] == []
    reread = json.loads(json.dumps({k: v for k, v in retained.items() if k != "items"}))
    again = evaluate_unlearning(model, tokenizer, sets, retained=reread, **FEW)
    assert again["metrics"]["forget_quality"] == metrics["forget_quality"]


def test_results_that_are_not_comparable_are_refused(model, tokenizer, sets):
    few = {"forget": sets["forget"].take(2)}
    retained = evaluate_unlearning(model, tokenizer, few, generate=False)

    def compare(other, **given):
        evaluate_unlearning(model, tokenizer, few, retained=other, generate=False, **given)

    compare(retained)
    for changed, message in (
        ({"version": 0}, "another metric version: 0, here"),
        ({"data": {"forget": "x"}}, "another forget set: 'x', here"),
        ({"definitions": {}}, "another definitions"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(retained | changed)
    with pytest.raises(ValueError, match="another definitions"):
        compare(retained, min_k=0.2)
    with pytest.raises(ValueError, match=r"lacks \['data', 'definitions', 'metrics', 'version'\]"):
        compare({"forget_truth_ratio": {}})
    other = {"forget": sets["forget"].select([0, 2])}
    with pytest.raises(ValueError, match="another forget set"):
        evaluate_unlearning(model, tokenizer, other, retained=retained, generate=False)


def test_overlap_is_refused(model, tokenizer, sets):
    mixed = Dataset.from_list([*sets["retain"].take(2), sets["forget"][3]])
    question = sets["forget"][3]["question"]
    for role in ("retain", "holdout", "facts"):
        with pytest.raises(
            ValueError, match=f"1 of 6 questions of `forget` stand in `{role}`"
        ) as e:
            evaluate_unlearning(model, tokenizer, {"forget": sets["forget"], role: mixed})
        assert question[:40] in str(e.value)
    with pytest.raises(ValueError, match="`sets` must hold `forget`"):
        evaluate_unlearning(model, tokenizer, {"retain": mixed})
    texts = Dataset.from_dict({"text": ["1+1=2", "2+2=4"]})
    with pytest.raises(ValueError, match="2 of 2 questions of `forget` stand in `retain`"):
        evaluate_unlearning(model, tokenizer, {"forget": texts, "retain": texts})


def test_plain_text_is_scored_and_not_asked(model, tokenizer):
    texts = Dataset.from_dict({"text": ["1+1=2", "2+2=4", "12-3=9"]})
    metrics = evaluate_unlearning(model, tokenizer, {"forget": texts}, **FEW)["metrics"]
    assert metrics["forget_probability"]["n"] == 3
    assert "no prompts to answer" in metrics["forget_rouge"]["reason"]
    assert metrics["forget_quality"]["reason"] == "needs rows with `perturbed_answer`"
    assert metrics["model_utility"]["reason"] == "needs a retain set or facts"


def test_a_broken_model_is_not_flattered(model, tokenizer, sets):
    good = evaluate_unlearning(model, tokenizer, sets, **FEW)
    model.model.norm.weight.data.fill_(float("nan"))
    broken = evaluate_unlearning(
        model,
        tokenizer,
        sets,
        retained=good,
        generate=False,
        **FEW,
    )["metrics"]
    assert broken["forget_quality"]["value"] is None
    assert "not finite" in broken["forget_quality"]["reason"]
    assert broken["model_utility"]["value"] is None
    assert "retain_probability" in broken["model_utility"]["reason"]
    assert broken["mia_loss"]["value"] is None and "not finite" in broken["mia_loss"]["reason"]
    assert broken["forget_probability"]["dropped"] == 6


def test_references_without_latin_words_are_not_scored_as_forgotten(model, tokenizer):
    rows = Dataset.from_dict({"question": ["1?", "2?"], "answer": ["她出生在卡拉奇", "born"]})
    plain = evaluate_unlearning(model, tokenizer, {"forget": rows}, **FEW)
    assert [r["rougeL_recall"] is None for r in plain["items"]["forget"]] == [True, False]
    assert plain["metrics"]["forget_rouge"]["dropped"] == 1
    other = evaluate_unlearning(
        model, tokenizer, {"forget": rows}, rouge_tokenize=unicode_words, **FEW
    )
    assert other["metrics"]["forget_rouge"]["dropped"] == 0


def score_of(labels, predictions) -> AnswerScore:
    zeros = np.zeros(len(labels))
    return AnswerScore(np.array(labels), zeros, np.array(predictions), zeros, zeros)


def test_definitions_of_open_unlearning():
    # The last token of each is dropped, whatever it is
    for labels, predictions, memorised, strength in (
        ([3, 4, 1, 2, 9], [3, 0, 1, 2, 9], 0.75, 0.5),
        ([2, 3, 9], [2, 3, 0], 1, 1),
        ([4, 4, 3, 9], [1, 1, 1, 9], 0, 1 / 3),
        ([9], [9], None, 0),
    ):
        score = score_of(labels, predictions)
        assert open_unlearning_exact_memorization(score) == memorised
        assert open_unlearning_extraction_strength(score) == pytest.approx(strength)
    wrong = [[1, 2, 3], [1.5, 1, 2], [1, 1, 1]]
    ratios = open_unlearning_truth_ratios([0.5, 2, 1], wrong)
    assert ratios == pytest.approx([0.223130, 1.648721, 1.0], abs=1e-6)
    for definition, value in (("closer_to_1_better", 0.609887), ("true_better", 0.258957)):
        assert open_unlearning_truth_value(ratios, definition) == pytest.approx(value, abs=1e-6)
    for pair, value in (((0.9, 0.5), -80), ((0.5, 0.45), -9.090909), ((0.98, 1.0), 2e8 * 100)):
        assert open_unlearning_privleak(*pair) == pytest.approx(value, rel=1e-6)
    record = {"nll": 0.5, "wrong_nlls": [1, 2, 3]}
    assert open_unlearning._among_options(record) == pytest.approx(0.523082, abs=1e-6)


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
    args = UnlearningArguments(
        [checkpoint], "builtin:authors", probes=["int8"], output_dir=str(tmp_path / "one"), **given
    )
    main(args)
    command = [sys.executable, "-m", "llmmix.cli", "eval", "--num_processes", "2", "unlearning"]
    command += ["--model_name_or_path", checkpoint, "--forget", "builtin:authors"]
    command += ["--probes", "int8", "--output_dir", str(tmp_path / "two")]
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LLMMIX_CACHE": str(tmp_path / "other")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Results:") == 1
    one, two = (
        json.loads(next((tmp_path / name).glob("*/unlearning.json")).read_text())
        for name in ("one", "two")
    )
    assert one == two
