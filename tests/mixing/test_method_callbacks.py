"""Skill-It, DoReMi, DoGE, ODM and EXP3 under TRL's trainer, against plain logits and autograd."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from llmmix.files import read_record
from llmmix.mixing.attach import attach_mixture
from llmmix.mixing.doge import DoGECallback, DoGEConfig
from llmmix.mixing.doremi import DoReMiCallback, DoReMiConfig
from llmmix.mixing.odm import ODMCallback, ODMConfig
from llmmix.mixing.rows import label_domains
from llmmix.mixing.sampler import MixtureSampler
from llmmix.mixing.skillit import SkillItCallback, SkillItConfig

SETTINGS = {
    "max_steps": 7,  # epochs of three steps: more than two of them
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},  # tokenized already
}
# Not in the order of the alphabet, which a trainer's state is saved in
TEXTS = {
    "sums": [(f"{a}+{a}=", f"{a + a}") for a in (3, 14, 159, 2653, 58)],
    "words": [(f"the {x}", f" sat on the {x}") for x in ("cat", "dog", "mat", "a", "it")],
    "letters": [("ab" * n, "abba " * n) for n in range(1, 6)],
}
FIRST = [0.5, 0.3, 0.2]
METHODS = {
    "skillit": lambda sampler, checkpoint: SkillItCallback(
        sampler, SkillItConfig(update_steps=2, eta=0.5, window=2)
    ),
    "doremi": lambda sampler, checkpoint: DoReMiCallback(
        sampler, DoReMiConfig(interval=2, smoothing=0.01), reference=checkpoint
    ),
    "doge": lambda sampler, checkpoint: DoGECallback(
        sampler, DoGEConfig(mu=1, dw_max=100, interval=2)
    ),
    "odm": lambda sampler, checkpoint: ODMCallback(sampler, ODMConfig(warmup_share=0.3)),
    "exp3": lambda sampler, checkpoint: ODMCallback(
        sampler, ODMConfig(update="exp3", reward="losses", interval=2)
    ),
}
CONTROLLERS = {"skillit": "SkillIt", "doremi": "DoReMi", "doge": "DoGE"}
UPDATES = {"skillit": 3, "doremi": 4, "doge": 4, "odm": 5, "exp3": 3}  # of seven steps
methods = pytest.mark.parametrize("method", METHODS)
# A GPU adds in any order: a run differs from itself by what rounding leaves
SAME = {"rtol": 1e-4, "atol": 1e-5} if torch.cuda.is_available() else {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def domains(tokenizer):
    """Three domains of five rows of uneven lengths, whose prompts are not scored."""

    def row(prompt, completion):
        given, scored = tokenizer(prompt).input_ids, tokenizer(completion).input_ids
        return {"input_ids": given + scored, "labels": [-100] * len(given) + scored}

    return {name: Dataset.from_list([row(*pair) for pair in TEXTS[name]]) for name in TEXTS}


@pytest.fixture
def make(checkpoint, domains, tmp_path):
    """A trainer of a method, and its callback."""

    def made(method, folder="run", model=checkpoint, targets="domains", **settings):
        sampler = MixtureSampler(domains, FIRST, seed=1)
        callback = METHODS.get(method, method)(sampler, checkpoint)
        trainer = SFTTrainer(
            model,
            args=SFTConfig(str(tmp_path / folder), **{**SETTINGS, **settings}),
            train_dataset=label_domains(domains),
            eval_dataset=domains if targets == "domains" else targets,
        )
        attach_mixture(trainer, sampler, callback)
        return trainer, callback

    return made


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def of_record(folder, name):
    """The values of a name in the lines of a run's record that have it."""
    return [entry[name] for entry in read_record(folder)[1] if name in entry]


@methods
def test_trains_on_mixtures(make, method, tmp_path, capsys):
    needs_targets = method in ("skillit", "exp3")
    trainer, callback = make(method, targets="domains" if needs_targets else None)
    trainer.train()
    assert len(losses_of(trainer)) == 7 and np.isfinite(losses_of(trainer)).all()
    header, _ = read_record(tmp_path / "run")
    assert header["method"] == CONTROLLERS.get(method, "ODM")
    assert header["domains"] == list(TEXTS)
    decided = of_record(tmp_path / "run", "weights")
    np.testing.assert_allclose(np.sum(decided, axis=1), 1, atol=1e-12)
    assert np.ptp(decided, axis=0).max() > 0.001
    drawn = of_record(tmp_path / "run", "counts")
    assert len(drawn) == 7 and np.sum(drawn, axis=1).tolist() == [4] * 7
    np.testing.assert_array_equal(np.sum(drawn, axis=0), list(callback.sampler.counts.values()))
    assert len(of_record(tmp_path / "run", "measured")) == UPDATES[method]
    assert callback.controller.record()["skipped"] == 0
    if method in ("doremi", "doge"):
        assert list(callback.average) == list(TEXTS)
        assert list(callback.average.values()) == callback.controller.average.tolist()
        assert sum(callback.average.values()) == pytest.approx(1, abs=1e-12)
        said = f"to train the final model on: sums {callback.average['sums']:.4f}, words "
        assert said in capsys.readouterr().out


