import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from llmmix.unlearning.evaluation.copies import (
    merged_copy,
    quantized,
    relearn,
    round_to_nearest,
)
from llmmix.unlearning.evaluation.scores import score_answers


@pytest.fixture
def rows():
    return Dataset.from_dict(
        {
            "prompt": ["1+1=", "2+2=", "3+3=", "4+4="],
            "answer": ["2", "4", "6", "8"],
            "paraphrased_question": ["one and one?", "two and two?", "3 and 3?", "4 and 4?"],
        }
    )


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def mean_nll(model, tokenizer, rows) -> float:
    return sum(score.nll for score in score_answers(model, tokenizer, rows)) / len(rows)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 64), (4, 50)])
def test_rounding_is_to_the_nearest_point_of_the_grid(bits, group):
    torch.manual_seed(0)
    weight = torch.randn(5, 150) * torch.tensor([1e-3, 1, 10, 1, 0])[:, None]
    rounded = round_to_nearest(weight, bits, group)
    for part, near in zip(
        weight.split(group or 150, dim=1), rounded.split(group or 150, dim=1), strict=True
    ):
        step = part.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((part - near).abs() <= step / 2 * 1.0001).all()
        assert len(near[1].unique()) <= 2**bits - 1
        torch.testing.assert_close(near.abs().amax(1), part.abs().amax(1))  # the ends are kept
    assert (rounded[4] == 0).all() and (rounded[1] != weight[1]).any()
    torch.testing.assert_close(round_to_nearest(rounded, bits, group), rounded)


def test_quantized_copies_spare_head_and_embeddings(model):
    before = weights(model)
    eight, four = quantized(model, 8), quantized(model, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        linear = "_proj" in name
        assert torch.equal(eight.state_dict()[name], value) != linear
        if linear:
            assert (four.state_dict()[name] - value).norm() > (
                eight.state_dict()[name] - value
            ).norm()
            torch.testing.assert_close(eight.state_dict()[name], round_to_nearest(value, 8))
    with pytest.raises(ValueError, match="`bits` must be 4 or 8, got 3"):
        quantized(model, 3)


def test_quantized_layers_of_gpt2_are_rounded_by_output_channel():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2))
    weight = model.transformer.h[0].mlp.c_fc.weight
    rounded = quantized(model, 8).transformer.h[0].mlp.c_fc.weight
    torch.testing.assert_close(rounded, round_to_nearest(weight.T, 8).T)


def test_a_model_of_other_layers_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=50, **sizes, **heads))
    with pytest.raises(ValueError, match="weights of MixtralForCausalLM are in linear layers"):
        quantized(model, 8)


def test_adapters_are_merged_first(model, tokenizer, rows):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    adapted = get_peft_model(copy.deepcopy(model), config)
    merged = merged_copy(adapted)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert all(p.requires_grad for p in merged.parameters()) and not merged.training
    assert mean_nll(merged, tokenizer, rows) == pytest.approx(
        mean_nll(adapted, tokenizer, rows), rel=1e-5
    )
    assert any("lora" in name for name, _ in adapted.named_parameters())
    plain = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(quantized(adapted, 8).state_dict(), quantized(plain, 8).state_dict())


def test_relearning_leaves_the_original_untouched(model, tokenizer, rows):
    before, state = weights(model), torch.get_rng_state()
    given = {"steps": 5, "learning_rate": 5e-3, "batch_size": 3}
    learner = relearn(model, tokenizer, rows, **given)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not learner.training
    assert mean_nll(learner, tokenizer, rows) < mean_nll(model, tokenizer, rows) - 0.5
    again = relearn(model, tokenizer, rows, **given)
    torch.testing.assert_close(again.state_dict(), learner.state_dict(), rtol=0, atol=0)
    other = relearn(model, tokenizer, rows, seed=1, **given)
    assert not torch.equal(other.lm_head.weight, learner.lm_head.weight)


def test_relearning_in_half_precision_is_not_rounded_away(model, tokenizer, rows):
    half = model.to(torch.bfloat16)
    learner = relearn(half, tokenizer, rows, steps=40, learning_rate=2e-4)
    assert learner.dtype == torch.bfloat16
    assert mean_nll(learner, tokenizer, rows) < mean_nll(half, tokenizer, rows) - 0.1


def test_relearning_refuses_what_teaches_nothing(model, tokenizer, rows):
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": 0}):
        with pytest.raises(ValueError, match="must be 1 or more and `learning_rate` positive"):
            relearn(model, tokenizer, rows, **wrong)
    long = Dataset.from_dict({"prompt": ["1 " * 300], "answer": ["2"]})
    with pytest.raises(ValueError, match="None of the 1 `rows` fits the context of 256"):
        relearn(model, tokenizer, long)
