"""Runs of the unlearning trainers that must be the same run."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM

from llmmix.unlearning.flat import flat_loss
from tests import uneven
from tests.unlearning import two_ranks as two_ranks_runs
from tests.unlearning.runs import (
    FORGET,
    ON_GPU,
    assert_same,
    by_path,
    finish,
    logged,
    logps_of,
    lora,
)

pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.mark.parametrize("name", by_path())
def test_accumulation_changes_nothing(plain_run, run, name):
    """Windows cross the end of an epoch: ten rows are windows of 4, 4 and 2."""
    parts = run(name, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same(plain_run(name), parts)
    assert (parts[0][:, 1] > 0).all()


@pytest.mark.parametrize("name", by_path(["flat-retain", "dpo", "kl", "npo-kl", "ceu", "rmu"]))
def test_padding_side_and_token_do_not_matter(plain_run, run, checkpoint, name):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert_same(plain_run(name), run(name, processing_class=tokenizer))


@pytest.mark.parametrize("name", by_path(["flat", "dpo", "npo-kl", "undial", "pdu", "rmu"]))
def test_gradient_checkpointing_changes_nothing(plain_run, run, name):
    assert_same(plain_run(name), run(name, gradient_checkpointing=True))


@pytest.mark.parametrize("name", [*by_path(), "npo-kl lora", "rmu lora"])
def test_without_padding_nothing_changes(plain_run, run, make, name):
    """In windows of two micro-batches too, and with gradient checkpointing."""
    method, _, adapter = name.partition(" ")
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    peft = lora() if adapter else None
    padded = run(method, peft=peft) if adapter else plain_run(method)
    trainer = make(method, peft=peft, padding_free=True, gradient_checkpointing=True, **given)
    rows = []  # of what the model reads at once
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(len(inputs[0]))
    )
    assert_same(padded, finish(trainer))
    assert 1 in rows


@pytest.mark.parametrize("name", by_path())
def test_lora_trains_the_adapter_alone(make, name):
    trainer = make(name, peft=lora(), learning_rate=1e-2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    steps, _ = finish(trainer)
    assert steps.isfinite().all() and len(steps) == 4
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)
    if getattr(trainer, "reference", None) is not None:
        assert trainer.reference.kind == "adapter"


RESUMED = {
    "flat": {"template_sft_steps": 2},
    "npo": {},
    "dpo": {},
    "pdu": {"dual_step": 0.5},
    "npo-kl lora": {},
    "rmu lora": {},
}


@pytest.mark.parametrize("name", by_path(RESUMED))
def test_resumed_is_never_stopped_to_the_last_digit(make, name, tmp_path):
    """Stopped in the middle of the second epoch, in windows of two micro-batches."""
    method, _, adapter = name.partition(" ")
    given = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 4,
        "peft": lora() if adapter else None,
        **RESUMED[name],
    }
    torch.manual_seed(0)
    whole = make(method, folder=tmp_path / "a", **given)
    steps, weights = finish(whole)
    torch.manual_seed(0)
    again = make(method, folder=tmp_path / "b", **given)
    resumed, same = finish(again, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert_same((steps, weights), (resumed, same), 0)
    if name == "pdu":
        multipliers = logged(whole, "unlearn/multiplier")
        assert len(set(multipliers)) == 7
        tolerance = ON_GPU if torch.cuda.is_available() else 0
        resumed = logged(again, "unlearn/multiplier")
        assert multipliers == pytest.approx(resumed, rel=tolerance, abs=0)
        assert multipliers[0] == 1.0


@pytest.mark.parametrize("name", by_path())
def test_a_finished_run_trains_no_step_more_until_it_is_given_more(make, name):
    """Finished in the middle of an epoch, where transformers trains one."""
    given = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    given["lr_scheduler_type"] = "constant"
    done = make(name, **given)
    steps, weights = finish(done)
    checkpoint = f"{done.args.output_dir}/checkpoint-2"
    again = make(name, **given)
    again.training_step = None  # a step would fail
    resumed, same = finish(again, resume_from_checkpoint=checkpoint)
    assert_same((steps, weights), (resumed, same), 0)
    longer = make(name, **{**given, "max_steps": 3})
    assert len(finish(longer, resume_from_checkpoint=checkpoint)[0]) == 3


def test_resumed_at_the_end_of_an_epoch(make, tmp_path):
    given = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    steps, weights = finish(make("dpo", folder=tmp_path / "a", **given))  # three steps an epoch
    again = make("dpo", folder=tmp_path / "b", **given)
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed, same = finish(again, resume_from_checkpoint=checkpoint)
    assert_same((steps, weights), (resumed, same), 0)


def test_training_twice_begins_anew(make):
    for name in ("flat", "pdu"):
        trainer = make(name)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        first = finish(trainer)
        trainer.model.load_state_dict(before)
        trainer.optimizer = trainer.lr_scheduler = None
        assert_same(first, finish(trainer), 0)


@pytest.mark.parametrize("name", by_path(["flat", "dpo", "grad_diff"]))
def test_loader_workers_change_nothing(plain_run, run, name):
    assert_same(plain_run(name), run(name, dataloader_num_workers=2), 1e-6)


@pytest.mark.parametrize(
    "name",
    by_path(["flat", "npo", "simnpo", "dpo", "kl", "undial", "ceu", "satimp", "rmu", "pdu"]),
)
def test_bf16_stays_near_fp32(plain_run, run, name):
    exact = plain_run(name)[0][:2]
    rough = run(name, max_steps=2, bf16=True, use_cpu=True)[0]
    assert rough.isfinite().all()
    scale = exact.abs().max(0).values
    assert ((exact - rough).abs() / scale).max() < 0.08


@pytest.mark.parametrize("name", two_ranks_runs.RUNS)
def test_two_processes_count_each_row_once(two_ranks, checkpoint, tmp_path, name):
    """Weights, and all that is logged in training and evaluation."""
    log, weights = torch.load(two_ranks / "unlearning/found.pt", weights_only=True)[name]
    one, weights_of_one = uneven.finish(two_ranks_runs.make(name, checkpoint, tmp_path, 1))
    assert list(uneven.differences(one, log)) == []
    torch.testing.assert_close(weights_of_one, weights, rtol=1e-5, atol=1e-6)


def test_templates_are_drawn_anew_or_not(make):
    drawn = {}
    for resample in (True, False):
        trainer = make("dpo", resample_templates=resample, max_steps=9)
        seen = drawn[resample] = []
        collate = trainer.data_collator

        def watch(items, seen=seen, collate=collate):
            batch = collate(items)
            seen += zip(batch["row"].tolist(), batch["template_number"].tolist(), strict=True)
            return batch

        trainer.data_collator = watch
        trainer.train()
    assert len(drawn[True]) == len(drawn[False]) == 30  # three epochs, each row once
    assert {row for row, _ in drawn[True][:10]} == set(range(10))
    assert len(set(drawn[False])) == 10 and len(set(drawn[True])) > 20
    assert [row for row, _ in drawn[True]] == [row for row, _ in drawn[False]]


@pytest.mark.parametrize("name", by_path())
def test_evaluation_rows_have_their_loss(make, name):
    """Without a step, on the training rows, it is the loss of a step over all of them."""
    given = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 10}
    if name == "pdu":  # else the multiplier has moved
        given["dual_warmup_epochs"] = 5.0
    trainer = make(name, eval_dataset=FORGET, eval_strategy="steps", eval_steps=1, **given)
    trainer.args.per_device_eval_batch_size = 10
    trainer.train()
    first = trainer.state.log_history[0]
    found = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert found["eval_loss"] == pytest.approx(first["loss"], rel=1e-3, abs=1e-5)
    prefix = "flat" if name.startswith("flat") else "unlearn"
    assert any(key.startswith(f"eval_{prefix}/") for key in found), found


def test_evaluation_of_flat_is_a_mean_over_rows_and_leaves_training_as_it_was(make, model, run):
    given = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = make("flat", eval_dataset={"a": FORGET, "b": FORGET.select([0])}, **given)
    assert_same(finish(trainer), run("flat"), 0)
    trainer.model.eval()
    rows = trainer.eval_dataset["a"]
    probs = [
        [logps_of(trainer.model, rows[row][part]).exp().mean() for row in range(10)]
        for part in ("template", "forget")
    ]
    expected = flat_loss(*(torch.stack(p) for p in probs)).mean().item()
    last = [entry for entry in trainer.state.log_history if "eval_a_loss" in entry][-1]
    assert last["eval_a_loss"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert logged(trainer, "eval_b_loss")


def test_text_and_prompts_are_forgotten_and_retained_too(make):
    text = Dataset.from_dict({"text": ["1+1=2 " * 20, "the second text", "the third"]})
    pairs = Dataset.from_dict({"prompt": ["2*2=", "3*2="], "completion": ["4", "6"]})
    for name in ("npo", "kl", "rmu"):
        trainer = make(name, rows=text, retain=pairs, max_length=24, max_steps=2)
        assert finish(trainer)[0].isfinite().all()
        assert len(trainer.train_dataset) > 3
    trainer = make("flat", rows=pairs, max_steps=2)
    assert finish(trainer)[0].isfinite().all()


def test_saved_model_is_a_plain_checkpoint(make, tmp_path):
    for name in ("npo", "rmu"):
        trainer = make(name, max_steps=1)
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / name)
        for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(a, b.cpu())
