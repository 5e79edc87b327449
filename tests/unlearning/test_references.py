"""The model before unlearning: every way to keep it is a copy of it."""

import math

import pytest
import torch

from llmmix.unlearning.parts import forward_parts, logits_of, select
from tests.unlearning.runs import FORGET, assert_same, by_path, finish, logged, lora

pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.mark.parametrize("name", by_path(["npo", "dpo", "undial", "kl", "rmu", "npo-kl"]))
def test_an_adapter_switched_off_is_a_copy(run, name):
    given = {"peft": lora("q_proj", "v_proj", "down_proj"), "learning_rate": 5e-2}
    runs = [run(name, reference=kind, **given) for kind in ("adapter", "copy")]
    assert_same(*runs)
    steps = runs[0][0]
    assert (steps[0] - steps[-1]).abs().max() > 1e-3  # and the model has left it


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("name", by_path(["npo", "dpo"]))
def test_numbers_kept_are_a_copy(make, name, resample):
    given = {"resample_templates": resample, "max_steps": 8}
    kept, copied = (make(name, reference=kind, **given) for kind in ("precomputed", "copy"))
    assert_same(finish(kept), finish(copied))
    assert make(name).reference.kind == "precomputed" and copied.reference.kind == "copy"
    templates = {key for key in kept.reference._logps if key[0] == "template"}
    assert (len(templates) > 10) == (name == "dpo" and resample)


@pytest.mark.parametrize("name", by_path(["npo", "dpo"]))
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


def test_a_model_that_stands_still_stays_at_its_reference(make):
    for name in ("kl", "npo-kl"):
        trainer = make(name, learning_rate=0.0)
        trainer.train()
        assert logged(trainer, "unlearn/retain_loss") == pytest.approx([0] * 4, abs=1e-6)


@pytest.mark.parametrize("kind", ["adapter", "precomputed", "copy"])
def test_the_reference_has_no_dropout(make, kind):
    peft = lora()
    peft.lora_dropout = 0.5
    trainer = make(
        "npo",
        reference=kind,
        peft=peft if kind == "adapter" else None,
        model_init_kwargs={"attention_dropout": 0.5},
    )
    rows, parts, model = trainer.train_dataset, trainer.parts, trainer.model.train()
    batch = rows.collate([rows[row] for row in range(10)])
    trainer.reference.precompute(rows, 1, parts)
    plain = make("npo", retain_weight=0.0).model.eval()
    expected, dropped = (
        forward_parts(one, select(batch, parts, ["forget"]), ["forget"])[0]["forget"][0].sum(1)
        for one in (plain, model)
    )
    found = trainer.reference.logps(model, batch, parts, "forget")
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    assert (dropped - expected).abs().min() > 1e-3 and model.training
    if kind != "precomputed":
        logits = trainer.reference.forward(
            model, batch, parts, ["retain"], head_objective=logits_of(["retain"], ["retain"])
        )[1]
        retained = forward_parts(
            plain,
            select(batch, parts, ["retain"]),
            ["retain"],
            logits_of(["retain"], ["retain"]),
        )[1]
        torch.testing.assert_close(
            logits.objective, retained.objective, rtol=1e-4, atol=1e-4, check_device=False
        )


def test_a_reference_that_does_not_serve_is_refused(make):
    with pytest.raises(ValueError, match="`reference='adapter'` switches a new adapter off"):
        make("npo", reference="adapter")
    for name in ("undial", "kl", "npo-kl", "rmu"):
        with pytest.raises(ValueError, match="`reference='precomputed'` keeps log-probabilities"):
            make(name, reference="precomputed")
    with pytest.raises(ValueError, match="evaluation rows"):
        make("npo", reference="precomputed", eval_dataset=FORGET)
    assert make("npo", eval_dataset=FORGET).reference.kind == "copy"
