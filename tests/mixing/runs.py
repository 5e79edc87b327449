"""Small runs of a trainer under a mixture: rows that say where they come from, and controllers."""

import functools
import json

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llmmix.files import read_record
from llmmix.mixing import MixtureCallback, MixtureSampler, attach_mixture, label_domains
from llmmix.mixing.controllers import Segment

SIZES = {"a": 7, "b": 12, "c": 5}  # 24 rows: six steps of four draws an epoch
WEIGHTS = (0.5, 0.25, 0.25)
SETTINGS = {
    "max_steps": 8,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
# `SFTTrainer` would build what the rows have already
PREPARED = {"dataset_kwargs": {"skip_prepare_dataset": True}}

ONE_HOT = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}
PHASES = (
    (ONE_HOT["a"], 1, "losses"),
    (ONE_HOT["c"], 3, None),
    (ONE_HOT["b"], 2, "train"),
    (ONE_HOT["a"], 0, "losses"),
    ([0.5, 0.5, 0], 1, "losses"),
)
PHASE_OF_STEP = [0, 2, 2, 2, 1, 1, None] * 3


def tokens_of(domain: int, row: int) -> list[int]:
    """Of uneven lengths, and told by the first of them."""
    first = 10 + 30 * domain + row
    return [first, *((7 * first + 11 * k) % 300 + 10 for k in range(2 + row % 5))]


@functools.cache  # `datasets` takes long to fingerprint what it makes
def rows_of(number: int, name: str, start: int, size: int) -> Dataset:
    ids = [tokens_of(number, row) for row in range(start, start + size)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def domain_rows(start: int = 0, sizes=SIZES) -> dict[str, Dataset]:
    return {name: rows_of(i, name, start, size) for i, (name, size) in enumerate(sizes.items())}


@functools.cache
def labelled_rows() -> Dataset:
    return label_domains(domain_rows())


def targets() -> dict[str, Dataset]:
    return domain_rows(12, dict.fromkeys(SIZES, 4))


def tiny_model(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=375,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            attention_dropout=dropout,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


class Watched(SFTTrainer):
    """Notes (domain, row) of what each step reads."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        read = [
            divmod(int(ids[mask.bool()][0]) - 10, 30)
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        if read:
            self.__dict__.setdefault("steps_read", []).append(read)
        return batches, items


def pad_left(rows):
    longest = max(len(row["input_ids"]) for row in rows) + 1
    ids, labels, mask = [], [], []
    for row in rows:
        pads = longest - len(row["input_ids"])
        ids.append([0] * pads + row["input_ids"])
        labels.append([-100] * (pads + 1) + row["labels"][1:])  # the first follows on nothing
        mask.append([0] * pads + [1] * (longest - pads))
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.tensor(values) for name, values in batch.items()}


def build(
    folder, tokenizer, *, kind=Watched, rows=None, dropout=0.0, trainer_options=None, **given
):
    """A trainer of the domains' rows."""
    args = SFTConfig(str(folder), **{**SETTINGS, **PREPARED, **given})
    return kind(
        tiny_model(dropout),
        args=args,
        train_dataset=labelled_rows() if rows is None else rows,
        processing_class=tokenizer,
        **{"eval_dataset": targets(), **(trainer_options or {})},
    )


def sampler_of(weights=WEIGHTS, **options) -> MixtureSampler:
    rows = {name: range(size) for name, size in SIZES.items()}
    return MixtureSampler(rows, weights, **{"seed": 3, **options})


def mixed(trainer, controller=None, weights=WEIGHTS, options=None, **callback_options):
    """Attach a mixture, with a controller where there is one."""
    sampler = sampler_of(weights, **(options or {}))
    make = None if controller is None else (lambda *_: controller)
    attach_mixture(trainer, sampler, MixtureCallback(sampler, make, **callback_options))
    return sampler


def finish(trainer, **options):
    """What is logged of each step, and the weights in the end."""
    trainer.train(**options)
    kept = ("step", "epoch", "loss", "grad_norm")
    log = [[e[k] for k in kept if k in e] for e in trainer.state.log_history if "loss" in e]
    weights = [p.detach().flatten().float() for p in trainer.model.parameters()]
    return log, torch.cat(weights)


def counts_of(folder) -> list[list[int]]:
    _, entries = read_record(folder)
    steps = [(e["step"], e["counts"]) for e in entries if "counts" in e]
    assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
    return [counts for _, counts in steps]


def record_of(folder):
    """All but what the clock says."""
    header, entries = read_record(folder)
    return header, [entry for entry in entries if "spent" not in entry]


def domains_read(trainer) -> list[list[int]]:
    """Rows of each domain that the steps read in truth."""
    return [
        np.bincount([domain for domain, _ in step], minlength=3).tolist()
        for step in trainer.steps_read
    ]


class Phases:
    """A sequence of segments, again and again, which notes what it is told."""

    def __init__(self, *phases):
        self.phases, self.weights = phases, np.array(WEIGHTS)
        self.told = []

    def plan(self, step, total_steps):
        plan, left = [], total_steps - step
        for weights, steps, measure in self.phases:
            now = min(steps, left)
            if now == steps or now:
                plan.append(Segment(np.array(weights, dtype=float), now, measure))
            left -= now
        return plan

    def observe(self, observation):
        told = observation._asdict() | {"shares": observation.shares.tolist()}
        told["signal"] = {name: x.tolist() for name, x in observation.signal.items()}
        self.told.append(told)

    def state_dict(self):
        return {"told": json.loads(json.dumps(self.told)), "weights": self.weights.tolist()}

    def load_state_dict(self, state):
        self.told = json.loads(json.dumps(state["told"]))
        self.weights = np.array(state["weights"])

    def record(self):
        return {"told": len(self.told)}


class Moving(Phases):
    """Whose mixtures follow from the losses: a run that errs once goes another way."""

    def __init__(self):
        super().__init__()

    def plan(self, step, total_steps):
        probe = np.eye(3)[len(self.told) % 3]
        first = () if self.told else ((self.weights, 0, "losses"),)
        self.phases = (*first, (probe, 2, "train"), (self.weights, 3, "losses"))
        return super().plan(step, total_steps)

    def observe(self, observation):
        super().observe(observation)
        if "losses" in observation.signal:
            tilt = np.exp(5 * (observation.signal["losses"] - observation.signal["losses"].mean()))
            self.weights = tilt / tilt.sum()


class Setting(TrainerCallback):
    """A user's own, which sets weights when an event has come to a step."""

    def __init__(self, sampler, weights: dict, event="on_step_end"):
        def act(args, state, control, **kwargs):
            if state.global_step in weights:
                sampler.set_weights(weights[state.global_step])

        setattr(self, event, act)
