"""SFTMix: fine-tune with mixup between confident and unconfident examples.

    llmmix run sftmix --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name rows.jsonl

Rows are what `trl sft` takes. Without a `confidence` column all three stages run: a reference is
trained and each row scored first, into OUTPUT_DIR/confidence.jsonl, which a later run can start
from. Add `--use_peft` for LoRA. The method is described in llmmix/sftmix/.
"""

from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import SFTMixConfig, SFTMixTrainer
from llmmix.cli import parse_args
from llmmix.data import DataArguments, load_train_and_eval
from llmmix.files import claim, replacing
from llmmix.models import load_tokenizer, prepare_model_args
from llmmix.report import print_report
from llmmix.sftmix.pairing import CONFIDENCE
from llmmix.sftmix.scoring import ReferenceArguments, add_confidence
from llmmix.training.lines import log_lines
from llmmix.training.resuming import checkpoint_to_resume


def main(
    script_args: DataArguments,
    training_args: SFTMixConfig,
    model_args: ModelConfig,
    reference_args: ReferenceArguments,
) -> None:
    """Load, score if need be, train, save."""
    folder = claim(training_args.output_dir)
    train_dataset, eval_dataset = load_train_and_eval(
        script_args, training_args, whole_for="SFTMix"
    )
    checkpoint = prepare_model_args(model_args, training_args)
    resume = checkpoint_to_resume(training_args)
    tokenizer = load_tokenizer(checkpoint, model_args, training_args)
    if CONFIDENCE not in (train_dataset.column_names or []) and training_args.mixup_weight:
        train_dataset = add_confidence(
            train_dataset,
            training_args,
            model=checkpoint,
            checkpoints=reference_args.checkpoints,
            num_checkpoints=reference_args.num_checkpoints,
            peft_config=get_peft_config(model_args),
            quantization_config=get_quantization_config(model_args),
        )
    trainer = SFTMixTrainer(
        checkpoint,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if trainer.accelerator.is_main_process and training_args.mixup_weight:
        with replacing(folder / "confidence.jsonl") as partial:
            train_dataset.to_json(partial)
    stages = "Stages 2 and 3 of 3: training with mixup between the confident half and the other"
    log_lines(trainer, stages if training_args.mixup_weight else "")
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
    main(*parse_args((DataArguments, SFTMixConfig, ModelConfig, ReferenceArguments), __file__))
