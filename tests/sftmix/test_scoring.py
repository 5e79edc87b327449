import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM

from llmmix.sftmix import scoring as confidence
from llmmix.sftmix.scoring import add_confidence, mean_nlls


def test_scores_are_the_mean_token_loss_of_the_response(checkpoint, rows, tokenizer, args):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    weighted = rows.add_column("weight", [0.5 + row for row in range(len(rows))])
    got = mean_nlls(weighted, args, checkpoint)  # weights are of the loss, not of what is measured
    for row, nll in zip(rows.select(range(6)), got, strict=False):
        chat = row["prompt"] + row["completion"]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        assert nll == pytest.approx(F.cross_entropy(logits, ids[0, len(prompt) :]).item(), rel=1e-5)


def test_scores_are_cached_by_content(checkpoint, rows, args, tmp_path, monkeypatch):
    first = mean_nlls(rows, args, checkpoint)
    calls = []
    score = confidence._score
    monkeypatch.setattr(confidence, "_score", lambda t: calls.append(1) or score(t))
    shutil.copytree(checkpoint, tmp_path / "copy")  # another name for the same weights
    np.testing.assert_array_equal(mean_nlls(rows, args, str(tmp_path / "copy")), first)
    assert not calls
    mean_nlls(rows.select(range(5)), args, checkpoint)
    assert len(calls) == 1


def test_confidence_column(checkpoint, rows, args, caplog):
    scored = add_confidence(rows, args, checkpoints=[checkpoint, checkpoint])
    expected = -np.exp(mean_nlls(rows, args, checkpoint))
    np.testing.assert_allclose(scored["confidence"][:], expected)
    assert scored.remove_columns("confidence")[:] == rows[:]
    # rows that nothing can score leave, counted, and the others keep their scores
    args.max_length = 29
    short = add_confidence(rows, args, checkpoints=[checkpoint])
    assert 0 < len(short) < len(rows)
    assert f"Dropped {len(rows) - len(short)} of {len(rows)} rows that have no" in caplog.text


def test_confidence_without_padding_is_that_with_it(
    checkpoint, rows, args, tmp_path, monkeypatch, batches_read
):
    """The reference is trained, and rows are scored, on their tokens alone."""
    uneven = rows.map(
        lambda row, i: {"completion": row["completion"] * (1 + i % 4)}, with_indices=True
    )
    found, read = [], []
    for padding_free in (False, True):
        monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / f"cache-{padding_free}"))
        args.output_dir, args.padding_free = str(tmp_path / f"run-{padding_free}"), padding_free
        found.append(add_confidence(uneven, args, model=checkpoint)["confidence"][:])
        read.append({batch[0] for batch in batches_read})
        batches_read.clear()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert max(read[0]) > 1 and read[1] == {1}
    assert len({path.name for path in tmp_path.glob("run-*/reference-*")}) == 1  # one name for both


def test_another_models_checkpoint_scores_with_its_own_tokenizer(checkpoint, rows, args):
    plain = Dataset.from_list(
        [{"prompt": r["prompt"][0]["content"], "completion": r["answer"]} for r in rows]
    )
    scored = add_confidence(plain, args, checkpoints=[checkpoint])
    assert len(scored) == len(rows) and np.isfinite(scored["confidence"][:]).all()


def test_options_that_reorder_or_drop_rows_do_not_move_scores(checkpoint, rows, args):
    expected = mean_nlls(rows, args, checkpoint)
    shutil.rmtree(Path(args.output_dir).parent / "cache")
    args.train_sampling_strategy, args.dataloader_drop_last = "group_by_length", True
    args.eval_on_start = True
    np.testing.assert_array_equal(mean_nlls(rows, args, checkpoint), expected)


def test_a_diverged_checkpoint_is_named(checkpoint, rows, args, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.lm_head.weight.data.fill_(float("nan"))
    shutil.copytree(checkpoint, tmp_path / "diverged")
    model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(ValueError, match=r"loss of 24 rows \(first: row 0\) is not finite under"):
        add_confidence(rows, args, checkpoints=[str(tmp_path / "diverged")])


def test_a_changed_template_or_dtype_is_another_score(checkpoint, rows, args, tmp_path):
    before = mean_nlls(rows, args, checkpoint)
    shutil.copytree(checkpoint, tmp_path / "copy")
    template = tmp_path / "copy" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_end|>"))
    assert not np.array_equal(mean_nlls(rows, args, str(tmp_path / "copy")), before)


def test_bad_input(checkpoint, rows, args):
    with pytest.raises(ValueError, match="Give the `model`"):
        add_confidence(rows, args)
    with pytest.raises(ValueError, match="must be a map-style `Dataset`, got IterableDataset"):
        add_confidence(rows.to_iterable_dataset(), args, checkpoints=[checkpoint])
    with pytest.raises(ValueError, match="at least two, got 1"):
        add_confidence(rows.select([0]), args, checkpoints=[checkpoint])
