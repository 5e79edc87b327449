"""asft, psft and select in their trainer: the model beside the one that trains."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmmix import TokenLossConfig, TokenLossTrainer
from llmmix.token_losses.snapshot import FILE
from tests.token_losses.test_trainer import LORA, SETTINGS, finish, losses

ASFT = {"loss_type": "asft", "asft_alpha": 2.0}
PSFT = {"loss_type": "psft", "psft_snapshot_steps": 3, "psft_clip": [0.2, 0.001]}
SELECT = {"loss_type": "select", "select_share": 0.5}
ALL = [ASFT, PSFT, SELECT]
OWN = ("loss", "nll_per_token", "token_losses/weight", "token_losses/kl", "token_losses/clipped")


def by_name(runs):
    return [pytest.param(run, id=run["loss_type"]) for run in runs]


@pytest.fixture
def rows(math_rows):
    """Of uneven lengths."""
    return math_rows.select(range(16)).map(
        lambda row, i: {"completion": row["completion"] * (1 + i % 3)}, with_indices=True
    )


@pytest.fixture
def make(checkpoint, rows, tmp_path):
    def make(model=None, peft=None, data=None, folder="run", **given):
        return TokenLossTrainer(
            model or checkpoint,
            args=TokenLossConfig(str(tmp_path / folder), **{**SETTINGS, "seed": 3, **given}),
            train_dataset=data or rows,
            eval_dataset=data or rows,
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            peft_config=copy.deepcopy(peft),
        )

    return make


@pytest.fixture(scope="session")
def other_model(checkpoint, tmp_path_factory):
    """A narrower model with the same tokens."""
    folder = tmp_path_factory.mktemp("other")
    config = LlamaConfig.from_pretrained(checkpoint, hidden_size=16, num_key_value_heads=2)
    config.num_attention_heads, config.head_dim, config.intermediate_size = 2, 8, 32
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return str(folder)


def assert_same(run, other, rel=1e-5):
    for entry, expected in zip(run[0][:-1], other[0][:-1], strict=True):
        for name in (name for name in OWN if name in expected):
            assert entry[name] == pytest.approx(expected[name], rel=rel, abs=1e-6), name
    torch.testing.assert_close(run[1], other[1], rtol=rel, atol=1e-6)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_asft_is_dft_without_its_divergence_and_adds_it_with(make, peft):
    """The divergence is that of both models' own logits."""
    off = make(peft=peft, **{**ASFT, "asft_alpha": 0.0})
    assert off.reference is None
    assert_same(finish(off), finish(make(peft=peft, loss_type="dft")))
    trainer = make(peft=peft, learning_rate=0.5, **ASFT)
    before = copy.deepcopy(trainer.model).eval()
    if peft is not None:
        before = before.unload()
    log, _ = finish(trainer)
    assert log[0]["token_losses/kl"] == pytest.approx(0, abs=1e-6)
    assert log[2]["token_losses/kl"] > 1e-3
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    mask = batch["labels"][:, 1:] != -100
    trainer.model.eval()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        own, reference = (
            model(**inputs).logits[:, :-1][mask].log_softmax(-1)
            for model in (trainer.model, before)
        )
        expected = (reference.exp() * (reference - own)).sum(-1)
        needs, objective = trainer.reference.before(trainer.model, batch)
        output = trainer.model(**batch, fused_lm_head=True, head_objective=objective)
    torch.testing.assert_close(output.objective["kl"][mask], expected, rtol=1e-4, atol=1e-6)
    assert not needs and output.objective["kl"][~mask].eq(0).all()


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["body", "head"])
def test_an_adapter_switched_off_is_a_frozen_copy(make, checkpoint, saved):
    """With a head that is trained beside it, too."""
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    given = {"learning_rate": 0.5 if saved else 20.0, **ASFT}
    off = make(peft=peft, **given)
    assert off.reference._frozen.own is None
    torch.manual_seed(3)
    wrapped = get_peft_model(LlamaForCausalLM.from_pretrained(checkpoint), copy.deepcopy(peft))
    wrapped.load_state_dict(off.model.state_dict())
    copied = make(wrapped, **given)
    assert copied.reference._frozen.own is not None
    other, there = finish(copied), finish(make(reference_model=checkpoint, peft=peft, **given))
    run = finish(off)
    assert run[0][2]["token_losses/kl"] > 1e-4
    for found in (other, there):
        assert_same(run, found)


