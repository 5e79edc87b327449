"""Each method does what its page says of it, on a random model that learns a few rows by heart."""

import pytest
import torch
from datasets import Dataset

from llmmix import DCOConfig, DCOTrainer, RPOConfig, RPOTrainer, SFTMixConfig, SFTMixTrainer
from llmmix.training.unmoved import UnmovedCallback

FAST = {"lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "use_cpu": True}
FAST |= {"bf16": False, "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 1.0}
SUMS = [(a, b) for a in range(2, 6) for b in (2, 3)]


@pytest.fixture(scope="module")
def rows():
    """Eight sums, each with its answer."""
    answers = [f"{a}+{b}={a + b}" for a, b in SUMS]
    prompts = [f"What is {a}+{b}? " for a, b in SUMS]
    return Dataset.from_dict({"prompt": prompts, "completion": answers})


def trained(trainer):
    """What a trainer logged in its run, by name."""
    assert any(isinstance(c, UnmovedCallback) for c in trainer.callback_handler.callbacks)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in logs] for name in logs[0]}


@pytest.fixture(scope="module")
def taught(checkpoint, rows, tmp_path_factory):
    """By N, the folder of a model that DCO has taught the sums, and p of each answer."""
    found = {}
    for n in (1, 64):
        folder = str(tmp_path_factory.mktemp("taught"))
        args = DCOConfig(folder, n_samples=n, learning_rate=5e-3, max_steps=80, **FAST)
        trainer = DCOTrainer(checkpoint, args=args, train_dataset=rows)
        trained(trainer)
        trainer.save_model()
        (batch,) = trainer.get_eval_dataloader(trainer.train_dataset)
        with torch.no_grad():
            output = trainer.model.eval()(**batch, fused_lm_head=True)
        found[n] = folder, output.log_probs.sum(1).exp()
    return found


def test_dco_stops_where_n_draws_cover_and_cross_entropy_goes_on_to_1(taught):
    (_, sure), (_, covered) = taught[1], taught[64]
    assert sure.median() > 0.97
    assert 0.05 < covered.median() < 0.5
    assert (1 - (1 - covered) ** 64).min() > 0.99  # one of 64 draws is right


def test_sftmix_lowers_its_mixup_loss(checkpoint, rows, tmp_path):
    confident = rows.add_column("confidence", [-1.0, -2.0] * 4)
    args = SFTMixConfig(str(tmp_path), learning_rate=2e-3, max_steps=30, **FAST)
    losses = trained(SFTMixTrainer(checkpoint, args=args, train_dataset=confident))
    first, last = (
        sum(losses["sftmix/mixup_loss"][part]) / 5 for part in (slice(5), slice(-5, None))
    )
    assert last < first / 2


def test_rpo_holds_the_chosen_answers_that_dpo_lets_fall(taught, rows, tmp_path):
    """From one model, to margins alike."""
    wrong = [f"{a}+{b}={a + b + 1}" for a, b in SUMS]
    pairs = rows.rename_column("completion", "chosen").add_column("rejected", wrong)
    logs = {}
    for eta in (0.0, 0.05):
        args = RPOConfig(
            str(tmp_path), beta=0.1, rpo_eta=eta, learning_rate=1e-3, max_steps=40, **FAST
        )
        logs[eta] = trained(RPOTrainer(taught[64][0], args=args, train_dataset=pairs))
    dpo, rpo = logs[0.0], logs[0.05]
    assert min(dpo["rewards/margins"][-1], rpo["rewards/margins"][-1]) > 1.5
    assert dpo["logps/chosen"][-1] < dpo["logps/chosen"][0] - 2
    assert rpo["logps/chosen"][-1] > rpo["logps/chosen"][0]
