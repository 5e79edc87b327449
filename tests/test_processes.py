import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmmix.processes import main_process_says, save_on_any_rank, warn_once


def test_alone_a_process_speaks_for_itself(caplog):
    assert main_process_says({"kept": ["a"]}) == {"kept": ["a"]}
    with caplog.at_level(logging.WARNING):
        warn_once("said")
    assert caplog.messages == ["said"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_model_is_saved_whole_from_any_rank(rank, model, tmp_path, monkeypatch):
    """Transformers saves on rank 0 alone where processes are several."""
    model.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(PreTrainedModel, "should_save_on_this_rank", lambda self, main: rank == 0)
    (tmp_path / "ours").mkdir()
    save_on_any_rank(model, tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for name in files:
        if name.endswith(".json"):
            ours, plain = ((tmp_path / kind / name).read_text() for kind in ("ours", "plain"))
            assert ours == plain, name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
