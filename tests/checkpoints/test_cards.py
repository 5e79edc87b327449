"""What saved models say of themselves: the base as the user knows it, the loss, the mixture."""

import json

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from llmmix import DCOConfig, DCOTrainer, UnlearnConfig, UnlearnTrainer, mixing
from llmmix.facts import note_run, read_facts
from llmmix.unlearning.loss_table import LOSSES

ONE_STEP = {"max_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
FORGET = Dataset.from_dict({"question": ["2+2?"] * 4, "answer": ["4"] * 4})
RETAIN = Dataset.from_dict({"question": ["3+3?"] * 4, "answer": ["6"] * 4})


def test_every_loss_has_a_paper_and_its_card_names_both(checkpoint, tmp_path):
    assert all(loss.paper for loss in LOSSES.values())
    args = UnlearnConfig(str(tmp_path), loss="wga", **ONE_STEP)
    UnlearnTrainer(checkpoint, args, train_dataset=FORGET, retain_dataset=RETAIN).train()
    card = (tmp_path / "README.md").read_text()
    assert "trained with the unlearning loss wga" in card and "papers/2502.19301" in card
    assert f"fine-tuned version of `{checkpoint}`" in card and "None" not in card


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (mixing.SkillItCallback, "SFT on a mixture: shares moved by Skill-It, a method intro"),
        (mixing.MixtureCallback, "SFT on a mixture: fixed shares."),
    ],
)
def test_the_card_of_a_mixture_says_what_moved_it(make, said, checkpoint, text_rows, tmp_path):
    domains = {"a": text_rows, "b": text_rows}
    trainer = SFTTrainer(
        checkpoint,
        args=SFTConfig(str(tmp_path), **ONE_STEP),
        train_dataset=mixing.label_domains(domains),
        eval_dataset=domains,
    )
    sampler = mixing.MixtureSampler(domains)
    mixing.attach_mixture(trainer, sampler, make(sampler))
    trainer.train()
    assert said in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("given", ["builtin:tiny", "folder"])
def test_an_adapter_names_its_base_as_the_user_does(
    given, checkpoint, tmp_path, monkeypatch, math_rows
):
    monkeypatch.setenv("LLMMIX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tiny-1").symlink_to(checkpoint)
    name = given if given == "builtin:tiny" else checkpoint
    args = DCOConfig(str(tmp_path / "out"), save_strategy="no", **ONE_STEP)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = DCOTrainer(name, args=args, train_dataset=math_rows, peft_config=lora)
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    assert "tiny-1" not in (tmp_path / "out" / "README.md").read_text()
    note_run(trainer)  # for the report
    assert read_facts(tmp_path / "out")["model"] == name
