"""Runs of the unlearning trainers that must be the same run, and what they refuse."""

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaForCausalLM

from llmmix import FLATConfig, FLATTrainer, UnlearnConfig, UnlearnTrainer
from llmmix.unlearning.config import check_needs
from llmmix.unlearning.flat import flat_loss, sequence_probs
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
        needs = args.retain_weight > 0 or args.loss == "pdu"
    return trainer_type(
        checkpoint,
        args,
        rows,
        retain_dataset=retain if needs else None,
        peft_config=peft,
        **options,
    )


def finish(trainer, **options):
    """Loss and norm of the gradient of each step, and the weights at the end."""
    trainer.train(**options)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return torch.tensor([[step["loss"], step["grad_norm"]] for step in steps]), weights


@pytest.fixture
def make(checkpoint, tmp_path):
    def make(name, **given):
        return prepare(name, given.pop("folder", tmp_path / "out"), checkpoint, **given)

    return make


@pytest.fixture
def run(make):
    return lambda name, **given: finish(make(name, **given))


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """A trainer collects garbage when it is done: half its time, if all modules are looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def plain_run(checkpoint, tmp_path_factory):
    """The run of a method as `SETTINGS` have it, once for all tests."""
    known = {}

    def run(name):
        if name not in known:
            known[name] = finish(prepare(name, tmp_path_factory.mktemp(name), checkpoint))
        return known[name]

    return run


def assert_same(a, b, tolerance=2e-5):
    (steps_a, weights_a), (steps_b, weights_b) = a, b
    assert len(steps_a) == len(steps_b) > 0 and steps_a.isfinite().all()
    torch.testing.assert_close(steps_a, steps_b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights_a, weights_b, rtol=tolerance, atol=tolerance)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# What each run logs, by hand


def naive(model, encoded):
    """Logits (n, V) at the scored positions of one sequence without padding, and its answer."""
    ids, start = encoded
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return logits[start - 1 : -1], torch.tensor(ids[start:])


def logps_of(model, encoded):
    logits, labels = naive(model, encoded)
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


ONE = {"max_steps": 1, "per_device_train_batch_size": 10}  # all of one epoch in one step
BY_HAND = [n for n in METHODS if n not in ("rmu", "flat", "flat-retain", "undial-retain")]


def of_each_row(model, trainer, part):
    """Logits, labels and log-probabilities of the answers of a part, row by row."""
    pairs = [naive(model, trainer.train_dataset[row][part]) for row in range(10)]
    logps = [z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1) for z, y in pairs]
    return pairs, logps


def cross_entropy(pairs, change):
    """To what the logits say when the answers' own are changed; the mean over tokens."""
    found = []
    for z, y in pairs:
        target = z.clone()
        rows = torch.arange(len(y))
        target[rows, y] = change(target[rows, y])
        found.append(-(target.softmax(-1) * z.log_softmax(-1)).sum(-1))
    return torch.cat(found).mean()


def expected_of(name, model, pairs, rows):
    """The forget term of the first step, from plain forwards of single rows."""
    logps = torch.cat(rows)
    p = logps.exp()
    by_row = torch.stack([row.mean() for row in rows])
    if name in ("grad_ascent", "grad_diff", "kl"):
        return logps.clamp(min=-math.log(model.config.vocab_size)).mean()
    if name in ("npo", "npo-kl", "dpo"):
        return 20 * math.log(2)
    return {
        "simnpo": lambda: (4 * (1 + (0.5 * by_row).exp()).log()).mean(),
        "undial": lambda: cross_entropy(pairs, lambda own: own - 10),
        "ceu": lambda: cross_entropy(pairs, lambda own: torch.full_like(own, -torch.inf)),
        "wga": lambda: (p * logps).mean(),
        "satimp": lambda: (p**0.2 * (1 - p) * logps).mean(),
        "pdu": lambda: torch.cat([(z.amax(-1) - z.mean(-1)) ** 2 for z, _ in pairs]).mean(),
        "idk": lambda: -logps.mean(),
    }[name]()


