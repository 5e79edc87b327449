"""RMU: what it steers, and what it trains."""

import pytest
import torch
from peft import LoraConfig

from tests.unlearning.runs import assert_same, finish, lora

pytestmark = pytest.mark.usefixtures("quick_collections")


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


@pytest.mark.parametrize("peft", [False, True])
def test_reentrant_checkpointing_leaves_the_steered_layer_its_gradient(run, peft):
    runs = []
    for given in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        torch.manual_seed(0)
        given = {"gradient_checkpointing": bool(given), "peft": lora() if peft else None, **given}
        runs.append(run("rmu", **given))
    assert_same(*runs)
    assert (runs[1][0][:, 1] > 0).all()


@pytest.mark.parametrize(
    ("layer", "said"), [(-1, "`layer` must be 0 or more"), (2, r"`layer` must lie in \[0, 2\)")]
)
def test_a_layer_that_is_not_there_is_refused(make, layer, said):
    with pytest.raises(ValueError, match=said):
        make("rmu", layer=layer)


def test_rmu_without_anything_to_train_is_refused(make):
    above = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], layers_to_transform=[1]
    )
    with pytest.raises(ValueError, match="rmu trains layers 0 to 0 alone, and nothing there"):
        make("rmu", layer=0, peft=above)
