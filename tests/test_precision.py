"""The precision of whatever runs a model outside of a training step."""

from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from llmmix import DCOConfig, DCOTrainer, RPOConfig, RPOTrainer
from llmmix.filtering import LikelihoodFilter
from llmmix.grading.ground_truth import reference_loss
from llmmix.sampling import completions, sample
from llmmix.solve_rates import SolveRates
from llmmix.unlearning.evaluation.gradients import gradient_norms
from llmmix.unlearning.evaluation.scores import score_answers

QUIET = {"bf16": True, "use_cpu": True, "max_steps": 1, "disable_tqdm": True, "report_to": "none"}


ASK = (["What is 2+3?", "7"], 2)


def seen_in(model) -> set:
    """Fills with (dtype, training) of what a layer gives, whoever calls the model."""
    seen = set()
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, _, output: seen.add((output.dtype, module.training))
    )
    return seen


def test_what_a_trainer_asks_of_its_model_is_in_its_precision(
    checkpoint, math_rows, tmp_path, monkeypatch
):
    """Before the first step too, when accelerate has not yet put the model under autocast."""
    trainer = DCOTrainer(
        checkpoint,
        DCOConfig(str(tmp_path), n_samples=4, **QUIET),
        train_dataset=math_rows.select(range(4)),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    monkeypatch.setattr(completions, "sample_by_generate", None)  # the engine serves it
    likely = LikelihoodFilter(trainer)
    rates = SolveRates(trainer, num_samples=2, max_new_tokens=4, warmup_steps=0)
    trainer.model.train()
    seen = seen_in(trainer.model)
    for ask in (likely, rates):
        ask([0, 1])
        assert seen == {(torch.bfloat16, False)} and trainer.model.training
        seen.clear()
    trainer.train()
    seen.clear()
    rates.begin()  # now under accelerate's autocast as well
    rates([0, 1])
    assert seen == {(torch.bfloat16, False)}


def test_a_reference_is_in_the_trainers_precision(checkpoint, preference_rows, tmp_path):
    trainer = RPOTrainer(
        checkpoint,
        args=RPOConfig(str(tmp_path), **QUIET),
        train_dataset=preference_rows.select(range(2)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    trainer._attach_own_heads()
    seen = seen_in(trainer.model.train().get_base_model())
    trainer.compute_ref_log_probs(trainer.model, trainer.data_collator([trainer.train_dataset[0]]))
    assert seen == {(torch.bfloat16, False)} and trainer.model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_sampled_scored_and_measured_in_half_precision(model, math_rows, tokenizer, dtype, how):
    rows = math_rows.select(range(3))
    texts = [turns[0]["content"] for turns in rows["completion"]]
    pairs = Dataset.from_dict({"prompt": list(rows["prompt"]), "answer": texts})

    def measured():
        return [
            *(score.nll for score in score_answers(model, tokenizer, pairs)),
            *gradient_norms(model, tokenizer, pairs),
            reference_loss(model, tokenizer, rows),
        ]

    exact = measured()
    if how == "weights":
        model.to(dtype)
    seen = seen_in(model.train())
    with torch.autocast("cpu", dtype) if how == "autocast" else nullcontext():
        found = measured()
        assert found == pytest.approx(exact, rel=0.03) and found != exact
        options = {"max_new_tokens": 6, "temperature": 0, "fall_back": False}
        draws = {(c.prompt, c.sample): c.text for c in sample(model, tokenizer, *ASK, **options)}
        assert draws[0, 0] == draws[0, 1] and draws[1, 0] == draws[1, 1]
    assert seen == {(dtype, False)} and model.training
