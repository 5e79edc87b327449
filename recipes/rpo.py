"""RPO: DPO with a term that keeps the chosen responses likely.

    llmmix run rpo --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name preferences.jsonl --beta 0.01 --rpo_eta 0.005

Rows are what `trl dpo` takes: chosen and rejected, with or without a prompt. Add `--use_peft` for
LoRA, whose reference is the base model. The method is described in llmmix/rpo.py.
"""

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import RPOConfig, RPOTrainer
from llmmix.cli import parse_args
from llmmix.data import DataArguments, load_train_and_eval
from llmmix.files import claim
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.report import print_report
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume


def main(script_args: DataArguments, training_args: RPOConfig, model_args: ModelConfig) -> None:
    """Load, train, save."""
    claim(training_args.output_dir)
    whole_for = "precompute_ref_log_probs" if training_args.precompute_ref_log_probs else None
    train_dataset, eval_dataset = load_train_and_eval(
        script_args, training_args, whole_for=whole_for
    )
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args)
    trainer = RPOTrainer(
        checkpoint,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
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
    main(*parse_args((DataArguments, RPOConfig, ModelConfig), __file__))
