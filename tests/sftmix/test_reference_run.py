import shutil
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig

from llmmix.sftmix import reference_run
from llmmix.sftmix.reference_run import train_reference
from llmmix.sftmix.scoring import mean_nlls

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_reference_keeps_its_checkpoints_and_is_trained_once(
    checkpoint, rows, args, lora, monkeypatch
):
    kept = train_reference(rows, args, checkpoint, 2, lora)
    assert [path.rpartition("-")[2] for path in kept] == ["2", "4"]
    assert not np.allclose(mean_nlls(rows, args, kept[0]), mean_nlls(rows, args, kept[1]))
    monkeypatch.setattr(reference_run, "SFTMixTrainer", None)  # training again would fail
    assert train_reference(rows, args, checkpoint, 2, lora) == kept


@pytest.mark.parametrize("half_saved", [False, True])
def test_interrupted_reference_goes_on_from_its_checkpoint(
    half_saved, checkpoint, rows, args, monkeypatch
):
    """From its last complete one, even where the main run saves the model alone."""

    class Killed(reference_run.SFTMixTrainer):
        def training_step(self, *given, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*given, **kwargs)

    args.save_only_model = True
    whole = train_reference(rows, args, checkpoint, 2)
    expected = mean_nlls(rows, args, whole[-1])
    shutil.rmtree(args.output_dir)
    monkeypatch.setattr(reference_run, "SFTMixTrainer", Killed)
    with pytest.raises(KeyboardInterrupt):
        train_reference(rows, args, checkpoint, 2)
    if half_saved:
        (Path(whole[0]) / "trainer_state.json").unlink()
    monkeypatch.undo()
    steps = []

    class Counted(reference_run.SFTMixTrainer):
        def training_step(self, *given, **kwargs):
            steps.append(self.state.global_step)
            return super().training_step(*given, **kwargs)

    monkeypatch.setattr(reference_run, "SFTMixTrainer", Counted)
    kept = train_reference(rows, args, checkpoint, 2)
    assert steps == ([0, 1, 2, 3] if half_saved else [2, 3])
    assert kept == whole
    np.testing.assert_array_equal(mean_nlls(rows, args, kept[-1]), expected)


def test_no_checkpoint_is_refused(checkpoint, rows, args):
    with pytest.raises(ValueError, match="`num_checkpoints` must be at least 1"):
        train_reference(rows, args, checkpoint, 0)


def test_half_a_list_of_checkpoints_counts_as_none(checkpoint, rows, args, caplog):
    kept = train_reference(rows, args, checkpoint, 2)
    (finished,) = Path(args.output_dir).glob("reference-*/finished.json")
    whole = finished.read_text()
    for length in (0, len(whole) // 2, len(whole) - 1):
        finished.write_text(whole[:length])
        assert train_reference(rows, args, checkpoint, 2) == kept
        assert finished.read_text() == whole
    assert f"{finished} is not whole and counts as absent" in caplog.text
