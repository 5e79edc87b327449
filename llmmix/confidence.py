"""Stage 1 of SFTMix: train a reference with plain SFT, and score each example's confidence.

    reference   plain SFT on the dataset, keeping C checkpoints (or checkpoints given)
    score       mean response-token NLL of every example under every checkpoint
    confidence  minus the mean perplexity over checkpoints, in a column `confidence`

A finished reference is not trained twice and an interrupted one goes on from its last checkpoint:
its folder is named after its data and settings. Scores are cached by the content of the checkpoint
and of the rows.
"""

import copy
import gc
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from transformers import AutoTokenizer

from llmmix.files import cache_dir, checkpoint_id
from llmmix.head import attach_head
from llmmix.models import resolve_checkpoint
from llmmix.sftmix import CONFIDENCE, SFTMixConfig, SFTMixTrainer, confidence

logger = get_logger(__name__)

ROW = "__row__"  # carries a row's number through the trainer's preparation, which may drop rows

# Settings that do not change what a reference learns or how a row is scored
IRRELEVANT = (
    "output_dir report_to run_name push_to_hub hub_ log local_ save_ eval_ do_ resume_ load_best_ "
    "metric_ greater_ disable_tqdm mixup_ dco_ dataloader_ per_device_eval_ project trackio_ ddp_"
).split()
SCORING = (
    "max_length truncation_mode completion_only_loss assistant_only_loss dataset_text_field "
    "chat_template_path eos_token bf16 fp16 model_init_kwargs"
).split()


@dataclass
class ReferenceArguments:
    """What scores the rows that have no confidence yet, as flags of a recipe."""

    checkpoints: list[str] | None = field(
        default=None, metadata={"help": "Score with these instead of training a reference."}
    )
    num_checkpoints: int | None = field(
        default=None, metadata={"help": "Checkpoints of the reference; default one an epoch, >= 2."}
    )


