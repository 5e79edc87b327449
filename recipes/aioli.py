"""Fine-tune on a mixture whose shares move during training, by Aioli or another method.

    llmmix run aioli --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --domains code=code.jsonl web=web.jsonl --estimator regression

`--method` is aioli, skillit, doremi, doge, odm, stratified (equal shares) or fixed (`--weights`).
Options of a method other than Aioli go into `--method_options eta=0.5 window=5`. Files of their
names in llmmix/mixing/ describe them. DoReMi and DoGE first train other models, into subfolders.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import mixing
from llmmix.cli import parse_args
from llmmix.files import claim
from llmmix.mixing import AioliConfig
from llmmix.mixing.domains import MixtureConfig, load_domains
from llmmix.mixing.methods import METHODS, config_of
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.padding_free_setting import sft_trainer
from llmmix.report import print_report
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume, stage_to_resume

# Methods that train other models first, and the subfolders of those
STAGES = {"doremi": ("reference", "proxy"), "doge": ("proxy",)}


@dataclass
class MethodArguments:
    """The method that moves the shares."""

    method: str = field(
        default="aioli",
        metadata={"help": f"Method that moves the shares, one of: {', '.join(METHODS)}."},
    )
    method_options: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Options of a method other than aioli, as NAME=VALUE ..., such as eta=0.5 "
            "window=5."
        },
    )


def main(
    training_args: MixtureConfig,
    model_args: ModelConfig,
    aioli_config: AioliConfig,
    method_args: MethodArguments,
) -> None:
    """Load, train a reference or proxy if the method needs one, train, save."""
    method = method_args.method
    config = config_of(method, method_args.method_options)
    out = claim(training_args.output_dir)
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args, STAGES.get(method, ()))
    tokenizer = load_tokenizer(checkpoint, model_args, training_args)
    train, validation = load_domains(training_args, tokenizer)

    def fit(folder: Path, make_callback: Callable, weights: Any = None):
        """Train into a folder; returns the trainer and the callback that moved its mixture."""
        args = copy.copy(training_args)
        args.output_dir, args.push_to_hub = str(folder), args.push_to_hub and folder == out
        trainer = sft_trainer(
            checkpoint,
            args=args,
            train_dataset=mixing.label_domains(train),
            eval_dataset=validation,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        sampler = args.sampler(train, weights)
        callback = make_callback(sampler, measured_rows=args.measured_rows)
        mixing.attach_mixture(trainer, sampler, callback)
        before = STAGES.get(method, ())
        number = len(before) if folder == out else before.index(folder.name)
        log_lines(trainer, f"Stage {number + 1} of {len(before) + 1}: {folder}" if before else "")
        newest = resume if folder == out else stage_to_resume(args)
        trainer.train(resume_from_checkpoint=newest)
        trainer.save_model()
        trainer.save_state()
        trainer.accelerator.print(f"Model saved to {folder}")
        return trainer, callback

    weights: Any = mixing.stratified(len(train)) if method == "stratified" else None
    if method in STAGES:
        weights = train_proxy(method, config, fit, out)
    callbacks: dict[str, Callable] = {
        "aioli": partial(mixing.AioliCallback, config=aioli_config),
        "skillit": partial(mixing.SkillItCallback, config=config),
        "odm": partial(mixing.ODMCallback, config=config),
    }
    trainer, _ = fit(out, callbacks.get(method, mixing.MixtureCallback), weights)
    if trainer.accelerator.is_main_process:
        print_report(out, trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def train_proxy(method: str, config: Any, fit: Callable, out: Path) -> dict[str, float]:
    """Train the models that DoReMi or DoGE needs first; returns the weights that they find."""
    make: Callable = partial(mixing.DoGECallback, config=config)
    if method == "doremi":
        fit(out / "reference", mixing.MixtureCallback)
        make = partial(mixing.DoReMiCallback, config=config, reference=str(out / "reference"))
    return fit(out / "proxy", make)[1].average


if __name__ == "__main__":
    main(*parse_args((MixtureConfig, ModelConfig, AioliConfig, MethodArguments), __file__))
