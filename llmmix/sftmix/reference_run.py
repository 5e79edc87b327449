"""The reference of SFTMix's stage 1: plain SFT that keeps checkpoints on its way.

A finished reference is not trained twice and an interrupted one goes on from its last checkpoint:
its folder is named after its data and settings. scoring.py scores rows under it.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from datasets import Dataset

from llmmix.files import checkpoint_id, read_json, write_whole
from llmmix.models import free_memory
from llmmix.processes import main_process_says
from llmmix.sftmix.pairing import CONFIDENCE
from llmmix.sftmix.trainer import SFTMixConfig, SFTMixTrainer
from llmmix.training.completeness import complete_checkpoints
from llmmix.training.lines import log_lines
from llmmix.training.resuming import newest_checkpoint

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

logger = get_logger(__name__)

# Settings that do not change what a reference learns or how a row is scored
IRRELEVANT = (
    "output_dir report_to run_name push_to_hub hub_ log local_ save_ eval_ do_ resume_ load_best_ "
    "metric_ greater_ disable_tqdm mixup_ dco_ dataloader_ per_device_eval_ project trackio_ ddp_ "
    "padding_free loss_type gce_ threshold_ eaft_ focal_ label_smoothing_ gem_"
).split()


def train_reference(
    dataset: Dataset,
    args: SFTMixConfig,
    model: str,
    num_checkpoints: int | None = None,
    peft_config: "PeftConfig | None" = None,
    quantization_config: "QuantizationConfigMixin | None" = None,
    *,
    rows_digest: str | None = None,
) -> list[str]:
    """Plain SFT under `args.output_dir`, keeping checkpoints at equal distances.

    Args:
        dataset: Rows in a format of `SFTTrainer`.
        args: Settings of the run.
        model: Checkpoint to start from.
        num_checkpoints: C; by default one an epoch, and at least two.
        peft_config: Adapter to train.
        quantization_config: How to quantize the model.
        rows_digest: Digest of the rows, when the caller has it already.

    Returns:
        The checkpoint folders, first to last: one every ceil(steps / C) steps and the last, so
        fewer than C when the steps do not divide.

    Raises:
        ValueError: `num_checkpoints` is below 1.
    """
    if num_checkpoints is None:
        num_checkpoints = max(2, int(args.num_train_epochs))
    if num_checkpoints < 1:
        raise ValueError(f"`num_checkpoints` must be at least 1, got {num_checkpoints}.")
    key = digest(
        checkpoint_id(model, loading_settings(args).get("revision")),
        rows_digest or digest_of_rows(dataset),
        _relevant_settings(args),
        _adapter_settings(peft_config),
        quantization_config,
        args.world_size,
        num_checkpoints,
    )
    folder = Path(args.output_dir or ".") / f"reference-{key[:12]}"
    finished = folder / "finished.json"
    if (kept := main_process_says(read_json(finished))) is not None:
        logger.warning("Using the reference in %s, trained before.", folder)
        return kept
    reference_args = plain_sft(args, folder)
    reference_args.save_strategy = "steps"
    # Below 1 it is a share of the run; a run's last step is saved in any case
    reference_args.save_steps = 1 / num_checkpoints if num_checkpoints > 1 else 10**9
    # All are kept until the end, and whole: an interrupted run goes on from the last
    reference_args.save_total_limit, reference_args.save_only_model = None, False
    trainer = SFTMixTrainer(
        model,
        args=reference_args,
        train_dataset=dataset,
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
    log_lines(trainer, f"Stage 1 of 3: training the reference, plain SFT on {len(dataset)} rows")
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    trainer.accelerator.wait_for_everyone()
    kept = main_process_says([str(path) for path in complete_checkpoints(folder)])
    if trainer.accelerator.is_main_process:
        write_whole(finished, json.dumps(kept))
        for state in folder.glob("checkpoint-*/optimizer.*"):
            state.unlink()  # two thirds of a checkpoint, and nothing resumes from here
    trainer.accelerator.wait_for_everyone()
    del trainer
    free_memory()
    return kept


def plain_sft(args: SFTMixConfig, output_dir: Path) -> SFTMixConfig:
    """A copy of the settings for plain SFT, without mixup, evaluation, trackers or pushing."""
    plain = copy.copy(args)
    plain.output_dir = str(output_dir)
    plain.mixup_weight, plain.dco_n_samples = 0.0, 0
    plain.loss_type, plain.label_smoothing_factor = "nll", 0.0
    plain.eval_strategy, plain.load_best_model_at_end, plain.eval_on_start = "no", False, False
    plain.report_to, plain.push_to_hub = [], False
    plain.resume_from_checkpoint = None
    return plain


def _relevant_settings(args: SFTMixConfig) -> str:
    """The settings that decide what a reference learns, as JSON."""
    settings = {
        key: value for key, value in args.to_dict().items() if not key.startswith(tuple(IRRELEVANT))
    }
    return json.dumps(settings, sort_keys=True, default=str)


def _adapter_settings(peft_config: "PeftConfig | None") -> str:
    if peft_config is None:
        return ""
    # Sets print in another order in each process, and PEFT fills in the base model's name later
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in peft_config.to_dict().items()
        if key != "base_model_name_or_path"
    }
    return json.dumps(settings, sort_keys=True, default=str)


def loading_settings(args: SFTMixConfig) -> dict[str, Any]:
    """A copy of the config's `model_init_kwargs`."""
    return dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # declared as text too


def digest_of_rows(dataset: Dataset) -> str:
    """A digest of the rows, their confidence left out."""
    content = hashlib.sha256()
    columns = [c for c in dataset.column_names if c != CONFIDENCE]
    for row in dataset.select_columns(columns).with_format(None):
        content.update(json.dumps(row, sort_keys=True, default=str).encode())
    return content.hexdigest()


def digest(*parts: object) -> str:
    """SHA-256 of the values as text."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