@pytest.mark.parametrize("settings", by_name(ALL))
def test_micro_batches_of_any_size_are_one(make, settings):
    given = {**settings, "learning_rate": 0.2, "max_steps": 4}
    split = finish(make(**given))
    for other in (
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"padding_free": True},
        {"gradient_checkpointing": True},
    ):
        assert_same(split, finish(make(**given, **other)))


@pytest.mark.parametrize("settings", by_name([ASFT, PSFT]))
def test_packed_rows_are_the_padded_ones(make, settings):
    """All rows in a step, in whatever order; the reference reads the packed row as the model."""
    given = {**settings, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    given |= {"learning_rate": 0.2, "max_length": 64}
    packed = make(packing=True, **given)
    assert len(packed.train_dataset) < 16
    assert_same(finish(packed), finish(make(**given)))


@pytest.mark.parametrize("settings", by_name([ASFT, PSFT]))
def test_a_resumed_run_has_the_reference_of_the_unbroken_one(make, settings):
    """Of full fine-tuning, whose model starts from the checkpoint; and between two snapshots."""
    given = {**settings, "learning_rate": 0.2, "max_steps": 5, "save_strategy": "steps"}
    given |= {"save_steps": 1}
    trainer = make(**given)
    unbroken = finish(trainer)
    for step in (2, 3):
        checkpoint = f"{trainer.args.output_dir}/checkpoint-{step}"
        resumed = make(folder=f"resumed-{step}", **given)
        resumed.train(resume_from_checkpoint=checkpoint)
        weights = torch.cat([p.detach().flatten() for p in resumed.model.parameters()])
        assert weights.equal(unbroken[1])
        assert losses(resumed.state.log_history) == losses(unbroken[0])


def test_a_checkpoint_that_lacks_its_snapshot_is_refused(make):
    trainer = make(loss_type="nll", save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-2"
    with pytest.raises(ValueError, match=f"holds no {FILE}.*step 2.*psft_snapshot_steps=3"):
        make(**PSFT).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_psft_of_one_step_a_snapshot_is_nll(make, checkpoint, peft, caplog):
    """To the last digit, dropout or not: it is off in both forwards."""
    noisy = copy.deepcopy(peft)
    if peft is not None:
        noisy.lora_dropout = 0.5
    model = LlamaForCausalLM.from_pretrained(checkpoint, attention_dropout=0.5)
    given = {"psft_snapshot_steps": 1, "loss_type": "psft"}
    trainer = make(model, peft=noisy, **given)
    log, weights = finish(trainer)
    assert "dropout is switched off" in caplog.text
    nll, expected = finish(make(peft=peft, loss_type="nll"))
    assert weights.equal(expected)
    for entry, other in zip(log[:-1], nll[:-1], strict=True):
        assert entry["loss"] == -1 and entry["token_losses/weight"] == 1
        assert entry["nll_per_token"] == other["nll_per_token"]


def test_psft_stops_what_has_risen_beyond_its_clip(make):
    log, _ = finish(make(**PSFT, max_steps=4, learning_rate=0.2))
    clipped = [entry["token_losses/clipped"] for entry in log[:-1]]
    assert clipped[0] == clipped[3] == 0 < clipped[1] < clipped[2] < 1


def test_select_of_all_tokens_is_nll(make, other_model):
    given = {"loss_type": "select", "select_share": 1.0, "reference_model": other_model}
    assert_same(finish(make(**given)), finish(make(loss_type="nll")))


def test_select_trains_on_the_tokens_that_another_model_finds_likelier(make, other_model):
    """The loss of the first step is the mean NLL of each row's highest scores."""
    trainer = make(**SELECT, reference_model=other_model, max_steps=1, per_device_eval_batch_size=3)
    loader = list(trainer.get_eval_dataloader())
    other = LlamaForCausalLM.from_pretrained(other_model).eval()
    kept = []
    for batch in loader:
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logps = [
                m.eval()(**inputs).logits[:, :-1].log_softmax(-1) for m in (other, trainer.model)
            ]
        reference, own = (x.gather(-1, labels.clamp(min=0).unsqueeze(-1))[..., 0] for x in logps)
        for row, mask in enumerate(labels != -100):
            score = (reference - own)[row][mask]
            best = score.topk(-(-len(score) // 2)).indices
            kept += (-own[row][mask][best]).tolist()
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    whole = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    trainer = make(**SELECT, reference_model=other_model, max_steps=1, **whole)
    log, _ = finish(trainer)
    assert log[0]["loss"] == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    tokens = sum(
        (row["labels"][1:] != -100).sum() for row in trainer.train_dataset.with_format("torch")
    )
    assert log[0]["token_losses/weight"] == pytest.approx(len(kept) / int(tokens))


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_select_keeps_all_while_the_model_is_its_own_reference(make, peft, caplog):
    """In warm-up the second step begins as the first did."""
    log, _ = finish(make(peft=peft, **SELECT, warmup_steps=2, max_steps=4))
    shares = [entry["token_losses/weight"] for entry in log[:-1]]
    assert shares[:2] == [1, 1] and all(0.5 <= share < 0.6 for share in shares[2:])
    nll, _ = finish(make(peft=peft, loss_type="nll", max_steps=1))
    assert log[0]["loss"] == nll[0]["loss"]
    assert caplog.text.count("the model still is its reference") == 1


@pytest.mark.parametrize("settings", by_name(ALL))
def test_a_batch_without_a_scored_token_is_an_exact_zero_with_a_gradient(make, settings):
    trainer = make(**settings)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(7))
    assert loss.item() == 0
    loss.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert gradients and all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("settings", by_name(ALL))
def test_model_and_reference_start_alike_under_bf16(make, settings):
    log, _ = finish(make(**settings, bf16=True, max_steps=2))
    first = log[0]
    assert first.get("token_losses/kl", 0) == pytest.approx(0, abs=1e-5)
    assert first.get("token_losses/clipped", 0) == 0
    if settings is not ASFT:
        assert first["token_losses/weight"] == 1


def test_a_reference_that_does_not_serve_is_refused(make, checkpoint, other_model, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="`reference_model`.*nowhere"):
        make(**ASFT, reference_model=nowhere)
    with pytest.raises(ValueError, match="`reference_model` is a setting of asft and select"):
        make(**PSFT, reference_model=checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other_model + "-tokens")
    LlamaForCausalLM.from_pretrained(other_model).save_pretrained(other_model + "-tokens")
    with pytest.raises(ValueError, match="has another vocabulary.*'<another>'"):
        make(**SELECT, reference_model=other_model + "-tokens")
    wider = LlamaForCausalLM.from_pretrained(other_model)
    wider.resize_token_embeddings(wider.config.vocab_size + 3)
    wider.save_pretrained(other_model + "-wider")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(other_model + "-wider")
    with pytest.raises(ValueError, match="rows and the model's has"):
        make(**ASFT, reference_model=other_model + "-wider")
    with pytest.raises(ValueError, match="virtual tokens of PromptTuningConfig"):
        make(**ASFT, peft=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        make(**PSFT, neftune_noise_alpha=1.0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"loss_type": "select", "select_share": 0.0}, "select_share"),
        ({"loss_type": "select", "select_share": 1.1}, "select_share"),
        ({"loss_type": "psft", "psft_clip": [0.2]}, "two numbers"),
        ({"loss_type": "psft", "psft_clip": [1.0, 0.2]}, "psft_clip"),
        ({"loss_type": "psft", "psft_clip": [0.2, -0.1]}, "psft_clip"),
        ({"loss_type": "psft", "psft_snapshot_steps": 0}, "psft_snapshot_steps"),
        ({"loss_type": "asft", "asft_alpha": -0.1}, "asft_alpha"),
        ({"loss_type": "nll", "asft_alpha": 0.1}, "asft_alpha"),
        ({"loss_type": "asft", "psft_clip": [0.1, 0.1]}, "psft_clip"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        TokenLossConfig("out", **given)