class Killed(Exception):
    """As the machine had it."""


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise Killed


@pytest.mark.parametrize(
    "method",  # a method of each signal; ODM and EXP3 add a controller, which simulated runs resume
    [
        "skillit",
        "doremi",
        "doge",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("odm", "exp3")),
    ],
)
def test_killed_and_resumed_is_never_stopped(make, method, tmp_path):
    """Between two updates, in the middle of an epoch, and with a step after the checkpoint lost."""
    never, whole = make(method, "never")
    never.train()
    killed, _ = make(method, "killed", save_strategy="steps", save_steps=5)
    killed.add_callback(Kill())
    with pytest.raises(Killed):
        killed.train()
    resumed, parted = make(method, "killed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed/checkpoint-5"))
    np.testing.assert_allclose(losses_of(resumed), losses_of(never), **SAME)
    torch.testing.assert_close(weights_of(resumed), weights_of(never), **SAME)
    if not torch.cuda.is_available():  # a share that differs by rounding may draw another row
        assert parted.sampler.state_dict() == whole.sampler.state_dict()
        assert parted.controller.state_dict() == whole.controller.state_dict()
        for name in ("counts", "measured", "weights"):
            one, other = (of_record(tmp_path / folder, name) for folder in ("never", "killed"))
            assert str(one) == str(other)  # NaN is NaN


@methods
def test_a_finished_run_trains_no_step_more(make, method, tmp_path):
    done, callback = make(method, "run", save_strategy="steps", save_steps=7)
    done.train()
    record = (tmp_path / "run/mixture.jsonl").read_text()
    again, same = make(method, "run")
    again.training_step = None  # a step would fail
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-7"))
    assert torch.equal(weights_of(again), weights_of(done))
    assert same.sampler.state_dict() == callback.sampler.state_dict()
    ended = [line for line in record.splitlines() if '"spent"' not in line]
    lines = (tmp_path / "run/mixture.jsonl").read_text().splitlines()
    assert [line for line in lines if '"spent"' not in line] == ended


# Signals by hand


def spy(callback, check):
    """Have what is measured checked while the model is as it is; returns what was measured."""
    take, seen = callback.signals.take, []

    def taken(name, kept, domains, loader=None):
        found = take(name, kept, domains, loader)
        check(kept, loader, found)
        seen.append(found)
        return found

    callback.signals.take = taken
    return seen


KEYS = ("input_ids", "attention_mask", "labels")


def token_losses(model, batch):
    """(B, T-1) losses from all logits, and where they count, on the model's device."""
    batch = {name: batch[name].to(model.device) for name in KEYS}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
    return losses, labels != -100


def by_domain(kept, values_of):
    """(m,) means over the tokens of the rows of each domain."""
    found = [[] for _ in TEXTS]
    for drawn, batch in kept:
        for domain, values, mask in zip(drawn, *values_of(batch), strict=True):
            found[domain] += values[mask].tolist()
    return [np.mean(values) if values else np.nan for values in found]


def test_the_loss_of_each_domain_in_the_batch(make):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer, callback = make("odm", targets=None, **settings)

    @torch.no_grad()
    def check(kept, loader, found):
        assert [len(drawn) for drawn, _ in kept] == [2, 2]
        by_hand = by_domain(kept, lambda batch: token_losses(trainer.model, batch))
        np.testing.assert_allclose(found["train"], by_hand, rtol=1e-5)

    seen = spy(callback, check)
    trainer.train()
    assert len(seen) == 5 and any(np.isnan(found["train"]).any() for found in seen)


def test_the_excess_over_the_reference_is_clipped_at_each_token(make, model):
    noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight.data += 0.1 * noise
    plain = copy.deepcopy(model)
    trainer, callback = make(lambda s, _: DoReMiCallback(s, reference=model), targets=None)
    plain.to(trainer.args.device)
    of_means = []

    @torch.no_grad()
    def check(kept, loader, found):
        def excess(batch):
            losses, mask = token_losses(trainer.model, batch)
            return losses - token_losses(plain, batch)[0], mask

        def clipped(batch):
            return excess(batch)[0].clamp(min=0), excess(batch)[1]

        by_hand = by_domain(kept, clipped)
        np.testing.assert_allclose(found["excess"], by_hand, rtol=1e-4, atol=1e-6)
        of_means.append(np.maximum(by_domain(kept, excess), 0))

    seen = spy(callback, check)
    trainer.train()
    found = np.array([signal["excess"] for signal in seen])
    assert len(found) == 7 and np.nanmax(found) > 0.1
    assert np.nanmax(np.abs(found - of_means)) > 0.01


