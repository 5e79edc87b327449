"""DCO: fine-tune for pass@N, with a loss that stops where N draws would succeed.

    llmmix run dco --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name rows.jsonl --n_samples 64

Rows are what `trl sft` takes: prompt and completion, chat messages, or text. Add `--use_peft` for
LoRA. With `--n_samples 8 --votes 3` the model is trained for a majority vote over 8 draws. With
`--stepwise true`, each step of rows of `prompt` and `steps`, or each answer of a chat, becomes an
example, and n_samples is the N of a step. With `--likelihood_threshold 0.1`, rows whose F has
fallen below it are left out (NCO). The methods are described in llmmix/dco.py, llmmix/majority.py,
llmmix/steps.py and llmmix/filtering.py; for chains of thought see recipes/dco_cot.py.
"""

from dataclasses import dataclass, field

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import DCOConfig, DCOTrainer
from llmmix.cli import parse_args
from llmmix.data import DataArguments, load_train_and_eval
from llmmix.files import claim
from llmmix.filtering import LikelihoodFilter, attach_filter, check_share
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.report import print_report
from llmmix.steps import split_steps
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume


@dataclass
class SelectionArguments:
    """Which examples DCO sees."""

    stepwise: bool = field(
        default=False, metadata={"help": "Make an example of each step of a solution."}
    )
    likelihood_threshold: float | None = field(
        default=None,
        metadata={"help": "NCO: leave out rows whose F(N, p) is below this, such as 0.1."},
    )

    def __post_init__(self) -> None:
        if self.likelihood_threshold is not None:
            check_share("likelihood_threshold", self.likelihood_threshold)

    def whole_for(self) -> str | None:
        """What is set and needs all rows at once."""
        filtered = None if self.likelihood_threshold is None else "likelihood_threshold"
        return "stepwise" if self.stepwise else filtered


def main(
    script_args: DataArguments,
    training_args: DCOConfig,
    model_args: ModelConfig,
    selection_args: SelectionArguments,
) -> None:
    """Load, train, save."""
    claim(training_args.output_dir)
    train_dataset, eval_dataset = load_train_and_eval(
        script_args, training_args, whole_for=selection_args.whole_for()
    )
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args)
    tokenizer = load_tokenizer(checkpoint, model_args, training_args)
    if selection_args.stepwise:
        length = training_args.max_length
        train_dataset = split_steps(train_dataset, tokenizer, max_length=length)
        eval_dataset = eval_dataset and split_steps(eval_dataset, tokenizer, max_length=length)
    trainer = DCOTrainer(
        checkpoint,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if (threshold := selection_args.likelihood_threshold) is not None:
        attach_filter(trainer, LikelihoodFilter(trainer, threshold=threshold))
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
    main(*parse_args((DataArguments, DCOConfig, ModelConfig, SelectionArguments), __file__))
