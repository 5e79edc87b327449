"""Supervised fine-tuning on a mixture of domains with fixed shares.

    llmmix run mixture --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --domains code=code.jsonl web=web.jsonl books=hub/id --weights 0.5 0.3 0.2

Rows of a domain are text, prompt and completion, or chat; different domains may have different
formats. Some rows of each domain are set aside for its validation loss. OUTPUT_DIR/mixture.jsonl
records the draws. Add `--use_peft` for LoRA. For shares that move, see `llmmix run aioli`.
"""

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix.cli import parse_args
from llmmix.files import claim
from llmmix.mixing import MixtureCallback, attach_mixture, label_domains
from llmmix.mixing.domains import MixtureConfig, load_domains
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.padding_free_setting import sft_trainer
from llmmix.report import print_report
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume


def main(training_args: MixtureConfig, model_args: ModelConfig) -> None:
    """Load, mix, train, save."""
    claim(training_args.output_dir)
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args)
    tokenizer = load_tokenizer(checkpoint, model_args, training_args)
    train, validation = load_domains(training_args, tokenizer)
    trainer = sft_trainer(
        checkpoint,
        args=training_args,
        train_dataset=label_domains(train),
        eval_dataset=validation,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    sampler = training_args.sampler(train)
    measured = training_args.measured_rows
    attach_mixture(trainer, sampler, MixtureCallback(sampler, measured_rows=measured))
    log_lines(trainer)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}")
    if trainer.accelerator.is_main_process:
        print_report(str(training_args.output_dir), trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main(*parse_args((MixtureConfig, ModelConfig), __file__))
