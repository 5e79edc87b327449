"""FLAT: unlearn with forget data alone, by template answers and an f-divergence.

    llmmix run flat --model_name_or_path ./checkpoint --dataset_name forget.jsonl

Rows are questions and the answers to forget: `question` and `answer`, or `prompt` and `completion`;
a `template` column holds what to answer instead, else refusals are drawn from a list. Add
`--use_peft` for LoRA. The method is described in llmmix/unlearning/flat.py; measure with
`llmmix eval unlearning`.
"""

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import FLATConfig, FLATTrainer
from llmmix.cli import parse_args
from llmmix.data import DataArguments
from llmmix.files import claim
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.report import print_report
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume
from llmmix.unlearning.flat_config import check_retain
from llmmix.unlearning.preparation import RetainArguments, load_forget_and_retain


def main(
    script_args: DataArguments,
    training_args: FLATConfig,
    model_args: ModelConfig,
    retain_args: RetainArguments,
) -> None:
    """Load, unlearn, save."""
    check_retain(training_args, retain_args.retain_dataset_name is not None)
    claim(training_args.output_dir)
    forget, held_out, retain = load_forget_and_retain(script_args, retain_args, training_args)
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args)
    trainer = FLATTrainer(
        checkpoint,
        args=training_args,
        train_dataset=forget,
        eval_dataset=held_out,
        retain_dataset=retain,
        processing_class=load_tokenizer(checkpoint, model_args, training_args),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
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
    main(*parse_args((DataArguments, FLATConfig, ModelConfig, RetainArguments), __file__))
