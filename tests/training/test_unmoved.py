"""A run whose loss stays within its noise says so; one that learns, or is short, does not."""

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from llmmix.training.unmoved import UnmovedCallback, has_moved

NOISE = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()


def run(length, fall, noise=0.1, start=0):
    """Losses that fall by as much over the whole run."""
    drawn = NOISE[start : start + length]
    return [8 - fall * step / length + noise * drawn[step] for step in range(length)]


@pytest.mark.parametrize("length", [20, 60, 200])
def test_noise_alone_is_no_movement(length):
    moved = [has_moved(run(length, 0.0, start=start)) for start in range(0, 200, 20)]
    assert sum(moved) <= 2  # one in twenty, by chance
    assert has_moved(run(length, 0.5)) and has_moved(run(length, -0.5))


def test_a_slow_and_steady_fall_is_a_movement_and_a_short_run_is_not_judged():
    assert has_moved([8 - 0.001 * step for step in range(60)])
    assert not has_moved([8.0] * 20) and has_moved([8.0] * 19)


def test_the_trainer_that_did_not_move_names_the_rate(caplog, tmp_path):
    def end(losses):
        history = [{"loss": loss, "step": step} for step, loss in enumerate(losses)]
        state = TrainerState(log_history=[*history, {"train_loss": 0.0}])
        args = TrainingArguments(str(tmp_path), learning_rate=2e-6, use_cpu=True)
        UnmovedCallback().on_train_end(args, state, TrainerControl())
        return [record.getMessage() for record in caplog.records]

    assert end(run(60, 4.0)) == []
    (said,) = end([8.0, 8.5] * 30)
    assert said.startswith("The loss did not move: 8.25 in the first 6 logs, 8.25 in the last 6")
    assert "`learning_rate` (2e-06)" in said


def test_another_metric_is_compared_where_the_loss_says_little(caplog, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    history = [{"loss": -1.0, "nll": value} for value in run(60, 4.0)]
    UnmovedCallback("nll").on_train_end(args, TrainerState(log_history=history), TrainerControl())
    assert not caplog.records
    history = [{"loss": value, "nll": 2.0} for value in run(60, 4.0)]
    UnmovedCallback("nll").on_train_end(args, TrainerState(log_history=history), TrainerControl())
    assert caplog.records[0].getMessage().startswith("`nll` did not move: 2 in the first 6 logs")
