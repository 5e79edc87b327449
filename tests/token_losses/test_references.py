"""asft, psft and select in their trainer: the model beside the one that trains."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmmix import TokenLossConfig, TokenLossTrainer
from llmmix.token_losses.references import token_reference
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
def test_asft_is_dft_without_its_divergence_and_adds_it_with(make, checkpoint, peft):
    """The divergence is that of both models' own logits."""
    off = make(peft=peft, **{**ASFT, "asft_alpha": 0.0})
    assert off.reference is None
    assert_same(finish(off), finish(make(peft=peft, loss_type="dft")))
    trainer = make(peft=peft, learning_rate=20.0 if peft else 0.5, **ASFT)
    log, _ = finish(trainer)
    before = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    assert log[0]["token_losses/kl"] == pytest.approx(0, abs=1e-6)
    assert log[2]["token_losses/kl"] > 1e-3
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    labels = batch["labels"][:, 1:]
    mask, model = labels != -100, trainer.model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own, reference = (one(**inputs).logits[:, :-1][mask].log_softmax(-1) for one in (model, before))
    reference = reference.detach()
    expected = (reference.exp() * (reference - own)).sum(-1)
    log_probs = own.gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1)
    dense = (2.0 * expected - log_probs.detach().exp() * log_probs).sum() / 7
    trained = [p for p in model.parameters() if p.requires_grad]
    needs, objective = trainer.reference.before(model, dict(batch))
    output = model(**batch, fused_lm_head=True, head_objective=objective)
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(7))
    torch.testing.assert_close(output.objective["kl"][mask], expected, rtol=1e-4, atol=1e-6)
    assert not needs and output.objective["kl"][~mask].eq(0).all()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-5)
    gradients = (torch.autograd.grad(x, trained) for x in (loss, dense))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_adapter_switched_off_is_a_frozen_copy(make, checkpoint):
    """With a head that is trained beside it, of which the reference has the first."""
    saved = ["lm_head"]
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    given = {"learning_rate": 20.0, **ASFT}
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
def test_a_step_is_the_same_in_micro_batches_of_any_size_without_padding(
    make, other_model, settings
):
    given = {**settings, "learning_rate": 0.2, "max_steps": 4}
    if settings is not PSFT:
        given["reference_model"] = other_model
    other = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    other |= {"padding_free": True, "gradient_checkpointing": True}
    assert_same(finish(make(**given)), finish(make(**given, **other)))


@pytest.mark.parametrize("settings", by_name(ALL))
def test_a_first_token_behind_padding_is_scored_by_neither_model(make, settings):
    """Rows of text that are padded on the left, run without the padding."""
    trainer = make(**settings, padding_free=True)
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    kept = torch.arange(9) >= torch.tensor([[0], [4]])
    batch = {
        "input_ids": ids,
        "attention_mask": kept.long(),
        "labels": ids.masked_fill(~kept, -100),
    }
    first = {**batch, "labels": batch["labels"].clone()}
    first["labels"][1, 4] = -100
    found = [
        trainer.compute_loss(trainer.model, given, num_items_in_batch=torch.tensor(7))
        for given in (batch, first)
    ]
    assert found[0] == found[1]


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
    given = {**settings, "learning_rate": 0.2, "max_steps": 4, "save_strategy": "steps"}
    given |= {"save_steps": 1}
    trainer = make(**given)
    unbroken = finish(trainer)
    folder = Path(trainer.args.output_dir)
    assert [(folder / f"checkpoint-{step}" / FILE).exists() for step in (2, 3)] == [
        settings is PSFT,
        False,  # the step after it renews the snapshot
    ]
    resumed = make(folder="resumed", **given)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    weights = torch.cat([p.detach().flatten() for p in resumed.model.parameters()])
    assert weights.equal(unbroken[1])
    assert losses(resumed.state.log_history) == losses(unbroken[0])


def test_a_checkpoint_that_lacks_its_snapshot_is_refused(make, tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}', encoding="utf-8")
    with pytest.raises(ValueError, match=f"holds no {FILE}.*step 2.*psft_snapshot_steps=3"):
        make(**PSFT).train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        make(**PSFT).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


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


@pytest.mark.parametrize("settings", by_name(ALL))
def test_a_row_of_weight_0_is_not_there_and_a_weight_scales_the_rest(
    make, rows, other_model, settings
):
    """A step of four rows: the reference and the number selected are those of the others."""
    given = {**settings, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    if settings is SELECT:
        given["reference_model"] = other_model
    data = rows.select(range(4)).remove_columns("confidence")
    weighted = data.add_column("weight", [2.0, 0.0, 2.0, 2.0])
    found, expected = (
        finish(make(data=x, **given, learning_rate=rate, max_steps=1))
        for x, rate in ((weighted, 0.05), (data.select([0, 2, 3]), 0.1))
    )
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


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
    log, _ = finish(make(**settings, bf16=True, max_steps=1))
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
    ("settings", "what"),
    [
        (PSFT, "psft's snapshot"),
        (ASFT, "the copy of the model"),
        ({**SELECT, "reference_model": "builtin:tiny"}, "`reference_model='builtin:tiny'`"),
    ],
    ids=["psft", "asft", "select"],
)
def test_a_model_that_is_spread_out_has_no_copy_beside_it(make, settings, what):
    """An adapter is switched off instead, which is there whatever is spread."""
    trainer = make(loss_type="nll")
    for name, value in TokenLossConfig("out", **settings).to_dict().items():
        if name in ("loss_type", "reference_model", *settings):
            setattr(trainer.args, name, value)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=f"{what}.*FSDP and DeepSpeed.*use_peft"):
        token_reference(trainer)
    if settings is ASFT:
        assert token_reference(trainer, LORA)._frozen.own is None
