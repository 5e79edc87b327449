import numpy as np
import pytest

from llmmix.timing.padding import METHODS, padding_cases, read_of, sequence_lengths, typical_batch


def test_a_pair_is_two_sequences_and_each_is_read_as_long_as_the_longest():
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}
    assert sequence_lengths({"input_ids": [1, 2, 3]}) == [3]
    assert sequence_lengths(row) == [5, 3]
    assert read_of([[5, 3], [2, 2]]) == (12, 20)


def test_the_batch_is_padded_as_an_epoch_is_and_short():
    """Batches of 2: a short and a long one are padded alike, others more or less."""
    lengths = [[length] for length in np.random.default_rng(1).integers(1, 200, size=80)]
    chosen, overall = typical_batch(lengths, 2)
    tokens, read = read_of([lengths[row] for row in chosen])
    assert 0.2 < overall < 0.5  # a third of it, were the lengths continuous
    assert 1 - tokens / read == pytest.approx(overall, abs=0.06)
    assert read < np.mean(lengths) * 4
    alone, padding = typical_batch(lengths, 1)
    assert padding == 0 and len(alone) == 1


@pytest.mark.parametrize("name", METHODS)
def test_both_train_on_one_batch_and_have_one_loss(name, checkpoint, monkeypatch):
    from transformers import Trainer

    step, seen = Trainer.training_step, []

    def noted(self, model, inputs, *given):
        batch = {key: value.clone() for key, value in inputs.items()}
        seen.append((batch["input_ids"], step(self, model, inputs, *given).item()))

    monkeypatch.setattr(Trainer, "training_step", noted)
    monkeypatch.setattr("llmmix.timing.padding.ROWS", 16)
    ((free, padded),) = padding_cases(
        models=[checkpoint],
        methods=[name],
        device="cpu",
        batch_sizes=[4],
        dataset="builtin:math",
        preferences="builtin:preferences",
    )
    figures = [case.built()() for case in (free, padded)]
    (_, first), (batch, loss), (_, first_padded), (same, padded_loss) = seen
    assert batch.tolist() == same.tolist() and figures[0] == figures[1]
    assert figures[0]["read"] == batch.numel() > figures[0]["tokens"]
    assert loss == pytest.approx(padded_loss, rel=1e-4)
    assert first == pytest.approx(first_padded, rel=1e-4)
