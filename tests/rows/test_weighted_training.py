"""Weights from the data in the trainers that take them: one meaning in each."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from llmmix import (
    DCOConfig,
    DCOTrainer,
    MixtureSampler,
    SFTMixConfig,
    SFTMixTrainer,
    TokenLossConfig,
    TokenLossTrainer,
    attach_mixture,
    attach_weights,
)
from llmmix.filtering import LikelihoodFilter
from llmmix.mixing.rows import label_domains
from tests.token_losses.test_trainer import SETTINGS, finish

TRAINERS = {
    "dco": (DCOTrainer, DCOConfig, {"n_samples": 4}),
    "dco mean": (DCOTrainer, DCOConfig, {"n_samples": 4, "reduction": "token_mean"}),
    "sftmix": (SFTMixTrainer, SFTMixConfig, {"mixup_weight": 0.5, "dco_n_samples": 4}),
    "nll": (TokenLossTrainer, TokenLossConfig, {}),
    "gce": (TokenLossTrainer, TokenLossConfig, {"loss_type": "gce"}),
}
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
SOME = [1.0, 0.5, 2.0, 0.25, 1.0, 3.0, 0.75, 1.5]


@pytest.fixture
def rows(math_rows):
    """Eight rows of uneven lengths."""
    return math_rows.select(range(8)).map(
        lambda row, i: {"completion": row["completion"] * (1 + i % 3)}, with_indices=True
    )


def with_weights(rows, weights):
    return rows.add_column("weight", weights)


@pytest.fixture
def make(checkpoint, tmp_path):
    def make(name, data, lora=False, evaluated=None, **given):
        trainer_type, config, own = TRAINERS[name]
        torch.manual_seed(0)
        return trainer_type(
            checkpoint,
            args=config(str(tmp_path), **{**SETTINGS, "max_steps": 2, **own, **given}),
            train_dataset=data,
            eval_dataset=evaluated,
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            peft_config=LORA if lora else None,
        )

    return make


def batch_of(trainer, *rows):
    """Training rows as one batch; all of them by default."""
    columns = ("input_ids", "labels", "weight", "token_weights")
    found = [trainer.train_dataset[row] for row in rows or range(len(trainer.train_dataset))]
    return trainer.data_collator([{k: row[k] for k in columns if k in row} for row in found])


def loss_and_gradient(trainer, batch, **weights):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._micro_step = 0  # of SFTMix, whose draws are by the place in a step
    loss = trainer.compute_loss(trainer.model, {**batch, **weights})
    loss.backward()
    gradient = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradient)


@pytest.mark.parametrize("name", ["dco", "sftmix", "nll"])
def test_a_row_of_weight_0_is_as_if_it_were_not_there(make, rows, name):
    """Log and weights; what is drawn is drawn of the rows that are left."""
    weights = [w if row % 4 else 0.0 for row, w in enumerate(SOME)]
    weighted = with_weights(rows, weights)
    absent = weighted.select([row for row, w in enumerate(weights) if w])
    log, parameters = finish(make(name, weighted))
    other, others = finish(make(name, absent))
    assert log == other and torch.equal(parameters, others)
    assert 0 < log[0]["weight/mean"] != 1


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, {}) for name in TRAINERS] + [("nll", {"lora": True, "padding_free": True})],
    ids=[*TRAINERS, "nll lora without padding"],
)
def test_weights_scale_the_gradient_and_ones_change_nothing(make, rows, name, given):
    trainer = make(name, with_weights(rows, SOME), **given)
    batch = batch_of(trainer)
    some = batch.pop("weight")
    plain = loss_and_gradient(trainer, batch)
    ones = loss_and_gradient(trainer, batch, weight=torch.ones(8))
    assert plain[0] == ones[0] and torch.equal(plain[1], ones[1])
    part = loss_and_gradient(trainer, batch, weight=some)
    more = loss_and_gradient(trainer, batch, weight=3 * some)
    assert more[0] == pytest.approx(3 * part[0], rel=1e-5)
    torch.testing.assert_close(more[1], 3 * part[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(part[1], plain[1], rtol=0.1)
    tokens = some.unsqueeze(1).expand(batch["labels"].shape)
    if not name.startswith("dco"):  # which reads weights of rows alone
        by_token = loss_and_gradient(trainer, batch, token_weights=tokens)
        assert by_token[0] == part[0] and torch.equal(by_token[1], part[1])


@pytest.mark.parametrize("name", ["dco", "nll"])
def test_weights_are_outside_of_the_loss_of_a_row_and_not_in_the_divisor(make, rows, name):
    """The count is of rows for DCO and of tokens for a token loss: twice is twice but for it."""
    trainer = make(name, with_weights(rows, SOME))
    plain = [{k: v for k, v in batch_of(trainer, row).items() if k != "weight"} for row in range(8)]
    counts = [1 if name == "dco" else int((b["labels"][:, 1:] != -100).sum()) for b in plain]
    each = [loss_and_gradient(trainer, batch) for batch in plain]
    pairs = list(zip(SOME, counts, each, strict=True))
    loss, gradient = loss_and_gradient(trainer, batch_of(trainer))
    expected = sum(w * n * of_row for w, n, (of_row, _) in pairs) / sum(counts)
    assert loss == pytest.approx(expected, rel=1e-5)
    expected = sum(w * n * of_row for w, n, (_, of_row) in pairs) / sum(counts)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    if name == "nll":
        return
    # The weights of `attach_weights` stand in the place of F, and these multiply them
    attach_weights(trainer, lambda numbers: torch.full((len(numbers),), 2.0))
    batch = batch_of(trainer) | {"row_weights": torch.full((8,), 2.0)}
    nll = -trainer.model(**plain[0], fused_lm_head=True).log_probs.sum().item()
    batch = {k: v[:1] for k, v in batch.items()} | {"weight": torch.tensor([0.5])}
    assert loss_and_gradient(trainer, batch)[0] == pytest.approx(2 * 0.5 * nll, rel=1e-5)


CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "It is 6."},
]


def chats(weights, confidence=True):
    rows = []
    for row, weight in enumerate(weights):
        messages = [dict(said) for said in CHAT]
        if weight is not None:
            messages[1]["weight"] = weight
        rows.append({"messages": messages, "confidence": row / 4})
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("name", "cuts"), [("sftmix", ["keep_end"]), ("nll", ["keep_start", "keep_end"])]
)
def test_weights_of_turns_train_as_weights_of_their_tokens(make, name, cuts):
    """Through all of TRL's preparation, cut at either end; in whole batches and in parts."""
    found = {}
    for cut in cuts:
        given = {"max_length": 35, "truncation_mode": cut, "assistant_only_loss": True}
        by_turn = make(name, chats([0.5, 2, None, 0.25]), **given)
        turns = [row["token_weights"] for row in by_turn.train_dataset]
        assert {len(row) for row in turns} == {38}  # of a chat: three tokens are cut
        batch = next(iter(by_turn.get_train_dataloader()))
        assert batch["labels"].shape == batch["token_weights"].shape == (4, 35)
        found[cut] = finish(by_turn)
        rows = [
            {key: row[key] for key in ("input_ids", "labels", "confidence")}
            | {"token_weights": weights[:35] if cut == "keep_start" else weights[-35:]}
            for row, weights in zip(by_turn.train_dataset, turns, strict=True)
        ]
        by_token = finish(make(name, Dataset.from_list(rows)))
        assert by_token[0] == found[cut][0] and torch.equal(by_token[1], found[cut][1])
    assert len({entry[0][0]["loss"] for entry in found.values()}) == len(cuts)


