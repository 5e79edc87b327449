"""What a run says of its mixture."""

from tests.mixing.runs import mixed


def test_many_passes_over_a_domain_are_said_once(make, caplog):
    trainer = make(max_steps=8)
    mixed(trainer, weights=[0, 0, 1])
    trainer.train()
    assert caplog.text.count("has been read more than 4 times over (5 rows)") == 1
    assert "Domain 'c'" in caplog.text
