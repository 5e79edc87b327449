"""Token losses: fine-tune with a weight of its own for every token.

    llmmix run token_losses --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name rows.jsonl --loss_type dft

`--loss_type` is nll, dft, gce, threshold, deft, eaft, asft, psft, focal, label_smoothing, gem or
select. Rows are what `trl sft` takes: prompt and completion, chat messages, or text. Add
`--use_peft` for LoRA, and `--padding_free true` or `--packing true` to compute no padding. The
losses are described in llmmix/token_losses/losses.py.
"""

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import TokenLossConfig, TokenLossTrainer
from llmmix.cli import parse_args
from llmmix.data import DataArguments, load_train_and_eval
from llmmix.files import claim
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.report import print_report
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume


def main(
    script_args: DataArguments, training_args: TokenLossConfig, model_args: ModelConfig
) -> None:
    """Load, train, save."""
    claim(training_args.output_dir)
    train_dataset, eval_dataset = load_train_and_eval(script_args, training_args)
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args)
    tokenizer = load_tokenizer(checkpoint, model_args, training_args)
    trainer = TokenLossTrainer(
        checkpoint,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
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
    main(*parse_args((DataArguments, TokenLossConfig, ModelConfig), __file__))
