"""What a controller is told, beside plain logits; and that telling it leaves no trace."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmmix import FLATConfig, FLATTrainer
from llmmix.mixing import MixtureCallback, MixtureSampler, attach_mixture, label_domains
from llmmix.mixing import targets as target_losses
from llmmix.mixing.signals import Signals
from tests.mixing.runs import (
    ONE_HOT,
    SETTINGS,
    WEIGHTS,
    Phases,
    finish,
    mixed,
    pad_left,
    sampler_of,
    targets,
    tiny_model,
    tokens_of,
)

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.2, init_lora_weights=False)


def nll(model, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, int]:
    """Of a row by itself, from plain logits, and its scored tokens."""
    training, model.training = model.training, False
    logits = type(model).forward(model, torch.tensor([ids])).logits[0]
    model.training = training
    total = cross_entropy(logits[:-1].float(), torch.tensor(labels[1:]), reduction="sum")
    return total, sum(label != -100 for label in labels[1:])


@torch.no_grad()
def by_hand(model, rows) -> float:
    """Mean over the tokens of all rows, not over rows."""
    model.eval()
    sums, counts = zip(*(nll(model, row["input_ids"], row["labels"]) for row in rows), strict=True)
    return float(sum(sums)) / sum(counts)


def uneven() -> dict[str, Dataset]:
    """Some rows far longer than others, some with few labels, one with none."""
    rows = targets()
    ids = [[*range(20, 60)], [5, 6], [7, 8, 9], [11, 12, 13, 14]]
    labels = [[*range(20, 60)], [5, 6], [-100] * 3, [-100, -100, 13, 14]]
    rows["b"] = Dataset.from_dict({"input_ids": ids, "labels": labels})
    return rows


@pytest.mark.parametrize("case", ["right", "left", "many forwards", "dropout", "lora"])
def test_losses_are_means_over_tokens_by_hand(make, monkeypatch, case):
    options = {"eval_dataset": uneven()}
    if case == "left":
        options["data_collator"] = pad_left
    if case == "lora":
        options["peft_config"] = LORA
    if case == "many forwards":
        monkeypatch.setattr(target_losses, "BATCH_TOKENS", 10)
    trainer = make(trainer_options=options, dropout=0.3 if case == "dropout" else 0.0)
    found = Signals(trainer, trainer.eval_dataset)
    assert found.measure == "nll" and found.targets == ["a", "b", "c"]
    losses = found.take("losses", [], 3)["losses"]
    again = found.take("losses", [], 3)["losses"]
    assert losses.tolist() == again.tolist() and losses.dtype == np.float64
    model = trainer.model.get_base_model() if case == "lora" else trainer.model
    expected = [by_hand(model, rows) for rows in trainer.eval_dataset.values()]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert len(set(np.round(expected, 4))) == 3


def test_of_many_rows_some_are_measured_the_same_every_time(make):
    trainer = make()
    many = Dataset.from_dict(
        {k: [tokens_of(0, r % 30) for r in range(50)] for k in ("input_ids", "labels")}
    )
    found = Signals(trainer, {"a": many}, rows=5)
    first = found.take("losses", [], 3)["losses"]
    rows = many.select([0, 12, 24, 37, 49])
    assert first.tolist() == pytest.approx([by_hand(trainer.model, rows)], rel=1e-5)
    whole = Signals(trainer, {"a": many}, rows=None).take("losses", [], 3)["losses"]
    assert whole.tolist() == pytest.approx([by_hand(trainer.model, many)], rel=1e-5)


def step_rows(trainer, step: int, domain: int) -> list[dict]:
    rows = [tokens_of(d, r) for d, r in trainer.steps_read[step] if d == domain]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def test_the_signal_train_is_of_the_last_batch_before_its_update(make):
    """Over the micro-batches of the step, by domain; a domain that the batch lacks has none."""
    trainer = make(max_steps=1, per_device_train_batch_size=5)
    before = copy.deepcopy(trainer.model)
    controller = Phases(([0.5, 0.5, 0], 1, "train"))
    mixed(trainer, controller)
    trainer.train()
    found = controller.told[0]["signal"]["train"]
    expected = [by_hand(before, step_rows(trainer, 0, d)) for d in (0, 1)]
    after = [by_hand(trainer.model, step_rows(trainer, 0, d)) for d in (0, 1)]
    assert found[:2] == pytest.approx(expected, rel=1e-5) and np.isnan(found[2])
    assert abs(np.array(expected) - after).min() > 1e-3
    # in a longer segment, of its last step
    trainer = make("longer", max_steps=3, learning_rate=0.0)
    controller = Phases((ONE_HOT["b"], 3, "train"))
    mixed(trainer, controller)
    trainer.train()
    expected = by_hand(before, step_rows(trainer, 2, 1))
    assert controller.told[0]["signal"]["train"][1] == pytest.approx(expected, rel=1e-5)


def test_the_excess_is_over_a_reference_token_by_token(make):
    trainer = make(max_steps=1, per_device_train_batch_size=5)
    before, reference = copy.deepcopy(trainer.model), copy.deepcopy(trainer.model)
    with torch.no_grad():
        reference.lm_head.weight.add_(0.2 * torch.randn(reference.lm_head.weight.shape))
    controller = Phases(([0.5, 0.5, 0], 1, "excess"))
    sampler = sampler_of()
    callback = MixtureCallback(sampler, lambda *_: controller)
    attach_mixture(trainer, sampler, callback)
    callback.signals.reference = reference.eval()
    trainer.train()
    expected = []
    for domain in (0, 1):
        values = []
        for row in step_rows(trainer, 0, domain):
            ids = torch.tensor(row["input_ids"])
            with torch.no_grad():  # a copy's own forward would run the original
                a, b = (
                    -type(m).forward(m, ids[None]).logits[0, :-1].log_softmax(-1)
                    for m in (before.eval(), reference)
                )
            values.append((a - b).gather(1, ids[1:, None]).clamp(min=0))
        expected.append(torch.cat(values).mean().item())
    found = controller.told[0]["signal"]["excess"]
    assert found[:2] == pytest.approx(expected, rel=1e-4) and np.isnan(found[2])
    assert min(expected) > 0


def test_gradients_by_hand(make):
    trainer = make()
    # rows by domain, in place of those that the callback draws
    rows = {0: [0, 1, 2, 3], 1: [4], 2: [2, 3, 4]}

    def load(domain):
        ids = [tokens_of(domain, row) for row in rows[domain]]
        return [{"input_ids": row, "labels": row} for row in ids]

    found = Signals(trainer, {}).take("gradients", [], 3, load)
    assert all(p.grad is None for p in trainer.model.parameters())
    parameters = list(trainer.model.parameters())
    gradients = []
    for domain in range(3):
        sums, counts = zip(
            *(nll(trainer.model, r["input_ids"], r["labels"]) for r in load(domain)), strict=True
        )
        loss = sum(sums) / sum(counts)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    stacked = torch.stack(gradients).double()
    products = (stacked @ stacked.T).numpy()
    np.testing.assert_allclose(found["products"], products, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["norms"], stacked.norm(dim=1).numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", ["losses", "train", "gradients"])
@pytest.mark.parametrize("extra", ["full", "lora"])
def test_measuring_leaves_no_trace(make, name, extra):
    """Forward, modes of modules, random numbers, metrics and gradients are as they were."""
    options = {"peft_config": LORA} if extra == "lora" else {}
    given = {"max_steps": 2, "dropout": 0.3, "trainer_options": options}
    trainer, alone = make(**given), make("alone", **given)
    for each in (trainer, alone):
        mixed(each, Phases((WEIGHTS, 2, None)))
        torch.manual_seed(1)
        each.train()
    model = trainer.model
    base = model.get_base_model() if extra == "lora" else model
    layer = base.model.layers[0]
    for each in (trainer, alone):
        each.model.train()
    layer.mlp.eval()  # a module that someone froze
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 8, 20)])
    batch = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    model(**batch).logits.sum().backward()
    trainer._metrics["train"]["loss"].append(1.5)
    state = {
        "forward": base.__dict__.get("forward"),
        "outer": model.__dict__.get("forward"),
        "modes": [m.training for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "metrics": json.dumps(trainer._metrics),
        "requires": [p.requires_grad for p in model.parameters()],
    }
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def load(domain):
        return [trainer.train_dataset[i] for i in (0, 8, 20)]

    found = Signals(trainer, trainer.eval_dataset).take(
        name, [(np.array([0, 1, 2]), batch)], 3, load
    )
    assert all(np.isfinite(values).all() for values in found.values())
    assert base.__dict__.get("forward") is state["forward"]
    assert model.__dict__.get("forward") is state["outer"]
    assert [m.training for m in model.modules()] == state["modes"]
    assert torch.get_rng_state().tolist() == state["random"]
    assert np.random.get_state()[1].tolist() == state["numpy"]
    assert json.dumps(trainer._metrics) == state["metrics"]
    assert [p.requires_grad for p in model.parameters()] == state["requires"]
    for p, before in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None and before is None) or torch.equal(p.grad, before)
    # a step of training after it is that of a trainer that has measured nothing
    layer.mlp.train()
    losses = []
    for each in (trainer, alone):
        each.model.zero_grad()
        torch.manual_seed(1)
        loss = each.training_step(each.model_wrapped, dict(batch))
        grads = [p.grad for p in each.model.parameters() if p.grad is not None]
        losses.append([loss.item(), *(g.abs().sum().item() for g in grads)])
    assert losses[0] == losses[1]


def test_measuring_with_the_loss_of_dpo(checkpoint, tmp_path):
    rows = {
        name: Dataset.from_dict(
            {
                "prompt": [f"What is {i}{name}?" for i in range(6)],
                "chosen": [f" {i}" for i in range(6)],
                "rejected": [f" no, {name * i}" for i in range(6)],
            }
        )
        for name in "+*"
    }
    args = DPOConfig(str(tmp_path), **{**SETTINGS, "max_steps": 3})
    trainer = DPOTrainer(
        checkpoint, args=args, train_dataset=label_domains(rows), eval_dataset=rows
    )
    sampler = MixtureSampler(rows, seed=3)
    controller = Phases(([0.5, 0.5], 3, "losses"))
    callback = MixtureCallback(sampler, lambda *_: controller)
    attach_mixture(trainer, sampler, callback)
    assert callback.signals.measure == "loss"
    trainer.train()
    metrics = json.dumps(trainer._metrics)
    random = torch.get_rng_state().tolist()
    losses = callback.signals.take("losses", [], 2)["losses"]
    assert json.dumps(trainer._metrics) == metrics
    assert torch.get_rng_state().tolist() == random
    assert losses.tolist() == controller.told[0]["signal"]["losses"]
    expected = trainer.evaluate()
    assert losses.tolist() == pytest.approx(
        [expected["eval_+_loss"], expected["eval_*_loss"]], rel=1e-5
    )
    assert abs(losses - np.log(2)).min() > 1e-4  # something was learnt


def test_measuring_with_the_loss_of_flat_leaves_its_run_as_it_is(tokenizer, tmp_path):
    """Its log of probabilities and its guard too."""
    rows = {
        name: Dataset.from_dict(
            {"question": [f"What is {i}{name}?" for i in range(6)], "answer": ["It is."] * 6}
        )
        for name in "+*"
    }
    logs = []
    for phases in ((([0.5, 0.5], 4, None),), (([0.5, 0.5], 1, "losses"),)):
        args = FLATConfig(str(tmp_path / str(len(logs))), **{**SETTINGS, "max_steps": 4})
        torch.manual_seed(0)
        trainer = FLATTrainer(
            tiny_model(),
            args=args,
            train_dataset=label_domains(rows),
            eval_dataset=rows,
            processing_class=tokenizer,
        )
        sampler = MixtureSampler(rows, seed=3)
        controller = Phases(*phases)
        attach_mixture(trainer, sampler, MixtureCallback(sampler, lambda *_, c=controller: c))
        trainer.train()
        assert len(controller.told) == (4 if logs else 0)
        logs.append([e for e in trainer.state.log_history if "loss" in e])
    assert logs[0] == logs[1] and "flat/forget_prob" in logs[0][0]


def test_rows_without_labels_are_measured_by_the_trainers_own_loss(tokenizer, tmp_path):
    """Mean over batches of one target; "nll" asks for labels by name."""
    ids = [tokens_of(0, row) for row in range(4)]
    rows = {
        "a": Dataset.from_dict({"input_ids": ids}),
        "b": Dataset.from_dict({"input_ids": ids[:1]}),
    }
    args = SFTConfig(str(tmp_path), **SETTINGS, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = SFTTrainer(
        tiny_model(), args, train_dataset=label_domains(rows), processing_class=tokenizer
    )
    found = Signals(trainer, rows)
    assert found.measure == "loss"
    pairs = [ids[:2], ids[2:]]
    labelled = [[{"input_ids": row, "labels": row} for row in pair] for pair in pairs]
    expected = [
        np.mean([by_hand(trainer.model, pair) for pair in labelled]),
        by_hand(trainer.model, labelled[0][:1]),
    ]
    assert found.take("losses", [], 2)["losses"].tolist() == pytest.approx(expected, rel=1e-5)


def test_targets_without_rows_or_scored_tokens_are_refused(make):
    trainer, rows = make(), targets()
    with pytest.raises(ValueError, match="`eval_dataset`: the target 'b' has no rows"):
        Signals(trainer, {**rows, "b": rows["b"].select([])})
    blank = rows["c"].map(lambda row: {"labels": [5] + [-100] * (len(row["labels"]) - 1)})
    with pytest.raises(ValueError, match=r"`eval_dataset`: no row of \['c'\] has a scored token"):
        Signals(trainer, {**rows, "c": blank})
    with pytest.raises(ValueError, match="`padding_free`"):
        trainer.padding_free = True
        Signals(trainer, rows)


def test_a_measurement_that_is_not_known_is_refused(make):
    trainer = make(max_steps=2)
    mixed(trainer, Phases((WEIGHTS, 1, "loss")))
    with pytest.raises(ValueError, match="'loss'"):
        trainer.train()
    with pytest.raises(ValueError, match="`measure`"):
        Signals(trainer, targets(), measure="mean")


def test_losses_logged_are_those_told(make, tmp_path):
    trainer = make(max_steps=3)
    controller = Phases((WEIGHTS, 0, "losses"), (WEIGHTS, 3, "losses"))
    mixed(trainer, controller)
    first = [by_hand(trainer.model, rows) for rows in trainer.eval_dataset.values()]
    finish(trainer)
    lines = [json.loads(x) for x in (tmp_path / "run/mixture.jsonl").read_text().splitlines()]
    measured = [line["measured"]["losses"] for line in lines if "measured" in line]
    assert measured == [told["signal"]["losses"] for told in controller.told]
    last = [by_hand(trainer.model, rows) for rows in trainer.eval_dataset.values()]
    assert measured[0] == pytest.approx(first, rel=1e-5)
    assert measured[1] == pytest.approx(last, rel=1e-5)
    final = [line["final"] for line in lines if "final" in line]
    assert final == [measured[1]]
