"""A mixture whose shares move while it trains: Aioli, or another method under equal conditions.

    llmmix run aioli --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --domains code=code.jsonl web=web.jsonl --estimator regression

`--method` takes aioli, skillit, doremi, doge, odm, stratified or fixed (`--weights`); what a method
other than Aioli is told goes into `--method_options eta=0.5 window=5`. DoReMi trains a reference
and a proxy first, DoGE a proxy, into subfolders. The methods are described in llmmix/mixing/.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config

from llmmix.cli import parse_args
from llmmix.mixing import AioliCallback, AioliConfig, MixtureCallback, attach_mixture, label_domains
from llmmix.mixing.bandit import BanditCallback, BanditConfig
from llmmix.mixing.domains import MixtureConfig, load_domains
from llmmix.mixing.online import SkillItCallback, SkillItConfig
from llmmix.mixing.proxies import DoGECallback, DoGEConfig, DoReMiCallback, DoReMiConfig
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.report import write_report
from llmmix.trainers import checkpoint_to_resume

CONFIGS = {"skillit": SkillItConfig, "doremi": DoReMiConfig}
CONFIGS |= {"doge": DoGEConfig, "odm": BanditConfig}
STAGED = ("doremi", "doge")  # a proxy is trained first
METHODS = ("aioli", "skillit", "doremi", "doge", "odm", "stratified", "fixed")


@dataclass
class MethodArguments:
    """What moves the shares."""

    method: str = field(default="aioli", metadata={"help": f"One of {METHODS}."})
    method_options: list[str] = field(
        default_factory=list, metadata={"help": "NAME=VALUE of a method other than aioli."}
    )


def config_of(method: str, given: list[str]):
    """The options of a method other than aioli, None for one that takes none."""
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
    if bad := [option for option in given if "=" not in option]:
        raise ValueError(f"`method_options`: {bad} must be NAME=VALUE.")
    if given and method not in CONFIGS:
        raise ValueError(f"`method_options` are of {list(CONFIGS)}; {method!r} takes none.")
    options = dict(option.split("=", 1) for option in given)
    options = {name: yaml.safe_load(value) for name, value in options.items()}
    return CONFIGS[method](**options) if method in CONFIGS else None


def main(
    training_args: MixtureConfig,
    model_args: ModelConfig,
    aioli_config: AioliConfig,
    method_args: MethodArguments,
) -> None:
    """Load, train what the method needs first, train, save."""
    method = method_args.method
    config = config_of(method, method_args.method_options)
    checkpoint = prepare_model_args(model_args, training_args)
    tokenizer = load_tokenizer(checkpoint, model_args, training_args)
    train, validation = load_domains(training_args, tokenizer)
    out = Path(training_args.output_dir)

    def fit(folder: Path, make_callback=None, weights=None):
        args = copy.copy(training_args)
        args.output_dir = str(folder)
        args.push_to_hub = args.push_to_hub and folder == out
        trainer = SFTTrainer(
            checkpoint,
            args=args,
            train_dataset=label_domains(train),
            eval_dataset=validation,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        sampler = args.sampler(train, weights)
        make = make_callback or MixtureCallback
        callback = make(sampler, measured_rows=args.measured_rows)
        attach_mixture(trainer, sampler, callback)
        resume = checkpoint_to_resume(args)
        if folder != out or (method in STAGED and resume is True):  # where it had come, if begun
            resume = get_last_checkpoint(folder) if resume and folder.exists() else None
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()
        trainer.accelerator.print(f"Model saved to {folder}")
        return trainer, callback

    def of(callback, **more):
        return lambda sampler, **given: callback(sampler, config, **more, **given)

    weights = [1.0] * len(train) if method == "stratified" else None
    moves = {"odm": of(BanditCallback), "skillit": of(SkillItCallback)}
    moves["aioli"] = lambda sampler, **given: AioliCallback(sampler, aioli_config, **given)
    if method == "doremi":
        fit(out / "reference")
        proxy = of(DoReMiCallback, reference=str(out / "reference"))
        weights = fit(out / "proxy", proxy)[1].controller.average
    elif method == "doge":
        weights = fit(out / "proxy", of(DoGECallback))[1].controller.average
    trainer, _ = fit(out, moves.get(method), weights)
    if trainer.accelerator.is_main_process:
        print(f"Report: {write_report(out)}")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main(*parse_args((MixtureConfig, ModelConfig, AioliConfig, MethodArguments), __file__))
