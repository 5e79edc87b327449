"""Stage 1 of SFTMix: train a reference with plain SFT, and score each example's confidence.

    reference   plain SFT on the dataset, keeping C checkpoints (or checkpoints given)
    score       mean response-token NLL of every example under every checkpoint
    confidence  minus the mean perplexity over checkpoints, in a column `confidence`

A finished reference is not trained twice and an interrupted one goes on from its last checkpoint:
its folder is named after its data and settings. Scores are cached by the content of the checkpoint
and of the rows.
"""

import copy
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from llmmix.cache import cache_dir, file_digest
from llmmix.head import attach_head
from llmmix.sftmix import CONFIDENCE, SFTMixConfig, SFTMixTrainer, confidence

logger = logging.getLogger(__name__)

ROW = "__row__"  # carries a row's number through the trainer's preparation, which may drop rows

# What a reference run's result depends on, beside its data and its model
SETTINGS = (
    "learning_rate num_train_epochs max_steps per_device_train_batch_size world_size "
    "gradient_accumulation_steps seed data_seed lr_scheduler_type warmup_steps weight_decay optim "
    "max_length truncation_mode completion_only_loss assistant_only_loss bf16 fp16"
).split()


def add_confidence(
    dataset: Dataset,
    args: SFTMixConfig,
    *,
    model: str | None = None,
    checkpoints: list[str] | None = None,
    num_checkpoints: int | None = None,
    peft_config=None,
) -> Dataset:
    """The dataset with a `confidence` column; rows without a score are dropped and counted.

    Args:
        dataset: Rows in a format of `SFTTrainer`.
        args: Settings of the reference run and of the scoring.
        model: Checkpoint that the reference starts from, when no `checkpoints` are given.
        checkpoints: Folders or hub ids to score with, adapters and other models included.
        num_checkpoints: C, how many checkpoints the reference keeps; by default one an epoch, and
            at least two.
        peft_config: Adapter of the reference run.

    Raises:
        ValueError: Neither `model` nor `checkpoints`, or C below 1.
    """
    if not checkpoints:
        if model is None:
            raise ValueError("Give the `model` to train a reference from, or `checkpoints`.")
        checkpoints = train_reference(dataset, args, model, num_checkpoints, peft_config)
    nlls = np.stack([mean_nlls(dataset, args, checkpoint) for checkpoint in checkpoints])
    scores = confidence(torch.from_numpy(nlls)).numpy()
    scored = np.flatnonzero(~np.isnan(scores))
    if dropped := len(dataset) - len(scored):
        logger.warning(
            "Dropped %d of %d rows that have no response token to score.", dropped, len(dataset)
        )
    if CONFIDENCE in dataset.column_names:
        dataset = dataset.remove_columns(CONFIDENCE)
    return dataset.select(scored).add_column(CONFIDENCE, scores[scored])


def train_reference(
    dataset: Dataset,
    args: SFTMixConfig,
    model: str,
    num_checkpoints: int | None = None,
    peft_config=None,
) -> list[str]:
    """Plain SFT under `args.output_dir`, keeping checkpoints at equal distances.

    Returns:
        The checkpoint folders, first to last. Fewer than asked for when there are fewer steps.

    Raises:
        ValueError: `num_checkpoints` below 1.
    """
    if num_checkpoints is None:
        num_checkpoints = max(2, int(args.num_train_epochs))
    if num_checkpoints < 1:
        raise ValueError(f"`num_checkpoints` must be at least 1, got {num_checkpoints}.")
    settings = [str(getattr(args, name)) for name in SETTINGS]
    settings += [model, str(num_checkpoints), _adapter_settings(peft_config), _rows_digest(dataset)]
    key = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
    folder = Path(args.output_dir) / f"reference-{key}"
    finished = folder / "finished.json"
    if finished.exists():
        logger.warning("Using the reference in %s, trained before.", folder)
        return json.loads(finished.read_text())
    reference_args = _plain(args, folder)
    reference_args.save_strategy = "steps"
    # Below 1 it is a share of the run; a run's last step is saved in any case
    reference_args.save_steps = 1 / num_checkpoints if num_checkpoints > 1 else 10**9
    reference_args.save_total_limit = None
    trainer = SFTMixTrainer(
        model, args=reference_args, train_dataset=dataset, peft_config=peft_config
    )
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    kept = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    kept = [str(path) for path in kept]
    if trainer.accelerator.is_main_process:
        for state in folder.glob("checkpoint-*/optimizer.*"):
            state.unlink()  # two thirds of a checkpoint, and nothing resumes from here
        finished.write_text(json.dumps(kept))
    trainer.accelerator.wait_for_everyone()
    return kept


def mean_nlls(dataset: Dataset, args: SFTMixConfig, checkpoint: str) -> np.ndarray:
    """Mean response-token NLL in nats of each row under a checkpoint; NaN where nothing is scored.

    Rows are tokenized and cut by the checkpoint's own tokenizer as `SFTTrainer` would.

    Args:
        dataset: (n) rows.
        args: `per_device_eval_batch_size` and what concerns tokenization is used.
        checkpoint: Folder (an adapter's too) or hub id.

    Returns:
        (n,) fp64.
    """
    settings = [str(getattr(args, name)) for name in SETTINGS[-6:]]
    key = "\n".join([_checkpoint_digest(checkpoint), _rows_digest(dataset), *settings])
    file = cache_dir() / "confidence" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if file.exists():
        return np.load(file)
    rows = dataset.add_column(ROW, np.arange(len(dataset)))
    scoring_args = _plain(args, Path(args.output_dir))
    model, tokenizer = _load(checkpoint, scoring_args)
    trainer = SFTMixTrainer(
        model, args=scoring_args, train_dataset=rows, processing_class=tokenizer
    )
    kept = np.asarray(trainer.train_dataset[ROW][:])
    nlls = np.full(len(dataset), np.nan)
    nlls[kept] = _score(trainer)
    if trainer.accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, nlls)
    trainer.accelerator.wait_for_everyone()
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
    plain.eval_strategy, plain.load_best_model_at_end = "no", False
    plain.report_to, plain.push_to_hub = [], False
    plain.resume_from_checkpoint = None
    return plain


def _load(checkpoint: str, args: SFTMixConfig):
    """A model that `SFTTrainer` takes, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if not (Path(checkpoint) / "adapter_config.json").exists():
        return checkpoint, tokenizer
    from peft import AutoPeftModelForCausalLM

    args.model_init_kwargs = None  # the adapter's own configuration names its base
    return AutoPeftModelForCausalLM.from_pretrained(checkpoint), tokenizer


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


def _checkpoint_digest(checkpoint: str) -> str:
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    files = [*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("token*")]
    return file_digest(*sorted(files))


def _rows_digest(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    columns = [c for c in dataset.column_names if c != CONFIDENCE]
    for row in dataset.select_columns(columns):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()