def test_products_of_gradients(make, domains):
    trainer, callback = make("doge", targets=None)

    def check(kept, loader, found):
        gradients = []
        for domain, name in enumerate(TEXTS):
            rows = loader(domain)
            assert len(rows) == 4
            assert all(row["input_ids"] in domains[name]["input_ids"] for row in rows)
            losses, mask = token_losses(trainer.model, trainer.data_collator(rows))
            parts = torch.autograd.grad(losses[mask].mean(), list(trainer.model.parameters()))
            gradients.append(torch.cat([part.flatten() for part in parts]).double())
        products = (torch.stack(gradients) @ torch.stack(gradients).T).cpu()
        np.testing.assert_allclose(found["products"], products, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["norms"], products.diagonal().sqrt(), rtol=1e-5)
        assert all(p.grad is None for p in trainer.model.parameters())  # nothing is left behind

    seen = spy(callback, check)
    trainer.train()
    assert len(seen) == len({found["norms"][0] for found in seen}) == 4  # other rows each time


def test_losses_of_the_targets(make):
    trainer, callback = make("skillit")

    @torch.no_grad()
    def check(kept, loader, found):
        by_hand = []
        for rows in trainer.eval_dataset.values():
            losses, mask = token_losses(trainer.model, trainer.data_collator(list(rows)))
            by_hand.append(losses[mask].mean().item())
        np.testing.assert_allclose(found["losses"], by_hand, rtol=1e-5)

    seen = spy(callback, check)
    trainer.train()
    assert len(seen) >= UPDATES["skillit"]


@pytest.mark.parametrize(("method", "signal"), [("doremi", "excess"), ("odm", "train")])
def test_accumulation_measures_what_one_batch_does(make, method, signal, tmp_path):
    once, _ = make(method, "once", targets=None)
    once.train()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    twice, _ = make(method, "twice", targets=None, **settings)
    twice.train()
    one, other = (
        [np.array(measured[signal], float) for measured in of_record(tmp_path / folder, "measured")]
        for folder in ("once", "twice")
    )
    assert len(one) == UPDATES[method]
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses_of(once), losses_of(twice), rtol=1e-4)


# The reference


def test_the_reference_is_no_part_of_what_is_trained(make, model):
    before = copy.deepcopy(model.train().state_dict())
    trainer, callback = make(lambda s, _: DoReMiCallback(s, reference=model), max_steps=3)
    assert callback.signals.reference is model and not model.training
    trainer.train()
    theirs = {id(p) for p in model.parameters()}
    assert not theirs & {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert not theirs & {id(p) for p in trainer.model.parameters()}
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    now = {name: value.cpu() for name, value in model.state_dict().items()}
    assert all(torch.equal(before[name].cpu(), value) for name, value in now.items())
    assert "forward" not in vars(model)  # nothing of ours stays on it


def test_a_reference_that_is_the_start_has_no_excess_to_begin_with(make, tmp_path):
    trainer, _ = make(lambda s, checkpoint: DoReMiCallback(s, reference=checkpoint), max_steps=2)
    trainer.train()
    first, second = of_record(tmp_path / "run", "measured")
    first, second = (np.array(found["excess"], float) for found in (first, second))
    # The same forward, but one with gradients: another algorithm may serve it on a GPU
    rounding = 1e-5 if torch.cuda.is_available() else 0
    assert np.nanmax(first) == pytest.approx(0, abs=rounding)
    assert np.nanmax(second) > rounding


def test_references_that_do_not_serve(make, checkpoint, model, tmp_path):
    def attach(reference, **settings):
        make(lambda s, _: DoReMiCallback(s, reference=reference), targets=None, **settings)

    with pytest.raises(TypeError, match="`reference` must be a model or the name.*got NoneType"):
        attach(None)
    with pytest.raises(ValueError, match="`reference` shares weights"):
        attach(model, model=model)
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = 128
    with pytest.raises(ValueError, match="`reference` has 128 positions.*max_length=200"):
        attach(short, max_length=200)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="`reference` is spread over processes"):
        attach(model)
    del model.lm_head.weight.ds_id
    model.resize_token_embeddings(400)
    with pytest.raises(ValueError, match="`reference` has a vocabulary of 400.*one of 375"):
        attach(model)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        attach(str(tmp_path))


@pytest.mark.parametrize("method", ["skillit", "exp3"])
def test_targets_that_do_not_serve(make, domains, method):
    with pytest.raises(ValueError, match="`eval_dataset` is missing"):
        make(method, targets=None)
    with pytest.raises(ValueError, match="`targets` must be the domains"):
        make(method, targets={"sums": domains["sums"]})


@pytest.mark.parametrize("method", ["doremi", "doge", "odm"])
def test_rows_of_no_target_are_no_hindrance(make, domains, method):
    """What measures no losses leaves the trainer's own evaluation alone."""
    trainer, _ = make(method, targets=domains["sums"], max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