def test_a_step_in_micro_batches_and_a_resumed_run(make, rows):
    data = with_weights(rows, SOME)
    whole = make("nll", data, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    kept = {"save_strategy": "steps", "save_steps": 1}
    parts = make("nll", data, per_device_train_batch_size=2, gradient_accumulation_steps=4, **kept)
    (_, one), (_, other) = finish(whole), finish(parts)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    resumed = make("nll", data, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    resumed.train(resume_from_checkpoint=f"{parts.args.output_dir}/checkpoint-1")
    assert torch.equal(torch.cat([p.flatten() for p in resumed.model.parameters()]), other)


def test_an_evaluation_is_weighted_where_its_rows_are(make, rows):
    weighted = with_weights(rows, SOME)
    trainer = make("nll", rows, evaluated={"plain": rows, "weighted": weighted})
    losses = trainer.evaluate()
    plain, found = trainer.state.log_history
    assert "eval_weight/mean" not in plain and found["eval_weight/mean"] > 0
    total = tokens = 0.0
    for row in trainer.eval_dataset["weighted"]:
        batch = trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")}])
        out = trainer.model(**batch, fused_lm_head=True)
        total -= row["weight"] * out.log_probs.sum().item()
        tokens += out.label_mask.sum().item()
    assert losses["eval_weighted_loss"] == pytest.approx(total / tokens, rel=1e-5)
    late = make("nll", rows)  # whose own rows have no weights
    assert late.evaluate(weighted)["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_weights_change_no_draw_of_a_mixture_and_no_filter(make, rows):
    def run(rows):
        domains = {"a": rows.select(range(4)), "b": rows.select(range(4, 8))}
        sampler = MixtureSampler(domains, [0.75, 0.25])
        trainer = make("dco", label_domains(domains), evaluated=domains)
        kept = LikelihoodFilter(trainer)(range(8))
        attach_mixture(trainer, sampler)
        log, _ = finish(trainer)
        return [log[0]["nll_per_token"], sampler.counts, kept.tolist()]

    assert run(rows) == run(with_weights(rows, SOME))


def test_dco_takes_no_part_of_a_token(make):
    with pytest.raises(ValueError, match="row 0: .* is 0.5, and DCO needs p of a whole completion"):
        make("dco", chats([0.5, 1]))
    plain = chats([None, None])  # though they have no weights, their turns alone are scored
    trainer = make("dco", chats([0, 1]), evaluated=plain, assistant_only_loss=True)
    scored = [sum(x != -100 for x in row["labels"]) for row in trainer.eval_dataset]
    assert scored == [9, 9]
    assert [sum(x != -100 for x in row["labels"]) for row in trainer.train_dataset] == [7, 9]
    with pytest.raises(ValueError, match="`train_dataset`, row 1: `weight` is nan"):
        make("dco", Dataset.from_dict({"text": ["a", "b"], "weight": [1.0, float("nan")]}))
