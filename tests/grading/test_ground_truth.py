import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from llmmix.grading.ground_truth import reference_answers, reference_loss
from llmmix.rows.turn_ends import score_what_is_sampled


def test_answers_are_text_or_numbers():
    rows = Dataset.from_dict({"answer": [3.0, 2.5, float("nan")]})
    assert reference_answers(rows.take(2)) == ["3", "2.5"]
    with pytest.raises(ValueError, match="Row 2 has no `answer`"):
        reference_answers(rows)
    assert reference_answers(Dataset.from_dict({"answer": [7]})) == ["7"]
    assert reference_answers(Dataset.from_dict({"answer": [["3"]]})) == ["3"]
    with pytest.raises(ValueError, match="Row 1 has 2 answers in `answer`"):
        reference_answers(Dataset.from_dict({"answer": [["3"], ["3", "4"]]}))
    with pytest.raises(ValueError, match="Row 0 has no `answer`"):
        reference_answers(Dataset.from_dict({"answer": [[], ["3"]]}))


def test_reference_loss_is_the_mean_token_loss(model, checkpoint, math_rows):
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = math_rows.select(range(8))
    args = SFTConfig("out", bf16=False, use_cpu=True, disable_tqdm=True)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    score_what_is_sampled(trainer)  # no newline behind the last turn
    expected = trainer.evaluate(rows)["eval_loss"]
    assert reference_loss(model, tokenizer, rows, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_reference_completions_that_cannot_be_scored_are_left_out_and_counted(
    model, checkpoint, caplog
):
    """Not an end of the evaluation: they are optional."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    context = model.config.max_position_embeddings
    rows = Dataset.from_dict(
        {"prompt": ["2+2=", "a", "a"], "completion": ["4", "b " * 2 * context, None]}
    )
    alone = reference_loss(model, tokenizer, rows.take(1))
    with caplog.at_level(logging.WARNING):
        assert reference_loss(model, tokenizer, rows) == pytest.approx(alone)
    assert "2 of 3 reference completions are not scored: 1 are empty, and 1 exceed" in caplog.text
    assert reference_loss(model, tokenizer, rows.select([2])) is None
    mixed = Dataset.from_dict(
        {"prompt": ["a"], "completion": [[{"role": "assistant", "content": "b"}]]}
    )
    with pytest.raises(ValueError, match="`completion` of row 0: The prompt is text"):
        reference_loss(model, tokenizer, mixed)