@pytest.mark.parametrize("name", BY_HAND)
def test_the_first_loss_by_hand(make, model, name):
    trainer = make(name, **ONE)
    trainer.train()
    first, args = trainer.state.log_history[0], trainer.args
    part = "template" if name == "idk" else "forget"
    pairs, logps = of_each_row(model, trainer, part)
    forget = float(expected_of(name, model, pairs, logps))
    assert first["unlearn/forget_loss"] == pytest.approx(forget, rel=1e-4, abs=1e-6)
    total = args.forget_weight * forget
    if "retain" in trainer.parts:
        retain = -torch.cat(of_each_row(model, trainer, "retain")[1]).mean().item()
        retain = 0 if args.retain_loss == "kl" else retain
        assert first["unlearn/retain_loss"] == pytest.approx(retain, rel=1e-4, abs=1e-5)
        total += args.retain_weight * (retain - (1.0 if name == "pdu" else 0.0))
    assert first["loss"] == pytest.approx(total, rel=1e-4, abs=1e-5)
    mean = sum(row.exp().mean().item() for row in logps) / 10
    assert first[f"unlearn/{part}_prob"] == pytest.approx(mean, rel=1e-4)
    assert ("unlearn/capped" in first) == (name in ("grad_ascent", "grad_diff", "kl"))
    if "unlearn/capped" in first:
        share = (torch.cat(logps) < -math.log(model.config.vocab_size)).double().mean().item()
        assert 0 < share < 1 and first["unlearn/capped"] == pytest.approx(share, abs=1e-6)


def test_rmu_steers_one_layer_and_trains_three(make, model):
    trainer = make("rmu", max_steps=1, per_device_train_batch_size=10, steering=6.0)
    rows = trainer.train_dataset
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    target, losses = trainer.objective.settings["target"], []
    assert target.norm().item() == pytest.approx(6.0, rel=1e-5)
    for row in range(10):
        ids, start = rows.forget[row]
        with torch.no_grad():  # hidden_states[0] is the embeddings; the last is after the norm
            model.model.norm = torch.nn.Identity()
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        losses.append(((states[2][0, start:] - target) ** 2).mean().item())
    first = trainer.state.log_history[0]
    assert first["unlearn/forget_loss"] == pytest.approx(sum(losses) / 10, rel=1e-4)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)}
    first = make("rmu", layer=0, max_steps=1)
    finish(first)
    trained = [name for name, p in first.model.named_parameters() if p.requires_grad]
    assert trained == ["model.layers.0.mlp.down_proj.weight"]


