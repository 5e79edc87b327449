"""Checkpoints by name, how they are loaded, and one model at a time."""

import pytest
import torch
from trl import ModelConfig

from llmmix import DCOConfig, models
from llmmix.models import Checkpoint, Loader, named_checkpoints, prepare_model_args


def test_names_are_the_last_parts_unless_two_would_share_a_folder():
    assert [c.name for c in named_checkpoints(["org/a", "runs/b"])] == ["a", "b"]
    assert [c.name for c in named_checkpoints(["org/a", "runs/a"])] == ["org-a", "runs-a"]
    assert named_checkpoints(["m"], ["none", "runs/x"]) == [
        Checkpoint("m", "m"),
        Checkpoint("x", "m", "runs/x"),
    ]


def test_a_folder_with_an_adapter_alone_names_its_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (found,) = named_checkpoints([str(tmp_path)])
    assert (found.model, found.adapter) == ("org/base", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert named_checkpoints([str(tmp_path)])[0].adapter is None


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(ValueError, match="names one twice"):
        named_checkpoints(["a", "a"])
    with pytest.raises(ValueError, match="would share a folder"):
        named_checkpoints(["x"], ["none", "runs/x"])
    with pytest.raises(ValueError, match="got several"):
        named_checkpoints(["a", "b"], ["none"])


def test_one_model_is_held_at_a_time(checkpoint):
    loader = Loader(torch.device("cpu"))
    first = loader.model(Checkpoint("a", checkpoint))
    assert loader.model(Checkpoint("a", checkpoint)) is first
    assert loader.model(Checkpoint("b", checkpoint)) is not first
    assert first.dtype == torch.float32  # bf16 is slow on most processors


def test_memory_is_freed_where_something_was_held(monkeypatch):
    freed = []
    monkeypatch.setattr(models, "free_memory", lambda: freed.append(True))
    loader = Loader(torch.device("cpu"))
    loader.let_go()
    assert loader.held("a", lambda: "model") == "model" and freed == []
    assert loader.held("b", lambda: "another") == "another" and freed == [True]
    loader.let_go()
    assert freed == [True, True]


def test_fingerprint_tells_a_checkpoint_trained_anew(checkpoint, model, tmp_path):
    loader, one = Loader(torch.device("cpu")), Checkpoint("x", str(tmp_path))
    model.save_pretrained(tmp_path)
    before = loader.fingerprint(one)
    assert loader.fingerprint(one) == before
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    assert loader.fingerprint(one) != before


def test_only_safetensors_and_no_remote_code_by_default():
    args = DCOConfig("out")
    assert prepare_model_args(ModelConfig(model_name_or_path="some/model"), args) == "some/model"
    assert args.model_init_kwargs["use_safetensors"] is True
    assert args.model_init_kwargs["trust_remote_code"] is False
