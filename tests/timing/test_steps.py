import pytest

from llmmix.timing.steps import STEPS, step_cases


@pytest.mark.parametrize("method", [step.name for step in STEPS])
def test_contenders_train_on_the_same_rows(method, checkpoint, monkeypatch):
    seen = []
    step = "transformers.Trainer.training_step"
    monkeypatch.setattr(step, lambda self, model, inputs, *_: seen.append(inputs))
    sizes = {"batch_size": 2, "max_length": 24, "device": "cpu"}
    groups = step_cases(models=[checkpoint], methods=[method], **sizes)
    assert [group[0].options["lora"] for group in groups] == [False, True]
    for group in groups:
        seen.clear()
        for case in group:
            case.built()()
        ours, peers = (batch["input_ids"].sort(0).values.tolist() for batch in seen)
        assert ours == peers
        assert seen[0]["input_ids"].size(1) <= 24
