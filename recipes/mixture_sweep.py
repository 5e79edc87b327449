"""Train on each of many fixed mixtures, and write tables of their shares and losses.

    llmmix run mixture_sweep --model_name_or_path builtin:tiny --max_steps 200 \
        --domains code=builtin:domains@code docs=builtin:domains@docs --mixtures 16

The mixtures are a grid or random draws. `llmmix eval mixture_laws` fits laws to the tables: they
have a line for each run, with the shares of the domains in ratios.csv and the validation losses in
metrics.csv, joined by `run_id`. A sweep that was stopped continues: runs that are in both tables
are not trained again (a line that is not whole counts as none), and with
`--resume_from_checkpoint auto` a run that was cut off goes on from its last checkpoint.
"""

import copy
import shutil

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix.cli import parse_args
from llmmix.files import claim, read_record
from llmmix.laws.sweep import SweepArguments, add, check_same, choose_mixtures, finished
from llmmix.mixing import MixtureCallback, attach_mixture, label_domains
from llmmix.mixing.domains import MixtureConfig, load_domains
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.padding_free_setting import sft_trainer
from llmmix.training.lines import log_lines
from llmmix.training.resuming import stage_to_resume


def main(training_args: MixtureConfig, model_args: ModelConfig, sweep_args: SweepArguments) -> None:
    """Train each mixture that is not in the tables yet."""
    out = claim(training_args.output_dir)
    checkpoint = prepare_model_args(model_args, training_args)
    tokenizer = load_tokenizer(checkpoint, model_args, training_args)
    train, validation = load_domains(training_args, tokenizer)
    if training_args.packing:
        raise ValueError(
            "`packing=True` joins rows of several domains, and a sweep needs the loss of each. Set "
            "`packing=False`, and `padding_free=True` to compute no padding."
        )
    prior = training_args.sampler(train).weights
    tables = {name: out / f"{name}.csv" for name in ("ratios", "metrics")}
    mixtures = choose_mixtures(sweep_args, prior, training_args.seed, list(train))
    for number, weights in enumerate(mixtures):
        run = f"run-{number:04d}"
        shares = dict(zip(train, weights.tolist(), strict=True))
        if row := finished(tables["ratios"], run):
            check_same(row, shares, tables["ratios"])
        if row and finished(tables["metrics"], run):
            continue
        args = copy.copy(training_args)
        args.output_dir, args.push_to_hub = str(out / run), False
        trainer = sft_trainer(
            checkpoint,
            args=args,
            train_dataset=label_domains(train),
            eval_dataset=validation,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        sampler = args.sampler(train, weights)
        attach_mixture(trainer, sampler, MixtureCallback(sampler, measured_rows=args.measured_rows))
        log_lines(trainer, f"Run {number + 1} of {len(mixtures)}")
        trainer.train(resume_from_checkpoint=stage_to_resume(args))
        if sweep_args.keep_models:
            trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            header, entries = read_record(out / run)
            losses = next(entry["final"] for entry in entries if "final" in entry)
            if not row:
                add(tables["ratios"], run, shares)
            names = [f"{target}_val_loss" for target in header["targets"]]
            add(tables["metrics"], run, dict(zip(names, losses, strict=True)))
            if not sweep_args.keep_models:
                shutil.rmtree(out / run)
        trainer.accelerator.wait_for_everyone()
    if training_args.process_index == 0:
        print(f"{len(mixtures)} runs in {tables['ratios']} and {tables['metrics']}")


if __name__ == "__main__":
    main(*parse_args((MixtureConfig, ModelConfig, SweepArguments), __file__))
