"""Runs of the unlearning trainers on a small model, which the tests of this folder compare."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from llmmix import FLATConfig, FLATTrainer, UnlearnConfig, UnlearnTrainer
from llmmix.unlearning.loss_table import LOSSES

SETTINGS = {
    "max_steps": 4,
    # Plain gradient descent, so that a loss off by a factor cannot hide; the norm is only logged
    "optim": "sgd",
    "learning_rate": 1e-3,
    "max_grad_norm": 1e9,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
FORGET = Dataset.from_dict(
    {
        "question": [f"What is {n}+{n + 2}?" for n in range(10)],
        "answer": ["=".join(["6"] * (1 + n % 4)) + str(n) for n in range(10)],
    }
)
RETAIN = Dataset.from_dict(
    {
        "question": [f"What is {n}*2?" for n in range(7)],
        "answer": [str(2 * n + 3) * (n + 1) for n in range(7)],
    }
)
WEIGHED = (  # to forget and to retain
    FORGET.add_column("weight", [1.0, 2.5, 0.5, 4.0, None, 1.0, 0.25, 1.0, 3.0, 1.0]),
    RETAIN.add_column("weight", [1.0, 2.0, 0.5, 3.0, 1.0, 4.0, 0.25]),
)
PDU = {"epsilon": 1.0, "dual_step": 0.1, "dual_warmup_epochs": 0.0}
METHODS = {name: {"loss": name} for name in LOSSES}
METHODS["pdu"] |= PDU
# settings under which a random model, sure of nothing, has a forget term that is felt
METHODS["simnpo"] |= {"beta": 0.5, "forget_weight": 1.0}
METHODS["satimp"] |= {"beta": 0.2}
METHODS["flat"] = {"learning_rate": 0.3}
METHODS |= {
    "flat-retain": {"retain_weight": 0.5, "divergence": "kl", "mean": "geometric"},
    "npo-kl": {"loss": "npo", "retain_loss": "kl"},
    "undial-retain": {"loss": "undial", "retain_weight": 0.5},
}
# One for each path through the code: another trainer; a mean over tokens with a cap; templates, the
# reference's log-probabilities and a mean over rows; logits of the reference on retained rows, and
# on rows to forget; hidden states; the multiplier; no answer to forget
PATHS = ("flat", "grad_diff", "dpo", "npo-kl", "undial", "rmu", "pdu", "idk")
ON_GPU = 1e-4  # CUDA adds in any order: no two runs there are the same to the last digit


def by_path(names=METHODS):
    """Methods to run a test over: one for each path, the others where slow tests run."""
    slow = pytest.mark.slow
    return [name if name.split()[0] in PATHS else pytest.param(name, marks=slow) for name in names]


def lora(*modules):
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=list(modules or ("q_proj", "v_proj"))
    )


def prepare(name, folder, checkpoint, rows=FORGET, retain=RETAIN, peft=None, **given):
    """The trainer of a method, with rows to retain where it needs them."""
    options = {key: given.pop(key) for key in ("templates", "processing_class") if key in given}
    options |= {key: given.pop(key) for key in ("eval_dataset",) if key in given}
    given = {**SETTINGS, **METHODS[name], **given}
    if name.startswith("flat"):
        trainer_type, args = FLATTrainer, FLATConfig(str(folder), **given)
        needs = args.retain_weight > 0
    else:
        trainer_type, args = UnlearnTrainer, UnlearnConfig(str(folder), **given)
        needs = args.retain_weight > 0 or LOSSES[args.loss].retain_required
    return trainer_type(
        checkpoint,
        args,
        train_dataset=rows,
        retain_dataset=retain if needs else None,
        peft_config=peft,
        **options,
    )


def weights_of(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()]).cpu()


def finish(trainer, **options):
    """Loss and norm of the gradient of each step, and the weights at the end."""
    trainer.train(**options)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = torch.tensor([[step["loss"], step["grad_norm"]] for step in steps])
    return found, weights_of(trainer)


def assert_same(a, b, tolerance=2e-5):
    (steps_a, weights_a), (steps_b, weights_b) = a, b
    tolerance = max(tolerance, ON_GPU) if torch.cuda.is_available() else tolerance
    assert len(steps_a) == len(steps_b) > 0 and steps_a.isfinite().all()
    torch.testing.assert_close(steps_a, steps_b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights_a, weights_b, rtol=tolerance, atol=tolerance)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def naive(model, encoded):
    """Logits (n, V) at the scored positions of one sequence without padding, and its answer."""
    ids, start = encoded
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.device)).logits[0].double().cpu()
    return logits[start - 1 : -1], torch.tensor(ids[start:])


def logps_of(model, encoded):
    logits, labels = naive(model, encoded)
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
