"""Stage 1 of SFTMix: train a reference with plain SFT, and score each example's confidence.

    reference   plain SFT on the dataset, keeping C checkpoints (or checkpoints given)
    score       mean response-token NLL of every example under every checkpoint
    confidence  minus the mean perplexity over checkpoints, in a column `confidence`

reference_run.py trains the reference. Scores are cached by the content of the checkpoint and of the
rows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.files import cache_dir, checkpoint_id, replacing
from llmmix.head import attach_head
from llmmix.models import (
    check_checkpoints,
    free_memory,
    load_checkpoint,
    named_checkpoints,
    resolve_checkpoint,
    tokenizer_of,
    trainable_checkpoint,
)
from llmmix.precision import evaluating
from llmmix.processes import main_process_says
from llmmix.rows.formats import check_rows_type
from llmmix.rows.weights import take_weights
from llmmix.sftmix.losses import confidence
from llmmix.sftmix.pairing import CONFIDENCE
from llmmix.sftmix.reference_run import (
    digest,
    digest_of_rows,
    loading_settings,
    plain_sft,
    train_reference,
)
from llmmix.sftmix.trainer import SFTMixConfig, SFTMixTrainer
from llmmix.trainers import training_rows

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

logger = get_logger(__name__)

ROW = "__row__"  # carries a row's number through the trainer's preparation, which may drop rows

# Settings that change the score of a row
SCORING = (
    "max_length truncation_mode completion_only_loss assistant_only_loss dataset_text_field "
    "chat_template_path eos_token bf16 fp16 model_init_kwargs"
).split()


@dataclass
class ReferenceArguments:
    """Flags of a recipe: what scores the rows that have no confidence yet."""

    checkpoints: list[str] | None = field(
        default=None,
        metadata={
            "help": "Checkpoints to score rows with, instead of training a reference: folders, hub "
            "ids, .gguf files or builtin:tiny."
        },
    )
    num_checkpoints: int | None = field(
        default=None,
        metadata={
            "help": "Checkpoints that the reference keeps. Default: one an epoch, and at least two."
        },
    )


def add_confidence(
    dataset: Dataset,
    args: SFTMixConfig,
    *,
    model: str | None = None,
    checkpoints: list[str] | None = None,
    num_checkpoints: int | None = None,
    peft_config: "PeftConfig | None" = None,
    quantization_config: "QuantizationConfigMixin | None" = None,
) -> Dataset:
    """The dataset with a `confidence` column; rows with nothing to score are dropped and counted.

    Args:
        dataset: Rows in a format of `SFTTrainer`.
        args: Settings of the reference run and of the scoring.
        model: Checkpoint that the reference starts from, when no `checkpoints` are given.
        checkpoints: Folders, hub ids, `.gguf` files or built-ins to score with, of other models
            too; an adapter must be a local folder.
        num_checkpoints: C, how many checkpoints the reference keeps; by default one an epoch, and
            at least two.
        peft_config: Adapter of the reference run.
        quantization_config: How to quantize the models that are loaded.

    Raises:
        ValueError: Neither `model` nor `checkpoints` is given; `num_checkpoints` is below 1; there
            are fewer than two rows, or they are streamed; the loss under a checkpoint is not
            finite; or the launch is under FSDP or DeepSpeed.
    """
    _check_input(dataset)
    rows_digest = digest_of_rows(dataset)
    if checkpoints:
        checkpoints = [scoring_checkpoint(name) for name in checkpoints]
    elif model is None:
        raise ValueError("Give the `model` to train a reference from, or `checkpoints`.")
    else:
        checkpoints = train_reference(
            dataset,
            args,
            trainable_checkpoint(model, "model"),
            num_checkpoints,
            peft_config,
            quantization_config,
            rows_digest=rows_digest,
        )
    if PartialState().is_main_process:
        what = f"scoring {len(dataset)} rows under {len(checkpoints)} checkpoints"
        print(f"\nStage 1 of 3: {what}", flush=True)
    nlls = np.stack(
        [
            mean_nlls(dataset, args, name, quantization_config, rows_digest=rows_digest)
            for name in checkpoints
        ]
    )
    scores = confidence(torch.from_numpy(nlls)).numpy()
    scored = np.flatnonzero(~np.isnan(scores))
    if dropped := len(dataset) - len(scored):
        logger.warning(
            "Dropped %d of %d rows that have no response token to score.", dropped, len(dataset)
        )
    if CONFIDENCE in dataset.column_names:
        dataset = dataset.remove_columns(CONFIDENCE)
    return dataset.select(scored).add_column(CONFIDENCE, scores[scored])


def scoring_checkpoint(name: str) -> str:
    """A checkpoint or an adapter's folder to score with, resolved and checked.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: It would not load, or not whole.
    """
    checkpoint = resolve_checkpoint(name, "checkpoints")
    check_checkpoints(named_checkpoints([checkpoint], argument="checkpoints"))
    return checkpoint


def _check_input(dataset: object) -> None:
    check_rows_type(dataset, "dataset")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"SFTMix scores every row beforehand, so the dataset must be a map-style `Dataset`, "
            f"got {type(dataset).__name__}."
        )
    if len(dataset) < 2:
        raise ValueError(f"SFTMix pairs examples and needs at least two, got {len(dataset)}.")
    if PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "Confidence is not scored under FSDP or DeepSpeed. Score first, on one process or with "
            "`llmmix run --num_processes N confidence`, and train on the file that it writes."
        )


def mean_nlls(
    dataset: Dataset,
    args: SFTMixConfig,
    checkpoint: str,
    quantization_config: "QuantizationConfigMixin | None" = None,
    *,
    rows_digest: str | None = None,
) -> np.ndarray:
    """Mean response-token NLL in nats of each row under a checkpoint; NaN where nothing is scored.

    Rows are tokenized and cut by the checkpoint's own tokenizer as `SFTTrainer` would.

    Args:
        dataset: (n) rows.
        args: Settings, of which the evaluation batch size, loading and tokenization count.
        checkpoint: Folder (an adapter's too) or hub id.
        quantization_config: How to quantize the model.
        rows_digest: Digest of the rows, when the caller has it already.

    Returns:
        (n,) fp64.

    Raises:
        ValueError: The loss of a row is not finite.
    """
    key = digest(
        checkpoint_id(checkpoint, loading_settings(args).get("revision")),
        rows_digest or digest_of_rows(dataset),
        quantization_config,
        *(getattr(args, name) for name in SCORING),
    )
    file = cache_dir() / "confidence" / f"{key[:16]}.npy"
    if (cached := main_process_says(np.load(file) if file.exists() else None)) is not None:
        return cached
    nlls = _mean_nlls(dataset, args, checkpoint, quantization_config)
    if PartialState().is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial, partial.open("wb") as beside:
            np.save(beside, nlls)
    PartialState().wait_for_everyone()
    return nlls


def _mean_nlls(
    dataset: Dataset,
    args: SFTMixConfig,
    checkpoint: str,
    quantization_config: "QuantizationConfigMixin | None",
) -> np.ndarray:
    """`mean_nlls` without the cache."""
    scoring_args = plain_sft(args, Path(args.output_dir or "."))
    # Scores are matched to rows by their order
    scoring_args.train_sampling_strategy, scoring_args.dataloader_drop_last = "random", False
    model, tokenizer = _load(checkpoint, scoring_args, quantization_config)
    trainer = SFTMixTrainer(
        model,
        args=scoring_args,
        train_dataset=dataset.add_column(ROW, np.arange(len(dataset))),
        processing_class=tokenizer,
        quantization_config=quantization_config if isinstance(model, str) else None,
    )
    rows = np.asarray(training_rows(trainer, "Scoring").with_format(None)[ROW][:])
    scores = _score(trainer)
    if not np.isfinite(scores).all():
        bad = rows[~np.isfinite(scores)]
        raise ValueError(
            f"The loss of {len(bad)} rows (first: row {bad[0]}) is not finite under {checkpoint}: "
            "it has diverged. Lower `learning_rate`, or score with other `checkpoints`."
        )
    nlls = np.full(len(dataset), np.nan)
    nlls[rows] = scores
    del trainer, model
    free_memory()
    return nlls


def _score(trainer: SFTMixTrainer) -> np.ndarray:
    from tqdm.auto import tqdm

    loader = trainer.get_eval_dataloader(trainer.train_dataset)
    accelerator = trainer.accelerator
    model = accelerator.prepare_model(trainer.model, evaluation_mode=True)
    attach_head(trainer.model, padding_free=trainer.args.padding_free)
    scores = []
    for batch in tqdm(loader, desc="Scoring", disable=not accelerator.is_main_process):
        with evaluating(model, trainer):
            output = model(**take_weights(batch)[0], fused_lm_head=True)
        means = -output.log_probs.double().sum(1) / output.label_mask.sum(1)
        scores.append(accelerator.gather_for_metrics(means).cpu())
    return torch.cat(scores).numpy()


def _load(
    checkpoint: str,
    args: SFTMixConfig,
    quantization_config: "QuantizationConfigMixin | None",
) -> tuple[str | PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that `SFTTrainer` takes, and its tokenizer."""
    (named,) = named_checkpoints([checkpoint], argument="checkpoints")
    tokenizer = tokenizer_of(named, args.trust_remote_code)
    if named.adapter is None:
        return checkpoint, tokenizer
    loading = loading_settings(args)
    loading["dtype"] = loading.get("dtype") or "float32"  # as TRL loads
    loading.pop("revision", None)  # the run's model's, not the base's
    args.model_init_kwargs = None
    return load_checkpoint(named, quantization_config=quantization_config, **loading), tokenizer
