import json
import math

import numpy as np
import pytest
from datasets import Dataset
from llmmix.eval.pass_at_n import (
    PassAtNArguments,
    _run_names,
    evaluate,
    main,
    pass_at_n,
    reference_loss,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

VECTORS = [
    (20, 3, 5, 0.6008771929824561),
    (1024, 1, 256, 0.25),
    (1024, 16, 64, 0.6467259827267744),
    (4096, 1, 4096, 1.0),
    (64, 0, 16, 0.0),
    (10, 10, 3, 1.0),
    (4096, 7, 256, 0.36371698275212794),
    (1024, 40, 64, 0.9281886834862474),
]


@pytest.mark.parametrize(("samples", "correct", "n", "expected"), VECTORS)
def test_vectors(samples, correct, n, expected):
    got = pass_at_n(samples, correct, n)
    assert isinstance(got, float) and got == pytest.approx(expected, rel=1e-12)


def test_arrays_and_a_million_samples():
    samples, correct, n, expected = map(np.array, zip(*VECTORS, strict=True))
    np.testing.assert_allclose(pass_at_n(samples, correct, n), expected, rtol=1e-12)
    assert pass_at_n(64, [0, 1, 64], 1) == pytest.approx([0, 1 / 64, 1])
    m, c, n = 10**6, 1234, 5000
    log_ratio = math.fsum(math.log1p(-n / i) for i in range(m - c + 1, m + 1))
    assert pass_at_n(m, c, n) == pytest.approx(-math.expm1(log_ratio), rel=1e-12)


def test_unbiased_by_enumeration():
    """Over all subsets of N of the samples, the share that holds a right one."""
    from itertools import combinations

    for c in range(7):
        right = [1] * c + [0] * (6 - c)
        for n in range(1, 7):
            truth = np.mean([any(drawn) for drawn in combinations(right, n)])
            assert pass_at_n(6, c, n) == pytest.approx(truth)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((10, 1, 11), "`n` must lie between 1 and the 10 samples"),
        ((10, 1, 0), "`n` must lie"),
        ((10, 11, 1), "`n_correct` must lie"),
        ((10, -1, 1), "`n_correct` must lie"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        pass_at_n(*given)


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
        *loaded, rows, num_samples=4, n=[1, 2, 4], verify=verify, max_new_tokens=4, seed=1
    )
    assert result["n_correct"] == [2, 2, 2] and seen == [
        a for a in rows["answer"] for _ in range(4)
    ]
    assert result["pass_at_n"] == pytest.approx({"1": 0.5, "2": 5 / 6, "4": 1.0})
    assert result["estimator"] == "unbiased"
    with pytest.raises(ValueError, match="`n` must lie between 1 and the 4 samples"):
        evaluate(*loaded, rows, num_samples=4, n=[8])
    blank = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", None]})
    with pytest.raises(ValueError, match="Row 1 has no `answer`"):
        evaluate(*loaded, blank, num_samples=4, n=[1])


def test_reference_loss_is_the_mean_token_loss(loaded, math_rows):
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = loaded
    rows = math_rows.select(range(8))
    args = SFTConfig("out", bf16=False, use_cpu=True, disable_tqdm=True)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    expected = trainer.evaluate(rows)["eval_loss"]
    assert reference_loss(model, tokenizer, rows, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_models_of_one_name_do_not_share_a_folder():
    names = _run_names(PassAtNArguments(["a/checkpoint-1", "b/checkpoint-1", "./c"]))
    assert names == ["a-checkpoint-1", "b-checkpoint-1", "c"]
    assert _run_names(PassAtNArguments(["a/x", "builtin:tiny"])) == ["x", "builtin-tiny"]
    with pytest.raises(ValueError, match="names a model twice"):
        _run_names(PassAtNArguments(["a/x", "a/x"]))


def test_program_writes_a_document_a_model_and_a_report(checkpoint, tmp_path, capsys):
    args = PassAtNArguments(
        [checkpoint],
        dataset_config="1",
        max_problems=2,
        num_samples=4,
        n=[1, 4],
        max_new_tokens=4,
        output_dir=str(tmp_path),
    )
    main(args)
    document = json.loads(next(tmp_path.glob("*/pass_at_n.json")).read_text())
    assert document["eval"] == "pass_at_n" and len(document["n_correct"]) == 2
    assert "data:image/png;base64" in (tmp_path / "report.html").read_text()
    assert "pass@4" in capsys.readouterr().out
