import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from llmmix.grading.ground_truth import reference_answers, reference_loss


def test_answers_are_text_or_numbers():
    rows = Dataset.from_dict({"answer": [3.0, 2.5, float("nan")]})
    assert reference_answers(rows.take(2)) == ["3", "2.5"]
    with pytest.raises(ValueError, match="Row 2 has no `answer`"):
        reference_answers(rows)
    assert reference_answers(Dataset.from_dict({"answer": [7]})) == ["7"]
    with pytest.raises(ValueError, match="Row 0 has an `answer` of type list"):
        reference_answers(Dataset.from_dict({"answer": [["3"]]}))


def test_reference_loss_is_the_mean_token_loss(model, checkpoint, math_rows):
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = math_rows.select(range(8))
    args = SFTConfig("out", bf16=False, use_cpu=True, disable_tqdm=True)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    expected = trainer.evaluate(rows)["eval_loss"]
    assert reference_loss(model, tokenizer, rows, batch_size=3) == pytest.approx(expected, rel=1e-5)
