"""Which checkpoint a run goes on from, and that a finished run goes nowhere."""

import errno
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from llmmix import DCOConfig, cli
from llmmix.training.resuming import checkpoint_to_resume, newest_checkpoint, stage_to_resume
from tests.test_filtering import chain_of_thought, make
from tests.test_invariants import METHODS, run

__all__ = ["make", "run"]  # fixtures

QUIET = {"bf16": False, "use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def trained(checkpoint, math_rows, tmp_path_factory):
    """A run of three steps, each saved."""
    folder = tmp_path_factory.mktemp("trained")
    math_rows.remove_columns("confidence").to_json(folder / "rows.jsonl")
    assert cli.main(command(checkpoint, folder / "rows.jsonl", folder / "out")) == 0
    return folder


@pytest.fixture
def out(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path / "out"


def command(checkpoint, rows, out, *flags):
    argv = ["run", "dco", "--model_name_or_path", checkpoint, "--dataset_name", str(rows)]
    argv += ["--output_dir", str(out), "--max_steps", "3", "--save_steps", "1"]
    return [*argv, "--logging_steps", "1", "--disable_tqdm", "true", *flags]


def asked(folder, given=None, **options):
    return DCOConfig(str(folder), resume_from_checkpoint=given, **QUIET, **options)


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.WARNING, "llmmix")
    return caplog


def goes_on_from(checkpoint, step):
    return f"The run goes on from {checkpoint}, saved at step {step} of 3."


@pytest.mark.parametrize("given", ["auto", "true", "True", True])
def test_the_newest_one_that_is_complete(given, out, warned):
    assert checkpoint_to_resume(asked(out, given)) == str(out / "checkpoint-3")
    assert warned.messages == [goes_on_from(out / "checkpoint-3", 3)]
    warned.clear()
    (out / "checkpoint-3/trainer_state.json").unlink()
    (out / "checkpoint-2/optimizer.pt").write_bytes(b"PK cut")
    assert checkpoint_to_resume(asked(out, given)) == str(out / "checkpoint-1")
    (said,) = warned.messages
    assert "checkpoint-3 (it has no trainer_state.json, which is written last)" in said
    assert "checkpoint-2 (optimizer.pt is not whole)" in said
    assert said.endswith(goes_on_from(out / "checkpoint-1", 1))


def test_an_old_one_that_is_damaged_is_no_matter(out, warned):
    (out / "checkpoint-1/trainer_state.json").unlink()
    assert checkpoint_to_resume(asked(out, "auto")) == str(out / "checkpoint-3")
    assert warned.messages == [goes_on_from(out / "checkpoint-3", 3)]


def test_with_none_auto_starts_and_true_says_so(out, warned):
    for folder in (out / "nowhere", out):
        shutil.rmtree(out / "checkpoint-1", ignore_errors=True)
        shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
        (out / "checkpoint-3/model.safetensors").unlink(missing_ok=True)
        assert checkpoint_to_resume(asked(folder, "auto")) is None
        with pytest.raises(ValueError, match="holds no complete checkpoint. Give `auto`"):
            checkpoint_to_resume(asked(folder, "true"))
    assert "checkpoint-3 (it has no weights). The run starts from nothing." in warned.messages[0]


def test_true_goes_on_where_an_earlier_stage_has_one(out):
    (out / "proxy").mkdir()
    for step in (1, 2, 3):
        shutil.move(out / f"checkpoint-{step}", out / "proxy")
    assert checkpoint_to_resume(asked(out, "true"), ["reference", "proxy"]) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint_to_resume(asked(out, "true"), ["reference"])
    for given in ("true", "auto", "checkpoint-7"):
        newest = stage_to_resume(asked(out / "proxy", given))
        assert newest == str(out / "proxy/checkpoint-3")
        assert stage_to_resume(asked(out / "reference", given)) is None
    assert stage_to_resume(asked(out / "proxy")) is None


def test_a_folder_is_taken_if_it_is_complete(out, tmp_path):
    given = str(out / "checkpoint-2")
    assert checkpoint_to_resume(asked(tmp_path / "elsewhere", given)) == given
    (out / "checkpoint-2/scheduler.pt").unlink()
    with pytest.raises(ValueError) as error:
        checkpoint_to_resume(asked(out, given))
    assert "checkpoint-2 cannot be resumed: it has no scheduler.pt." in str(error.value)
    assert f"{out / 'checkpoint-3'} is the newest complete one" in str(error.value)
    with pytest.raises(ValueError, match="there is no such folder. None there is complete"):
        checkpoint_to_resume(asked(out, str(out / "figures" / "checkpoint-2")))


@pytest.mark.parametrize("given", [None, "false", "False"])
def test_a_run_that_starts_among_checkpoints_says_so(given, out, warned, tmp_path):
    assert checkpoint_to_resume(asked(tmp_path / "empty", given)) is None
    assert not warned.messages
    assert checkpoint_to_resume(asked(out, given)) is None
    (said,) = warned.messages
    assert f"{out} holds checkpoints up to checkpoint-3, and this run starts from nothing" in said
    assert "auto" in said


def test_a_limit_of_checkpoints_deletes_no_good_ones_for_a_half_saved_one(
    out, trained, checkpoint, warned
):
    """Transformers keeps the folder of the highest step, and would delete all that come before."""
    (out / "checkpoint-3").rename(out / "checkpoint-9")
    (out / "checkpoint-9/trainer_state.json").unlink()
    (out / "checkpoint-2").rename(out / "checkpoint-8")  # damaged, but somebody's
    limit = ["--save_total_limit", "2", "--resume_from_checkpoint", "auto"]
    assert cli.main(command(checkpoint, trained / "rows.jsonl", out, *limit)) == 0
    assert not (out / "checkpoint-9").exists()
    assert newest_checkpoint(out) == str(out / "checkpoint-3")


# A command is killed, and given again


def test_one_command_begins_and_goes_on_after_a_full_disk(
    trained, checkpoint, tmp_path, monkeypatch, warned
):
    def save(content, path, **options):
        if Path(path).parent.name == "checkpoint-2":
            Path(path).write_bytes(b"PK, and no more")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(content, path, **options)

    argv = command(checkpoint, trained / "rows.jsonl", tmp_path / "out")
    argv += ["--resume_from_checkpoint", "auto"]
    saved = torch.save
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        cli.main(argv)
    monkeypatch.undo()
    assert cli.main(argv) == 0
    assert f"goes on from {tmp_path / 'out/checkpoint-1'}" in warned.text
    same = (tmp_path / "out/model.safetensors", trained / "out/model.safetensors")
    assert same[0].read_bytes() == same[1].read_bytes()
    log = (tmp_path / "out/trainer_state.json", trained / "out/trainer_state.json")
    steps = [[e["step"] for e in json.loads(path.read_text())["log_history"]] for path in log]
    assert steps[0] == steps[1] == [1, 2, 3, 3]  # the last is the summary


def test_true_says_so_before_the_reference_of_sftmix(trained, checkpoint, tmp_path, capsys):
    argv = command(checkpoint, trained / "rows.jsonl", tmp_path / "out")
    argv[1] = "sftmix"
    assert cli.main([*argv, "--resume_from_checkpoint", "true"]) == 2
    assert "Give `auto`" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("reference-*"))


