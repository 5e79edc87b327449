"""Unlearn with NPO, SimNPO, DPO, gradient ascent or difference, UNDIAL, RMU, PDU and others.

    llmmix run unlearn --loss npo --model_name_or_path ./checkpoint \
        --dataset_name forget.jsonl --retain_dataset_name retain.jsonl

Rows to forget and rows to retain are `question` and `answer`, `prompt` and `completion`, or `text`.
A loss that lacks what it needs says so before the model is loaded. Add `--use_peft` for LoRA, whose
adapter switched off then serves as the reference. The losses are described in
llmmix/unlearning/losses.py; measure with `llmmix eval unlearning`.
"""

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import UnlearnConfig, UnlearnTrainer
from llmmix.cli import parse_args
from llmmix.data import DataArguments
from llmmix.files import claim
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.report import print_report
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume
from llmmix.unlearning.config import check_needs
from llmmix.unlearning.preparation import RetainArguments, load_forget_and_retain


def main(
    script_args: DataArguments,
    training_args: UnlearnConfig,
    model_args: ModelConfig,
    retain_args: RetainArguments,
) -> None:
    """Load, unlearn, save."""
    check_needs(training_args, retain_args.retain_dataset_name is not None)
    claim(training_args.output_dir)
    forget, held_out, retain = load_forget_and_retain(script_args, retain_args, training_args)
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args)
    trainer = UnlearnTrainer(
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
    main(*parse_args((DataArguments, UnlearnConfig, ModelConfig, RetainArguments), __file__))