def add_confidence(
    dataset: Dataset,
    args: SFTMixConfig,
    *,
    model: str | None = None,
    checkpoints: list[str] | None = None,
    num_checkpoints: int | None = None,
    peft_config=None,
    quantization_config=None,
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
        quantization_config: How to quantise the models loaded.

    Raises:
        ValueError: Neither `model` nor `checkpoints`; C below 1; fewer than two rows, or streamed
            ones; a checkpoint whose loss is not finite; a launch under FSDP or DeepSpeed.
    """
    _check_input(dataset, model, checkpoints)
    rows_digest = _rows_digest(dataset)
    if not checkpoints:
        checkpoints = train_reference(
            dataset,
            args,
            model,
            num_checkpoints,
            peft_config,
            quantization_config,
            rows_digest=rows_digest,
        )
    nlls = np.stack(
        [
            mean_nlls(dataset, args, name, quantization_config, rows_digest=rows_digest)
            for name in map(resolve_checkpoint, checkpoints)
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


def _check_input(dataset, model: str | None, checkpoints: list[str] | None) -> None:
    if not checkpoints and model is None:
        raise ValueError("Give the `model` to train a reference from, or `checkpoints`.")
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


def train_reference(
    dataset: Dataset,
    args: SFTMixConfig,
    model: str,
    num_checkpoints: int | None = None,
    peft_config=None,
    quantization_config=None,
    *,
    rows_digest: str | None = None,
) -> list[str]:
    """Plain SFT under `args.output_dir`, keeping checkpoints at equal distances.

    Returns:
        The checkpoint folders, first to last: one every ceil(steps / C) steps and the last, so
        fewer than C when the steps do not divide.

    Raises:
        ValueError: `num_checkpoints` below 1.
    """
    if num_checkpoints is None:
        num_checkpoints = max(2, int(args.num_train_epochs))
    if num_checkpoints < 1:
        raise ValueError(f"`num_checkpoints` must be at least 1, got {num_checkpoints}.")
    settings = {
        key: value for key, value in args.to_dict().items() if not key.startswith(tuple(IRRELEVANT))
    }
    key = _digest(
        checkpoint_id(model, (args.model_init_kwargs or {}).get("revision")),
        rows_digest or _rows_digest(dataset),
        json.dumps(settings, sort_keys=True, default=str),
        _adapter_settings(peft_config),
        quantization_config,
        args.world_size,
        num_checkpoints,
    )
    folder = Path(args.output_dir) / f"reference-{key[:12]}"
    finished = folder / "finished.json"
    if _main_process_says(finished.exists()):
        logger.warning("Using the reference in %s, trained before.", folder)
        return json.loads(finished.read_text())
    reference_args = _plain(args, folder)
    reference_args.save_strategy = "steps"
    # Below 1 it is a share of the run; a run's last step is saved in any case
    reference_args.save_steps = 1 / num_checkpoints if num_checkpoints > 1 else 10**9
    reference_args.save_total_limit = None
    trainer = SFTMixTrainer(
        model,
        args=reference_args,
        train_dataset=dataset,
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
    kept = _main_process_says(_complete_checkpoints(folder))
    trainer.train(resume_from_checkpoint=kept[-1] if kept else None)
    trainer.accelerator.wait_for_everyone()
    kept = _main_process_says(_complete_checkpoints(folder))
    if trainer.accelerator.is_main_process:
        finished.write_text(json.dumps(kept))
        for state in folder.glob("checkpoint-*/optimizer.*"):
            state.unlink()  # two thirds of a checkpoint, and nothing resumes from here
    trainer.accelerator.wait_for_everyone()
    del trainer
    _free_memory()
    return kept


def mean_nlls(
    dataset: Dataset,
    args: SFTMixConfig,
    checkpoint: str,
    quantization_config=None,
    *,
    rows_digest: str | None = None,
) -> np.ndarray:
    """Mean response-token NLL in nats of each row under a checkpoint; NaN where nothing is scored.

    Rows are tokenized and cut by the checkpoint's own tokenizer as `SFTTrainer` would.

    Args:
        dataset: (n) rows.
        args: `per_device_eval_batch_size` and what concerns loading and tokenization is used.
        checkpoint: Folder (an adapter's too) or hub id.
        quantization_config: How to quantise the model.
        rows_digest: Digest of the rows, when the caller has it already.

    Returns:
        (n,) fp64.

    Raises:
        ValueError: A loss that is not finite.
    """
    key = _digest(
        checkpoint_id(checkpoint, (args.model_init_kwargs or {}).get("revision")),
        rows_digest or _rows_digest(dataset),
        quantization_config,
        *(getattr(args, name) for name in SCORING),
    )
    file = cache_dir() / "confidence" / f"{key[:16]}.npy"
    if (cached := _main_process_says(np.load(file) if file.exists() else None)) is not None:
        return cached
    scoring_args = _plain(args, Path(args.output_dir))
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
    rows = np.asarray(trainer.train_dataset.with_format(None)[ROW][:])
    scores = _score(trainer)
    if not np.isfinite(scores).all():
        bad = rows[~np.isfinite(scores)]
        raise ValueError(
            f"The loss of {len(bad)} rows (first: row {bad[0]}) is not finite under {checkpoint}: "
            "it has diverged. Lower `learning_rate`, or score with other `checkpoints`."
        )
    nlls = np.full(len(dataset), np.nan)
    nlls[rows] = scores
    if trainer.accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npy")
        np.save(partial, nlls)
        os.replace(partial, file)
    trainer.accelerator.wait_for_everyone()
    del trainer, model
    _free_memory()
    return nlls


@torch.no_grad()
def _score(trainer: SFTMixTrainer) -> np.ndarray:
    from tqdm.auto import tqdm

    loader = trainer.get_eval_dataloader(trainer.train_dataset)
    accelerator = trainer.accelerator
    model = accelerator.prepare_model(trainer.model, evaluation_mode=True).eval()
    attach_head(trainer.model)
    scores = []
    for batch in tqdm(loader, desc="Scoring", disable=not accelerator.is_main_process):
        with accelerator.autocast():
            output = model(**batch, fused_lm_head=True)
        means = -output.log_probs.double().sum(1) / output.label_mask.sum(1)
        scores.append(accelerator.gather_for_metrics(means).cpu())
    return torch.cat(scores).numpy()


def _plain(args: SFTMixConfig, output_dir: Path) -> SFTMixConfig:
    """A copy of the settings for plain SFT, without mixup, evaluation, trackers or pushing."""
    plain = copy.copy(args)
    plain.output_dir = str(output_dir)
    plain.mixup_weight, plain.dco_n_samples = 0.0, 0
    plain.eval_strategy, plain.load_best_model_at_end, plain.eval_on_start = "no", False, False
    plain.report_to, plain.push_to_hub = [], False
    plain.resume_from_checkpoint = None
    return plain


def _load(checkpoint: str, args: SFTMixConfig, quantization_config):
    """A model that `SFTTrainer` takes, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=args.trust_remote_code)
    if not (Path(checkpoint) / "adapter_config.json").exists():
        return checkpoint, tokenizer
    from peft import AutoPeftModelForCausalLM

    loading = dict(args.model_init_kwargs or {})
    loading["dtype"] = loading.get("dtype") or "float32"  # as TRL loads
    loading.pop("revision", None)  # the base's, not the adapter's
    args.model_init_kwargs = None
    model = AutoPeftModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantization_config, **loading
    )
    return model, tokenizer


def _complete_checkpoints(folder: Path) -> list[str]:
    """Checkpoints in order of their steps; one cut off while it was saved lacks its state."""
    steps = {
        int(state.parent.name.rpartition("-")[2]): str(state.parent)
        for state in folder.glob("checkpoint-*/trainer_state.json")
    }
    return [steps[step] for step in sorted(steps)]


def _main_process_says(value):
    """The main process's value, on every rank: others may not see the same files."""
    return broadcast_object_list([value])[0]


def _free_memory() -> None:
    gc.collect()  # a model with the fused head refers to itself
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _adapter_settings(peft_config) -> str:
    if peft_config is None:
        return ""
    # Sets print in another order in each process, and PEFT fills in the base model's name later
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in peft_config.to_dict().items()
        if key != "base_model_name_or_path"
    }
    return json.dumps(settings, sort_keys=True, default=str)


def _rows_digest(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    columns = [c for c in dataset.column_names if c != CONFIDENCE]
    for row in dataset.select_columns(columns).with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _digest(*parts) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
