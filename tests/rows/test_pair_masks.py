"""Messages of weight 0 in the answers of preferences, from rows to the loss."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from llmmix import RPOConfig, RPOTrainer

ASKED = [{"role": "user", "content": "2+2?", "weight": None}]
SETTINGS = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "rpo_eta": 0.5,
    "beta": 0.5,
}


def answer(text, *weights):
    """Two answers with a question between them."""
    contents = ["I add.", "Add what?", text]
    roles = ["assistant", "user", "assistant"]
    return [
        {"role": role, "content": content, "weight": weight}
        for role, content, weight in zip(roles, contents, weights, strict=True)
    ]


def pairs(*weights):
    rows = [
        {"prompt": ASKED, "chosen": answer(str(n), *weights), "rejected": answer("no", *weights)}
        for n in range(3)
    ]
    whole = (None, None, None)
    rows.append({"prompt": ASKED, "chosen": answer("4", *whole), "rejected": answer("5", *whole)})
    return Dataset.from_list(rows)


@pytest.fixture
def train(checkpoint, tmp_path):
    """The trainer of one step, and what it logged, training and evaluating the same rows."""

    def train(rows, reference=None, **given):
        args = RPOConfig(str(tmp_path), **SETTINGS, eval_strategy="steps", eval_steps=1, **given)
        trainer = RPOTrainer(
            checkpoint, reference, args=args, train_dataset=rows, eval_dataset=rows
        )
        trainer.train()
        return trainer, trainer.state.log_history

    return train


def scored(trainer, row, side):
    """Text of the tokens of a row that are scored, of `chosen` (0) or `rejected` (1)."""
    batch = trainer.data_collator([trainer.train_dataset[row], trainer.train_dataset[3]])
    place = 2 * side
    ids = batch["input_ids"][place][batch["completion_mask"][place].bool()]
    return trainer.processing_class.decode(ids)


def test_the_other_messages_alone_are_scored(train):
    trainer, _ = train(pairs(1, 0, 1))
    text = scored(trainer, 1, 0)
    assert "I add." in text and "1" in text and "Add what?" not in text
    assert "no" in scored(trainer, 1, 1) and "Add what?" not in scored(trainer, 1, 1)
    rest = trainer.data_collator([trainer.train_dataset[3]])
    assert "Add what?" in trainer.processing_class.decode(
        rest["input_ids"][0][rest["completion_mask"][0].bool()]
    )
    for mode in ("keep_start", "keep_end"):  # cut as the tokens are
        cut, _ = train(pairs(0, 1, 1), max_length=24, truncation_mode=mode)
        batch = cut.data_collator([cut.train_dataset[0]])
        ids, mask = batch["input_ids"][0], batch["completion_mask"][0].bool()
        assert batch["input_ids"].size(1) == 24
        assert "I add." not in cut.processing_class.decode(ids[mask]) and mask.any()


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
def test_the_loss_is_of_what_is_left(train, checkpoint, precompute):
    """Under the model and the reference."""
    reference = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer, log = train(pairs(0, 0, 1), reference, precompute_ref_log_probs=precompute)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels, mask = batch["input_ids"][:, 1:, None], batch["completion_mask"][:, 1:]
    with torch.no_grad():
        logps = [
            (model(**given).logits[:, :-1].log_softmax(-1).gather(-1, labels)[..., 0] * mask)
            for model in (trainer.model.eval(), reference)
        ]
    chosen, rejected = (logps[0] - logps[1]).sum(1).mul(0.5).chunk(2)
    for prefix, entry in (("", log[0]), ("eval_", log[1])):
        assert entry[f"{prefix}rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
        assert entry[f"{prefix}rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4)
        tokens = int(mask[:4].sum())
        expected = -logps[0][:4].sum().item() / tokens
        assert entry[f"{prefix}nll_per_token"] == pytest.approx(expected, rel=1e-4)


def test_rows_given_to_evaluate_are_masked_beside_weights(train):
    """And a second time: the collator is wrapped once."""
    masked, log = train(pairs(0, 0, 1))
    plain, whole = train(pairs(1, 1, None))
    assert abs(log[1]["eval_loss"] - whole[1]["eval_loss"]) > 1e-3
    rows = pairs(0, 0, 1).add_column("weight", [1.0] * 4)
    for _ in range(2):
        found = plain.evaluate(rows)
        assert found["eval_loss"] == pytest.approx(log[1]["eval_loss"], rel=1e-5)
        assert found["eval_weight/mean"] == 1
        assert not hasattr(plain.data_collator.collate.collate, "collate")