# Equal trajectories


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_changes_nothing(plain_run, run, name):
    """Windows cross the end of an epoch: ten rows are windows of 4, 4 and 2."""
    parts = run(name, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same(plain_run(name), parts)
    assert (parts[0][:, 1] > 0).all()


@pytest.mark.parametrize("name", ["flat-retain", "dpo", "kl", "ceu", "rmu"])
def test_padding_side_and_token_do_not_matter(plain_run, run, checkpoint, name):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert_same(plain_run(name), run(name, processing_class=tokenizer))


@pytest.mark.parametrize("name", ["flat", "dpo", "npo-kl", "undial", "pdu", "rmu"])
def test_gradient_checkpointing_changes_nothing(plain_run, run, name):
    assert_same(plain_run(name), run(name, gradient_checkpointing=True))


@pytest.mark.parametrize("peft", [False, True])
def test_reentrant_checkpointing_leaves_the_steered_layer_its_gradient(run, peft):
    runs = []
    for given in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        torch.manual_seed(0)
        given = {"gradient_checkpointing": bool(given), "peft": lora() if peft else None, **given}
        runs.append(run("rmu", **given))
    assert_same(*runs)
    assert (runs[1][0][:, 1] > 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_lora_trains_the_adapter_alone(make, name):
    trainer = make(name, peft=lora(), learning_rate=1e-2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    steps, _ = finish(trainer)
    assert steps.isfinite().all() and len(steps) == 4
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)
    if getattr(trainer, "reference", None) is not None:
        assert trainer.reference.kind == "adapter"


@pytest.mark.parametrize("name", ["npo", "dpo", "undial", "kl", "rmu", "npo-kl"])
def test_an_adapter_switched_off_is_a_copy(run, name):
    given = {"peft": lora("q_proj", "v_proj", "down_proj"), "learning_rate": 5e-2}
    runs = [run(name, reference=kind, **given) for kind in ("adapter", "copy")]
    assert_same(*runs)
    steps = runs[0][0]
    assert (steps[0] - steps[-1]).abs().max() > 1e-3  # and the model has left it


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("name", ["npo", "dpo"])
def test_numbers_kept_are_a_copy(make, name, resample):
    given = {"resample_templates": resample, "max_steps": 8}
    kept, copied = (make(name, reference=kind, **given) for kind in ("precomputed", "copy"))
    assert_same(finish(kept), finish(copied))
    assert make(name).reference.kind == "precomputed" and copied.reference.kind == "copy"
    templates = {key for key in kept.reference._logps if key[0] == "template"}
    assert (len(templates) > 10) == (name == "dpo" and resample)


@pytest.mark.parametrize("name", ["npo", "dpo"])
def test_numbers_are_kept_for_every_epoch_there_will_be(run, name):
    """With `dataloader_drop_last` an epoch has fewer rows, and a run more epochs."""
    given = {"per_device_train_batch_size": 6, "dataloader_drop_last": True, "max_steps": 9}
    assert_same(run(name, reference="precomputed", **given), run(name, reference="copy", **given))


def test_numbers_kept_are_of_the_first_model_when_training_goes_on(make, tmp_path):
    """The reference is the model before unlearning, and not before the second call of `train`."""
    given = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    losses = []
    for kind in ("precomputed", "copy"):
        trainer = make("npo", reference=kind, folder=tmp_path / kind, **given)
        trainer.train()
        trainer.train(resume_from_checkpoint=str(tmp_path / kind / "checkpoint-2"))
        losses.append(logged(trainer, "unlearn/forget_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


RESUMED = {
    "flat": {"template_sft_steps": 2},
    "npo": {},
    "dpo": {},
    "pdu": {"dual_step": 0.5},
    "npo-kl lora": {},
    "rmu lora": {},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_never_stopped_to_the_last_digit(make, name, tmp_path):
    """Stopped in the middle of the second epoch, in windows of two micro-batches."""
    method, _, adapter = name.partition(" ")
    given = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 4,
        "peft": lora() if adapter else None,
        **RESUMED[name],
    }
    torch.manual_seed(0)
    whole = make(method, folder=tmp_path / "a", **given)
    steps, weights = finish(whole)
    torch.manual_seed(0)
    again = make(method, folder=tmp_path / "b", **given)
    resumed, same = finish(again, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(steps, resumed) and torch.equal(weights, same)
    if name == "pdu":
        multipliers = logged(whole, "unlearn/multiplier")
        assert len(set(multipliers)) == 7 and multipliers == logged(again, "unlearn/multiplier")
        assert multipliers[0] == 1.0


def test_resumed_at_the_end_of_an_epoch(make, tmp_path):
    given = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    steps, weights = finish(make("dpo", folder=tmp_path / "a", **given))  # three steps an epoch
    again = make("dpo", folder=tmp_path / "b", **given)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed, same = finish(again, resume_from_checkpoint=checkpoint)
    assert torch.equal(steps, resumed) and torch.equal(weights, same)


def test_training_twice_begins_anew(make):
    for name in ("flat", "pdu"):
        trainer = make(name)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        first = finish(trainer)
        trainer.model.load_state_dict(before)
        trainer.optimizer = trainer.lr_scheduler = None
        assert_same(first, finish(trainer), 0)


@pytest.mark.parametrize("name", ["flat", "dpo", "grad_diff"])
def test_loader_workers_change_nothing(plain_run, run, name):
    assert_same(plain_run(name), run(name, dataloader_num_workers=2), 1e-6)


@pytest.mark.parametrize(
    "name", ["flat", "npo", "simnpo", "dpo", "kl", "undial", "ceu", "satimp", "rmu", "pdu"]
)
def test_bf16_stays_near_fp32(plain_run, run, name):
    exact = plain_run(name)[0][:2]
    rough = run(name, max_steps=2, bf16=True, use_cpu=True)[0]
    assert rough.isfinite().all()
    scale = exact.abs().max(0).values
    assert ((exact - rough).abs() / scale).max() < 0.08


@pytest.mark.parametrize(("kind", "peft"), [("copy", None), ("adapter", lora())])
def test_model_and_reference_start_alike_under_bf16(make, kind, peft):
    for name in ("npo-kl", "rmu"):
        trainer = make(name, bf16=True, max_steps=1, reference=kind, peft=peft)
        trainer.train()
        first = trainer.state.log_history[0]
        assert first["unlearn/retain_loss"] == pytest.approx(0, abs=1e-6), name
        if name == "npo-kl":
            start = 20 * math.log(2)
            assert first["unlearn/forget_loss"] == pytest.approx(start, abs=1e-4)


TWO = ["flat", "npo", "kl", "pdu"]


def test_two_processes_are_one(checkpoint, tmp_path):
    """Torchrun over gloo, two ranks of 1 row and 2 micro-batches, against one of 4 rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.unlearning.test_trainer", checkpoint, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "two.pt", weights_only=True)
    metrics = json.loads((tmp_path / "two.json").read_text())
    for name, peft in two_runs():
        torch.manual_seed(0)
        trainer = prepare(name, tmp_path / "one", checkpoint, peft=peft, **EVEN)
        one = finish(trainer)
        key = f"{name} {peft is not None}"
        assert_same(one, found[key], 5e-5)
        for entry, other in zip(trainer.state.log_history, metrics[key], strict=True):
            # means over rows alone: those over tokens are logged as means of micro-batches' means
            for metric in {"flat/loss", "flat/template_prob", "unlearn/forget_prob"} & set(entry):
                assert entry[metric] == pytest.approx(other[metric], rel=1e-3, abs=1e-6), metric
            if "unlearn/multiplier" in entry:
                assert entry["unlearn/multiplier"] == pytest.approx(other["unlearn/multiplier"])


EVEN = {"rows": FORGET.select(range(8))}  # four rows a step, two steps an epoch


def two_runs():
    return [(name, None) for name in TWO] + [(name, lora()) for name in ("npo-kl", "rmu")]


# Relations


def test_no_weight_on_retained_rows_is_no_retained_rows(run):
    assert_same(run("grad_diff", retain_weight=0.0), run("grad_ascent"), 0)
    assert_same(run("kl", retain_weight=0.0), run("grad_ascent"), 0)


def test_wga_of_beta_zero_is_ascent_without_a_cap(run):
    given = {"retain_weight": 0.0, "max_steps": 3}
    assert_same(
        run("wga", beta=0.0, **given), run("grad_ascent", ascent_cap=math.inf, max_steps=3), 1e-6
    )
    assert_same(run("satimp", beta=0.0, beta2=0.0, **given), run("wga", beta=0.0, **given), 1e-6)


def test_a_weight_scales_its_term(run):
    given = {"max_steps": 1, "retain_weight": 0.0}
    for name in ("npo", "ceu", "rmu"):
        one = run(name, forget_weight=1.0, **given)[0]
        three = run(name, forget_weight=3.0, **given)[0]
        torch.testing.assert_close(3 * one, three, rtol=1e-5, atol=1e-6)

    # the step of plain descent is the sum of the steps of the two terms
    def step(forget_weight, retain_weight):
        given = {"forget_weight": forget_weight, "retain_weight": retain_weight}
        return run("wga", max_steps=1, learning_rate=1.0, **given)[1]

    start = step(0.0, 0.0)
    together = step(2.0, 0.5) - start
    apart = 2 * (step(1.0, 0.0) - start) + 0.5 * (step(0.0, 1.0) - start)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_npo_of_vanishing_beta_goes_the_way_of_ascent(make, run):
    """One row a step: NPO sums over its tokens what ascent takes the mean of."""
    given = {"max_steps": 1, "retain_weight": 0.0, "per_device_train_batch_size": 1}
    given |= {"learning_rate": 1e-2}
    trainer = make("npo", beta=1e-6, **given)
    start = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    row = next(iter(trainer._get_train_sampler()))
    encoded = trainer.train_dataset.forget[row]
    tokens = len(encoded.ids) - encoded.prompt_length
    npo = finish(trainer)[1] - start
    ascent = run("grad_ascent", ascent_cap=math.inf, **given)[1] - start
    assert tokens > 1
    torch.testing.assert_close(npo, tokens * ascent, rtol=1e-3, atol=1e-6)


def test_a_model_that_stands_still_stays_at_its_reference(make):
    for name in ("kl", "npo-kl"):
        trainer = make(name, learning_rate=0.0)
        trainer.train()
        assert logged(trainer, "unlearn/retain_loss") == pytest.approx([0] * 4, abs=1e-6)


def test_the_cap_ends_the_push(make):
    """With a cap below what every token has, nothing moves."""
    trainer = make("grad_ascent", ascent_cap=1e-3, learning_rate=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    steps, weights = finish(trainer)
    assert torch.equal(before, weights) and (steps[:, 1] == 0).all()
    assert steps[:, 0].tolist() == pytest.approx([-1e-3] * 4)
    assert logged(trainer, "unlearn/capped") == [1.0] * 4
    free = make("grad_ascent", ascent_cap=math.inf)
    finish(free)
    assert "unlearn/capped" not in free.state.log_history[0]


def test_the_multiplier_of_pdu_follows_its_rule(make):
    given = {"epsilon": 2.0, "dual_step": 0.25, "dual_warmup_epochs": 1.0, "retain_weight": 3.0}
    given |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 7}
    trainer = make("pdu", **given)
    trainer.train()
    retained, held = (logged(trainer, f"unlearn/{key}") for key in ("retain_loss", "multiplier"))
    assert held[:3] == [3.0] * 3  # three steps an epoch
    # what is logged is a mean over micro-batches, the rule's is one over tokens: near it
    for step in range(3, 6):
        assert held[step + 1] > held[step]
        assert held[step + 1] - held[step] == pytest.approx(0.25 * (retained[step] - 2), rel=0.3)
    given |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    whole = make("pdu", **given)
    whole.train()
    retained, other = (logged(whole, f"unlearn/{key}") for key in ("retain_loss", "multiplier"))
    assert other == pytest.approx(held, rel=1e-4)
    for step in range(2, 6):  # the last step of the first epoch moves it
        expected = other[step] + 0.25 * (retained[step] - 2)
        assert other[step + 1] == pytest.approx(expected, rel=1e-4)


def test_templates_are_drawn_anew_or_not(make):
    drawn = {}
    for resample in (True, False):
        trainer = make("dpo", resample_templates=resample, max_steps=9)
        seen = drawn[resample] = []
        collate = trainer.data_collator

        def watch(items, seen=seen, collate=collate):
            batch = collate(items)
            seen += zip(batch["row"].tolist(), batch["template_number"].tolist(), strict=True)
            return batch

        trainer.data_collator = watch
        trainer.train()
    assert len(drawn[True]) == len(drawn[False]) == 30  # three epochs, each row once
    assert {row for row, _ in drawn[True][:10]} == set(range(10))
    assert len(set(drawn[False])) == 10 and len(set(drawn[True])) > 20
    assert [row for row, _ in drawn[True]] == [row for row, _ in drawn[False]]


# Evaluation and formats


@pytest.mark.parametrize("name", [*METHODS])
def test_evaluation_rows_have_their_loss(make, name):
    """Without a step, on the training rows, it is the loss of a step over all of them."""
    given = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 10}
    if name == "pdu":  # else the multiplier has moved
        given["dual_warmup_epochs"] = 5.0
    trainer = make(name, eval_dataset=FORGET, eval_strategy="steps", eval_steps=1, **given)
    trainer.args.per_device_eval_batch_size = 10
    trainer.train()
    first = trainer.state.log_history[0]
    found = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert found["eval_loss"] == pytest.approx(first["loss"], rel=1e-3, abs=1e-5)
    prefix = "flat" if name.startswith("flat") else "unlearn"
    assert any(key.startswith(f"eval_{prefix}/") for key in found), found


def test_evaluation_of_flat_is_a_mean_over_rows_and_leaves_training_as_it_was(make, model, run):
    given = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = make("flat", eval_dataset={"a": FORGET, "b": FORGET.select([0])}, **given)
    assert_same(finish(trainer), run("flat"), 0)
    trainer.model.eval()
    rows = trainer.eval_dataset["a"]
    probs = [
        [logps_of(trainer.model, rows[row][part]).exp().mean() for row in range(10)]
        for part in ("template", "forget")
    ]
    expected = flat_loss(*(torch.stack(p) for p in probs)).mean().item()
    last = [entry for entry in trainer.state.log_history if "eval_a_loss" in entry][-1]
    assert last["eval_a_loss"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert logged(trainer, "eval_b_loss")


def test_text_and_prompts_are_forgotten_and_retained_too(make):
    text = Dataset.from_dict({"text": ["1+1=2 " * 20, "the second text", "the third"]})
    pairs = Dataset.from_dict({"prompt": ["2*2=", "3*2="], "completion": ["4", "6"]})
    for name in ("npo", "kl", "rmu"):
        trainer = make(name, rows=text, retain=pairs, max_length=24, max_steps=2)
        assert finish(trainer)[0].isfinite().all()
        assert len(trainer.train_dataset) > 3
    trainer = make("flat", rows=pairs, max_steps=2)
    assert finish(trainer)[0].isfinite().all()


# What is refused


def test_rows_to_retain_are_given_where_they_are_used(checkpoint, tmp_path):
    def make(retain=None, **given):
        config = UnlearnConfig(str(tmp_path), **SETTINGS, **given)
        return UnlearnTrainer(checkpoint, config, FORGET, retain_dataset=retain)

    for loss in LOSSES:
        extra = {"epsilon": 1.0} if loss == "pdu" else {}
        if LOSSES[loss].retain_weight > 0:
            with pytest.raises(ValueError, match=f"loss='{loss}'.*rows to retain.*retain_dataset"):
                make(loss=loss, **extra)
        if loss != "pdu":
            with pytest.raises(
                ValueError, match="does not use rows to retain with retain_weight 0"
            ):
                make(RETAIN, loss=loss, retain_weight=0.0)
    with pytest.raises(ValueError, match="`max_retain_loss` watches rows to retain"):
        make(loss="ceu", max_retain_loss=3.0)
    check_needs(UnlearnConfig("out", loss="npo"), True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "gradient"}, "`loss` must be one of grad_ascent, grad_diff.*'gradient'"),
        ({"reference": "other"}, "`reference` must be one of auto, adapter.*'other'"),
        ({"retain_loss": "l2"}, "`retain_loss` must be 'nll' or 'kl'"),
        ({"loss": "pdu"}, "set it"),
        ({"loss": "pdu", "epsilon": 1.0, "retain_loss": "kl"}, "leave `retain_loss` at 'nll'"),
        ({"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ({"loss": "dpo", "beta": -1.0}, "`beta` must be positive"),
        ({"loss": "undial", "beta": -1.0}, "`beta` must not be negative"),
        ({"loss": "ceu", "beta": 1.0}, "`beta` is no setting of 'ceu'"),
        ({"loss": "satimp", "beta2": -1.0}, "`beta2` must not be negative"),
        ({"forget_weight": -1.0}, "`forget_weight` must not be negative"),
        ({"retain_weight": math.nan}, "`retain_weight` must not be negative"),
        ({"ascent_cap": -1.0}, "`ascent_cap` must not be negative"),
        ({"skip_tokens": -1}, "`skip_tokens` must not be negative"),
        ({"loss": "pdu", "epsilon": 1.0, "dual_step": -1.0}, "`dual_step` must not be negative"),
        ({"min_forget_prob": 1.0}, "`min_forget_prob` must lie between 0 and 1"),
        ({"max_retain_loss": -1.0}, "`max_retain_loss` must lie between 0 and inf"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig("out", **given)


def test_names_are_taken_in_any_case_and_settings_are_the_authors():
    assert UnlearnConfig("out", loss="Grad-Diff").loss == "grad_diff"
    args = UnlearnConfig("out", loss="simnpo")
    assert (args.beta, args.forget_weight, args.retain_weight) == (4.5, 0.125, 1.0)
    args = UnlearnConfig("out", loss="simnpo", beta=2.0, forget_weight=0.0)
    assert (args.beta, args.forget_weight, args.retain_weight) == (2.0, 0.0, 1.0)
    assert UnlearnConfig("out", loss="kl").retain_loss == "kl"


def test_a_reference_that_does_not_serve_is_refused(make):
    with pytest.raises(ValueError, match="`reference='adapter'` switches a new adapter off"):
        make("npo", reference="adapter")
    for name in ("undial", "kl", "npo-kl", "rmu"):
        with pytest.raises(ValueError, match="`reference='precomputed'` keeps log-probabilities"):
            make(name, reference="precomputed")
    with pytest.raises(ValueError, match="evaluation rows"):
        make("npo", reference="precomputed", eval_dataset=FORGET)
    assert make("npo", eval_dataset=FORGET).reference.kind == "copy"


@pytest.mark.parametrize("name", ["flat", "npo"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"packing": True}, "`packing=True` merges"),
        ({"label_smoothing_factor": 0.1}, "leave `label_smoothing_factor`"),
        ({"rows": FORGET.to_iterable_dataset()}, "must be a map-style `Dataset`"),
        ({"rows": None}, "must be a map-style `Dataset`.*NoneType"),
        ({"rows": FORGET.select([])}, "got no rows"),
        ({"rows": FORGET.rename_column("answer", "reply")}, "`train_dataset` has the columns"),
        ({"max_length": 4}, "None of the 10 rows to forget"),
        ({"eval_dataset": FORGET.remove_columns("answer")}, "`eval_dataset` has the columns"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else "",
)
def test_bad_rows_are_refused(make, name, given, message):
    with pytest.raises(ValueError, match=message):
        make(name, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"templates": []}, "`templates` holds no answer"),
        ({"templates": ["", " "]}, "`templates` holds no answer"),
        ({"templates": ["answer"]}, "`templates` holds no answer"),
        ({"templates": ["61"]}, "Row 1 is to forget '6=61'|one of its templates"),
        ({"rows": Dataset.from_dict({"text": ["some text"]})}, "has no question for a template"),
        ({"template_file": "/no/file"}, "`template_file`: no file"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["flat", "dpo", "idk"])
def test_bad_templates_are_refused(make, name, given, message):
    error = FileNotFoundError if "template_file" in given else ValueError
    given = {"templates": ["6=61"]} if given.get("templates") == ["61"] else given
    with pytest.raises(error, match=message):
        make(name, **given)


def test_bad_retained_rows_are_refused(make):
    both = Dataset.from_dict({"question": ["What is 3+5?"], "answer": ["8"]})
    with pytest.raises(ValueError, match="1 questions or texts stand both"):
        make("npo", retain=both)
    with pytest.raises(ValueError, match="`retain_dataset` must be a map-style .* got no rows"):
        make("npo", retain=RETAIN.select([]))
    with pytest.raises(ValueError, match="`retain_dataset` has the columns"):
        make("npo", retain=RETAIN.rename_column("answer", "reply"))
    with pytest.raises(ValueError, match="retain_dataset"):
        make("npo", retain=RETAIN.to_iterable_dataset())


def test_rows_that_are_too_long_are_dropped_and_counted(make, caplog):
    lengths = sorted(len(e.ids) for e in make("grad_ascent").train_dataset.forget)
    trainer = make("grad_ascent", max_length=lengths[4])
    expected = sum(n <= lengths[4] for n in lengths)
    assert len(trainer.train_dataset) == expected < 10
    assert f"Dropped {10 - expected} of 10 rows to forget" in caplog.text
    finish(trainer)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(make, layer):
    with pytest.raises(ValueError, match=r"`layer` must lie in \[0, 2\)"):
        make("rmu", layer=layer)


def test_rmu_without_anything_to_train_is_refused(make):
    above = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], layers_to_transform=[1]
    )
    with pytest.raises(ValueError, match="rmu trains layers 0 to 0 alone, and nothing there"):
        make("rmu", layer=0, peft=above)


def test_saved_model_is_a_plain_checkpoint(make, tmp_path):
    for name in ("npo", "rmu"):
        trainer = make(name, max_steps=1)
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / name)
        for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_mean_probability_is_sequence_probs(make):
    trainer = make("idk", max_steps=1, per_device_train_batch_size=10)
    trainer.train()
    first = trainer.state.log_history[0]
    assert "unlearn/template_prob" in first and "unlearn/forget_prob" not in first
    logps = torch.tensor([[-1.0, -2.0]])
    assert sequence_probs(logps, logps < 0).item() == pytest.approx(
        (math.exp(-1) + math.exp(-2)) / 2
    )


if __name__ == "__main__":  # under torchrun
    torch.set_num_threads(1)
    checkpoint, folder = sys.argv[1], Path(sys.argv[2])
    results, metrics = {}, {}
    for name, peft in two_runs():
        torch.manual_seed(0)
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        trainer = prepare(name, folder / "two", checkpoint, peft=peft, **EVEN, **split)
        assert trainer.accelerator.num_processes == 2
        results[f"{name} {peft is not None}"] = finish(trainer)
        metrics[f"{name} {peft is not None}"] = trainer.state.log_history
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / "two.pt")
        (folder / "two.json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()  # its threads must not outlive it
