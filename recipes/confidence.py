"""Stage 1 of SFTMix alone: write a dataset with each row's confidence.

    llmmix run confidence --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name rows.jsonl --output_dir runs/confidence

Trains a reference with plain SFT and scores every row under its checkpoints; `--checkpoints A B`
scores with given ones instead, of another and smaller model too. The result, OUTPUT_DIR/
confidence.jsonl, is the `--dataset_name` of `llmmix run sftmix`. Run it again after a kill and it
goes on where it stopped.
"""

from accelerate import PartialState
from trl import ModelConfig, get_peft_config, get_quantization_config

from llmmix import SFTMixConfig
from llmmix.cli import parse_args
from llmmix.data import DataArguments, load_train_and_eval
from llmmix.files import claim, replacing
from llmmix.models import prepare_model_args
from llmmix.sftmix.scoring import ReferenceArguments, add_confidence


def main(
    script_args: DataArguments,
    training_args: SFTMixConfig,
    model_args: ModelConfig,
    reference_args: ReferenceArguments,
) -> None:
    """Load, train the reference, score, write."""
    given = reference_args.checkpoints
    if given and model_args.model_name_or_path is None:
        model_args.model_name_or_path = given[0]
    folder = claim(training_args.output_dir)
    dataset, _ = load_train_and_eval(script_args, training_args, whole_for="confidence")
    checkpoint = prepare_model_args(model_args, training_args)
    scored = add_confidence(
        dataset,
        training_args,
        model=checkpoint,
        checkpoints=given,
        num_checkpoints=reference_args.num_checkpoints,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    if PartialState().is_main_process:
        with replacing(folder / "confidence.jsonl") as partial:
            scored.to_json(partial)
        print(f"{len(scored)} rows with confidence: {folder / 'confidence.jsonl'}")


if __name__ == "__main__":
    main(*parse_args((DataArguments, SFTMixConfig, ModelConfig, ReferenceArguments), __file__))