# A finished run

FEW = {"max_steps": 2, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}


def take_no_step(trainer):
    trainer.training_step = None  # a step would fail
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_run_trains_no_step_more_until_it_is_given_more(run, name, tmp_path):
    """Finished in the middle of an epoch, where transformers trains one."""
    trainer, config, given = METHODS[name]
    given = {**FEW, **given, "output_dir": str(tmp_path / "out")}
    done = run(trainer, config, **given)
    checkpoint = str(tmp_path / "out/checkpoint-2")
    same = run(trainer, config, resume=checkpoint, prepare=take_no_step, **given)
    assert torch.equal(same[0], done[0]) and torch.equal(same[1], done[1])
    longer = run(trainer, config, resume=checkpoint, **{**given, "max_steps": 3})
    assert len(longer[0]) == 3


def test_a_finished_run_that_filters_and_samples_does_so_no_more(make, tmp_path):
    done = chain_of_thought(make("out", **FEW))
    done.train()
    again = take_no_step(chain_of_thought(make("out", **FEW)))
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert again.state.global_step == 2
    for one, other in zip(done.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    longer = chain_of_thought(make("out", **{**FEW, "max_steps": 3}))
    longer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert longer.state.global_step == 3


def test_a_resumed_run_counts_on_its_tokens(run, tmp_path):
    """TRL would count from 0."""
    trainer, config, given = METHODS["dco"]
    folder, counts = str(tmp_path / "out"), []

    def log(trainer):
        trainer.add_callback(Log(counts))

    run(trainer, config, **{**FEW, **given, "output_dir": folder, "max_steps": 3}, prepare=log)
    whole = counts.copy()
    counts.clear()
    given = {**FEW, **given, "output_dir": folder, "max_steps": 3}
    run(trainer, config, resume=f"{folder}/checkpoint-2", prepare=log, **given)
    assert len(whole) == 3 and counts == whole[2:]


class Log(TrainerCallback):
    def __init__(self, counts):
        self.counts = counts

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.counts += [logs["num_tokens"]] if "num_tokens" in logs else []
