import numpy as np
import pytest

from llmmix.unlearning.evaluation.open_unlearning import (
    open_unlearning_exact_memorization,
    open_unlearning_extraction_strength,
    open_unlearning_option_probability,
    open_unlearning_privleak,
    open_unlearning_truth_ratios,
    open_unlearning_truth_value,
)
from llmmix.unlearning.evaluation.scores import AnswerScore


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
    chance = open_unlearning_option_probability(0.5, [1, 2, 3])
    assert chance == pytest.approx(0.523082, abs=1e-6)
