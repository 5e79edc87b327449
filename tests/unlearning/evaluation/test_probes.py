import pytest
from datasets import Dataset

from llmmix.unlearning.evaluation.document import as_rows
from llmmix.unlearning.evaluation.probes import paraphrased, relearning_parts


@pytest.fixture
def rows():
    return Dataset.from_dict(
        {
            "prompt": ["1+1=", "2+2=", "3+3=", "4+4="],
            "answer": ["2", "4", "6", "8"],
            "paraphrased_question": ["one and one?", "two and two?", "3 and 3?", "4 and 4?"],
        }
    )


def test_parts_are_disjoint_and_fixed():
    learned, measured = relearning_parts(10, 0.3, seed=4)
    assert len(learned) == 3 and sorted(learned + measured) == list(range(10))
    assert (learned, measured) == relearning_parts(10, 0.3, seed=4)
    assert learned != relearning_parts(10, 0.3, seed=5)[0]
    for count, share in ((1, 0.5), (10, 0.0), (10, 1.0)):
        with pytest.raises(ValueError, match="each needs one"):
            relearning_parts(count, share)


def test_paraphrases_are_asked_instead(tokenizer, rows):
    asked = paraphrased(rows, tokenizer)
    assert asked["prompt"][1] == [{"role": "user", "content": "two and two?"}]
    assert asked["answer"][:] == rows["answer"][:]
    assert as_rows(asked, "forget", tokenizer)["prompt"][:] == asked["prompt"][:]
    partly = rows.remove_columns("paraphrased_question").add_column(
        "paraphrased_question", ["a", "", None, "b"]
    )
    for wrong, missing in ((partly, 2), (rows.select_columns(["prompt", "answer"]), 4)):
        with pytest.raises(ValueError, match=f"in every row; {missing} of 4 have none"):
            paraphrased(wrong, tokenizer)
