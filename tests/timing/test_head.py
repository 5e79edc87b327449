import pytest

from llmmix.timing.head import head_cases


def test_contenders_compute_the_same_loss(monkeypatch):
    """Else they could not be compared."""
    sizes = {"rows": 32, "hidden_size": 16, "vocab_size": 200}
    losses = []
    monkeypatch.setattr("torch.Tensor.backward", lambda loss: losses.append(loss.item()))
    groups = head_cases(**sizes, masked=[0.0, 0.5], device="cpu")
    assert len(groups) == 6
    for group in groups:
        losses.clear()
        for case in group:
            case.built()()
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
