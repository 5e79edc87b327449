"""PDU: its multiplier."""

import pytest

from tests.unlearning.runs import logged

pytestmark = pytest.mark.usefixtures("quick_collections")


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
