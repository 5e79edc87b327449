"""DCO for chains of thought: train on what N draws do not yet solve, found by sampling.

    llmmix run dco_cot --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name builtin:math --solve_threshold 0.1

Rows need a prompt, a completion that reasons, and the reference `answer`. The model in training is
sampled on them; rows it solves as often as `solve_threshold` are left out (with `--n_samples 1`, as
the authors ran it), and the loss of the others is weighted by F(N, p^) (with N above 1). The method
is described in llmmix/solve_rates.py.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import DCOConfig, DCOTrainer, attach_weights
from llmmix.cli import parse_args
from llmmix.data import DataArguments, load_train_and_eval
from llmmix.files import claim
from llmmix.filtering import attach_filter, check_share
from llmmix.grading.verify import Verifier
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.report import print_report
from llmmix.solve_rates import SolveRates
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume


@dataclass
class SolveRateArguments:
    """How often a row is solved, and what follows from it."""

    solve_threshold: float | None = field(
        default=0.1,
        metadata={
            "help": "Solve rate from which a row is left out. null in a config file: no row is."
        },
    )
    solve_samples: int = field(
        default=64, metadata={"help": "Completions sampled to estimate the solve rate of a row."}
    )
    min_samples: int = field(
        default=1,
        metadata={"help": "Judged completions that a solve rate needs; with fewer it counts as 0."},
    )
    refresh_every: int = field(
        default=100, metadata={"help": "Training steps after which a solve rate is sampled again."}
    )
    unfiltered_steps: int = field(
        default=20, metadata={"help": "Training steps before the first solve rate is sampled."}
    )
    max_new_tokens: int = field(
        default=1024, metadata={"help": "Tokens after which a sampled completion is cut."}
    )
    token_budget: int = field(
        default=16384,
        metadata={"help": "Tokens whose keys and values are held at once while sampling."},
    )
    verifier: str = field(
        default="math",
        metadata={
            "help": "The judge: math, exact, normalized, choice, or your own as module:function."
        },
    )

    def __post_init__(self) -> None:
        if self.solve_threshold is not None:
            check_share("solve_threshold", self.solve_threshold)
        if not 1 <= self.min_samples <= self.solve_samples:
            given = f"{self.min_samples} and {self.solve_samples}"
            raise ValueError(f"`min_samples` must lie between 1 and `solve_samples`, got {given}.")


def main(
    script_args: DataArguments,
    training_args: DCOConfig,
    model_args: ModelConfig,
    solve_args: SolveRateArguments,
) -> None:
    """Load, train, save."""
    claim(training_args.output_dir)
    train, held_out = load_train_and_eval(script_args, training_args, whole_for="dco_cot")
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args)
    trainer = DCOTrainer(
        checkpoint,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=load_tokenizer(checkpoint, model_args, training_args),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    rates = SolveRates(
        trainer,
        Verifier(solve_args.verifier),
        num_samples=solve_args.solve_samples,
        min_samples=solve_args.min_samples,
        refresh_every=solve_args.refresh_every,
        warmup_steps=solve_args.unfiltered_steps,
        max_new_tokens=solve_args.max_new_tokens,
        token_budget=solve_args.token_budget,
    )
    attach_weights(trainer, rates.weights)
    if (threshold := solve_args.solve_threshold) is not None:
        attach_filter(trainer, rates.below(threshold), warmup_steps=solve_args.unfiltered_steps)
    log_lines(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if trainer.accelerator.is_main_process:
        print_report(str(training_args.output_dir), trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(*parse_args((DataArguments, DCOConfig, ModelConfig, SolveRateArguments), __file__))
