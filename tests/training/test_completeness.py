"""Which checkpoints are complete: every file of one is taken away, emptied and cut."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from llmmix import DCOConfig, DCOTrainer
from llmmix.training.completeness import checkpoints_of, complete_checkpoints, why_incomplete
from tests.test_invariants import SETTINGS

# Absent, the run goes on to the same digits
NOT_NEEDED = {
    *("chat_template.jinja", "config.json", "generation_config.json", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "training_args.bin"),
}


@pytest.fixture(scope="module", params=["full", "lora"])
def saved(request, checkpoint, math_rows, tmp_path_factory):
    """The checkpoint of a run's second step."""
    folder = tmp_path_factory.mktemp(request.param)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = DCOTrainer(
        checkpoint,
        DCOConfig(str(folder), **(SETTINGS | {"max_steps": 2, "save_strategy": "steps"})),
        train_dataset=math_rows,
        peft_config=lora if request.param == "lora" else None,
    )
    trainer.train()
    return folder / "checkpoint-2"


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint-2")


def test_every_file_that_is_needed_and_no_other(saved, tmp_path):
    assert why_incomplete(saved) is None
    weights = [path.name for path in saved.glob("*model.safetensors")]
    adapter = ["adapter_config.json"] if weights == ["adapter_model.safetensors"] else []
    needed = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    needed |= {*weights, *adapter}
    assert needed <= {path.name for path in saved.iterdir()} <= needed | NOT_NEEDED
    for name in needed:
        copy = shutil.copytree(saved, tmp_path / name / "checkpoint-2")
        (copy / name).unlink()
        fault = why_incomplete(copy)
        assert fault and ("weights" in fault if name in weights else name.split(".")[0] in fault)


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(share, saved, tmp_path):
    for path in saved.iterdir():
        if path.suffix in (".jinja", ".md"):
            continue
        copy = shutil.copytree(saved, tmp_path / path.name / "checkpoint-2")
        os.truncate(copy / path.name, int(path.stat().st_size * share))
        expected = "is empty" if share == 0 else "is not whole"
        assert why_incomplete(copy) == (
            f"it has no {path.name}" if not path.stat().st_size else f"{path.name} {expected}"
        )


def test_what_a_kill_while_saving_leaves(copied):
    (copied / "optimizer.pt").unlink()
    (copied / "trainer_state.json").unlink()
    assert why_incomplete(copied) == "it has no trainer_state.json, which is written last"
    assert why_incomplete(copied / "no") == "there is no such folder"


def test_the_step_is_that_of_the_name(copied):
    moved = copied.rename(copied.with_name("checkpoint-12"))
    assert why_incomplete(moved) == "its trainer_state.json is of step 2"
    assert why_incomplete(moved.rename(moved.with_name("best"))) is None  # a name of the user's
    (copied.with_name("best") / "trainer_state.json").write_text("[]")
    named = copied.with_name("best").rename(copied)
    assert why_incomplete(named) == "its trainer_state.json is of step None"


def test_a_model_alone_cannot_be_resumed(copied):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (copied / name).unlink()
    assert why_incomplete(copied) == "it holds the model alone (`save_only_model`)"


def test_every_shard_is_there(copied):
    weights = next(copied.glob("*model.safetensors"))
    weights.unlink()
    for shard in ("a", "b"):
        save_file({shard: torch.zeros(4)}, copied / f"model-{shard}.safetensors")
    index = {"weight_map": {"a": "model-a.safetensors", "b": "model-b.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    for adapter in copied.glob("adapter_*"):
        adapter.unlink()
    assert why_incomplete(copied) is None
    (copied / "model-b.safetensors").unlink()
    absent = "model.safetensors.index.json names model-b.safetensors, which is missing"
    assert why_incomplete(copied) == absent


def test_the_random_state_of_each_rank(copied):
    state = (copied / "rng_state.pth").rename(copied / "rng_state_0.pth")
    for rank in (1, 10):
        shutil.copy(state, copied / f"rng_state_{rank}.pth")
    assert why_incomplete(copied) == "it has no random state of rank 2"
    (copied / "rng_state_10.pth").unlink()
    assert why_incomplete(copied) is None
    os.truncate(copied / "rng_state_1.pth", 100)
    assert why_incomplete(copied) == "rng_state_1.pth is not whole"


def test_shards_of_fsdp(copied):
    for path in (*copied.glob("*model.safetensors"), copied / "optimizer.pt"):
        path.unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (copied / name).mkdir()
        (copied / name / "__0_0.distcp").write_bytes(b"shard")
    assert why_incomplete(copied) == "pytorch_model_fsdp_0 has no .metadata, which is written last"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (copied / name / ".metadata").write_bytes(b"what is where")
    assert why_incomplete(copied) is None
    os.truncate(copied / "optimizer_0/__0_0.distcp", 0)
    assert why_incomplete(copied) == "optimizer_0/__0_0.distcp is empty"


def test_deepspeed(copied):
    for name in (*(path.name for path in copied.glob("*model.safetensors")), "optimizer.pt"):
        (copied / name).unlink()
    (copied / "scheduler.pt").unlink()  # DeepSpeed's own may be beside the optimizer
    (copied / "latest").write_text("global_step2")
    assert why_incomplete(copied) == "latest names global_step2, which holds no model states"
    (copied / "global_step2").mkdir()
    state = copied / "global_step2/mp_rank_00_model_states.pt"
    torch.save({"module": {}}, state)
    assert why_incomplete(copied) is None
    os.truncate(state, 50)
    assert why_incomplete(copied) == "global_step2/mp_rank_00_model_states.pt is not whole"


def test_a_file_in_torchs_old_format_is_taken_as_it_is(copied):
    torch.save({}, copied / "optimizer.pt", _use_new_zipfile_serialization=False)
    assert why_incomplete(copied) is None


def test_in_the_order_of_their_steps(copied):
    for step in (10, 9):
        again = shutil.copytree(copied, copied.with_name(f"checkpoint-{step}"))
        state = json.loads((again / "trainer_state.json").read_text())
        (again / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    copied.with_name("checkpoint-11").mkdir()
    copied.with_name("checkpoint-best").mkdir()
    copied.with_name("checkpoint-12").write_text("no folder")
    names = [path.name for path in checkpoints_of(copied.parent)]
    assert names == ["checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert [path.name for path in complete_checkpoints(copied.parent)] == names[:3]
