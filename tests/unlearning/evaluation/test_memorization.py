import numpy as np
import pytest

from llmmix.unlearning.evaluation.memorization import exact_memorization, extraction_strength
from llmmix.unlearning.evaluation.vectors import mean_of

MEMORISED = [
    ([3, 4, 1, 2], [3, 0, 1, 2], 0.75, 0.5),
    ([2, 3], [2, 3], 1, 1),
    ([4, 4, 3], [1, 1, 1], 0, 0),
    ([4, 4, 3], [4, 4, 1], 2 / 3, 0),  # nothing at the end, whatever came before
    ([4, 4, 3], [1, 1, 3], 1 / 3, 1 / 3),
    ([7], [7], 1, 1),
    ([7], [8], 0, 0),
    ([], [], None, None),
]


@pytest.mark.parametrize(("labels", "predictions", "exact", "strength"), MEMORISED)
def test_memorisation_vectors(labels, predictions, exact, strength):
    for got, expected in [
        (exact_memorization(labels, predictions), exact),
        (extraction_strength(np.array(labels), np.array(predictions)), strength),
    ]:
        assert got is None if expected is None else got == pytest.approx(expected)


def test_means_of_the_memorisation_vectors():
    for function, column, mean in (
        (exact_memorization, 2, 0.583333),
        (extraction_strength, 3, 0.5),
    ):
        got = [function(row[0], row[1]) for row in MEMORISED[:3]]
        assert got == pytest.approx([row[column] for row in MEMORISED[:3]])
        assert mean_of([*got, function([], [])]) == (pytest.approx(mean, abs=5e-7), 1)


def test_only_a_true_end_of_sequence_is_dropped():
    labels, predictions = [5, 6, 2], [5, 0, 2]
    for eos, exact, strength in ((None, 2 / 3, 1 / 3), (2, 0.5, 0), (9, 2 / 3, 1 / 3)):
        assert exact_memorization(labels, predictions, eos_token_id=eos) == pytest.approx(exact)
        assert extraction_strength(labels, predictions, eos_token_id=eos) == pytest.approx(strength)
    assert exact_memorization(labels, predictions, eos_token_id=[9, 2]) == 0.5
    assert exact_memorization([0, 1], [3, 1], eos_token_id=0) == 0.5  # the first stays
    assert extraction_strength([0], [0], eos_token_id=0) is None
    assert exact_memorization([], [], eos_token_id=0) is None


@pytest.mark.parametrize("function", [exact_memorization, extraction_strength])
def test_memorisation_refusals(function):
    with pytest.raises(ValueError, match=r"one length, got shapes \(2,\) and \(1,\)"):
        function([1, 2], [1])
    with pytest.raises(ValueError, match="give one answer at a time"):
        function([[1, 2]], [[1, 2]])
    with pytest.raises(ValueError, match="the answer's ids alone, got -100"):
        function([-100, 2], [1, 2])
