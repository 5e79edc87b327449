from types import SimpleNamespace

import pytest
from llmmix.recipes import sftmix
from transformers import PrinterCallback, ProgressCallback

from llmmix.training.lines import LogLines, log_line, log_lines

LOGS = {
    "grad_norm": 30.12345,
    "learning_rate": 2e-4,
    "dco/weight": -0.0,
    "nll_per_token": 2.25,
    "loss": 9.06789,
    "num_tokens": 1234,
    "epoch": 0.5,
}


@pytest.fixture
def state():
    return SimpleNamespace(global_step=5, max_steps=300, epoch=0.5)


def test_losses_come_first_and_metrics_of_the_method_before_those_of_all(state):
    line = log_line(state, LOGS)
    assert (
        line.split()
        == (
            "step 5 epoch 0.50 loss 9.068 nll_per_token 2.25 dco/weight 0 grad_norm 30.12 "
            "learning_rate 0.0002 num_tokens 1234"
        ).split()
    )
    later = log_line(SimpleNamespace(global_step=10, max_steps=300, epoch=1.0), LOGS)
    assert later.index("nll_per_token") == line.index("nll_per_token")  # aligned


def test_a_terminal_gets_whole_metrics_alone(state):
    whole = log_line(state, LOGS)
    for width in range(20, len(whole)):
        line = log_line(state, LOGS, width)
        assert len(line) <= width and whole.startswith(line)
        assert len(line.split()) % 2 == 0  # every name has its number


def test_the_end_of_a_run(state):
    logs = {"train_runtime": 12.3, "train_loss": 1.23456, "train_steps_per_second": 1.0}
    assert log_line(state, logs) == "Trained for 5 steps in 12 s, mean loss 1.235."


@pytest.mark.parametrize("printing", [ProgressCallback, PrinterCallback, None])
def test_what_prints_dictionaries_is_replaced_and_nothing_added(printing):
    class Trainer:
        added: list = []

        def pop_callback(self, kind):
            return kind() if kind is printing else None

        def add_callback(self, callback):
            self.added = [callback]

    trainer = Trainer()
    log_lines(trainer)
    assert [type(one) for one in trainer.added] == [LogLines] * (printing is not None)


def test_sftmix_says_what_it_is_doing(tmp_path, capsys, checkpoint, monkeypatch):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    lines = (f'{{"prompt": "{n}+1=", "completion": "{n + 1}"}}\n' for n in range(8))
    rows.write_text("".join(lines))
    flags = f"--model_name_or_path {checkpoint} --dataset_name {rows} --max_steps 2"
    flags += f" --output_dir {tmp_path / 'run'} --logging_steps 1 --per_device_train_batch_size 4"
    monkeypatch.setattr("sys.argv", ["sftmix", *flags.split()])
    run = sftmix.parse_args(
        (
            sftmix.DataArguments,
            sftmix.SFTMixConfig,
            sftmix.ModelConfig,
            sftmix.ReferenceArguments,
        ),
        sftmix.__file__,
    )
    sftmix.main(*run)
    told = capsys.readouterr().out.splitlines()
    stages = [line for line in told if line.startswith("Stage")]
    assert stages == [
        "Stage 1 of 3: training the reference, plain SFT on 8 rows",
        "Stage 1 of 3: scoring 8 rows under 2 checkpoints",
        "Stages 2 and 3 of 3: training with mixup between the confident half and the other",
    ]
    logged = [line for line in told if line.startswith("step ")]
    assert len(logged) == 4 and all("loss" in line for line in logged)
    assert not any(line.startswith("{") for line in told)
