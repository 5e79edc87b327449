"""What a step of unlearning reads: rows to forget, each with a template answer and a row to retain.

The template and the retained row of a forgotten one are drawn from (seed, epoch, row) alone. So
they are the same whatever the batch, the number of processes, of loader workers or of accumulation
steps, and a run that was killed draws what it would have drawn.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer

from llmmix.data import warn_once
from llmmix.unlearning import qa
from llmmix.unlearning.qa import Encoded, encode_answer
from llmmix.unlearning.templates import REFUSALS, clean_templates, load_templates


@dataclass
class RetainArguments:
    """Rows to retain, as the recipes of unlearning take them."""

    retain_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Rows to retain, for a loss that needs them; NAME@CONFIG for the hub."},
    )
    retain_dataset_split: str = field(default="train", metadata={"help": "Split of it."})


PARTS = ("template", "forget", "retain")  # in this order in a batch


class ForgetRows(torch.utils.data.Dataset):
    """Rows to forget, by `epoch * len(self) + row`; see `EpochSampler`.

    Args:
        rows: To forget: `prompt` and `answer` as `qa.read_rows` gives them, and perhaps `template`,
            a text or a list of texts.
        tokenizer: Of the model.
        parts: Which of `PARTS` an item has.
        retain: Rows to retain, where `parts` has them; one is drawn for each forgotten row, with
            replacement.
        templates: Texts to draw from where a row has none of its own, or a function of a row.
        resample: Draw a template anew each epoch, instead of once.
        include_eos: Score the end-of-sequence token.
        skip_tokens: First tokens of each answer to forget that are not scored, the last one aside.
        max_length: Rows that are longer in tokens, with any of their templates, are dropped and
            counted.
        seed: Of the draws.

    Raises:
        ValueError: No row is left; a template that is the answer; rows that are to be forgotten and
            retained; a template asked for and a row without a question.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer,
        *,
        parts: Sequence[str] = PARTS,
        retain: Dataset | None = None,
        templates: Sequence[str] | Callable[[dict], list[str]] = REFUSALS,
        resample: bool = True,
        include_eos: bool = True,
        skip_tokens: int = 0,
        max_length: int | None = None,
        seed: int = 0,
    ):
        self.tokenizer, self.parts, self.seed = tokenizer, tuple(parts), seed
        self.resample, self.include_eos = resample, include_eos
        prompts, answers = rows["prompt"][:], rows["answer"][:]
        own = _own_templates(rows, templates) if "template" in parts else [[] for _ in prompts]
        _check_templates(prompts, answers, own)
        if "retain" in parts:
            pairs = zip(prompts, answers, strict=True)
            _check_overlap([prompt or answer for prompt, answer in pairs], retain)
        encoded = self._encode_all(prompts, answers, max_length)
        if len(encoded) > len(prompts):  # text alone is cut into rows
            prompts, own = [""] * len(encoded), [[]] * len(encoded)
        longest = [
            max([len(e.ids), *(len(self._encode(prompt, t).ids) for t in _longest(ts))])
            for e, prompt, ts in zip(encoded, prompts, own, strict=True)
        ]
        kept = _usable(encoded, longest, max_length, "rows to forget")
        self.prompts = [prompts[row] for row in kept]
        self.templates = [own[row] for row in kept]
        # Of each row, where it says and was not cut into several; `attach_mixture` reads both
        whole = "domain" in rows.column_names and len(prompts) == len(rows)
        self.domain = [rows["domain"][row] for row in kept] if whole else None
        self.pass_length = len(kept)
        self.forget = [
            Encoded(ids, min(start + skip_tokens, len(ids) - 1))
            for ids, start in (encoded[row] for row in kept)
        ]
        self.retain: list[Encoded] = []
        if "retain" in parts:
            found = self._encode_all(retain["prompt"], retain["answer"], max_length)
            kept = _usable(found, [len(e.ids) for e in found], max_length, "rows to retain")
            self.retain = [found[row] for row in kept]

    def _encode_all(self, prompts, answers, max_length: int | None) -> list[Encoded]:
        """One a row; text alone that is too long in pieces."""
        found = [self._encode(*pair) for pair in zip(prompts, answers, strict=True)]
        if max_length is None or any(prompts):
            return found
        return [piece for encoded in found for piece in qa.cut(encoded, max_length)]

    def _encode(self, prompt, answer: str) -> Encoded:
        return encode_answer(self.tokenizer, prompt, answer, include_eos=self.include_eos)

    def __len__(self) -> int:
        return len(self.forget)

    def template_of(self, row: int, epoch: int) -> int:
        """Which of a row's templates an epoch has."""
        stream = random.Random(f"template {self.seed} {epoch if self.resample else 0} {row}")
        return stream.randrange(len(self.templates[row]))

    def template(self, row: int, number: int) -> Encoded:
        """A row's question with one of its templates for an answer."""
        return self._encode(self.prompts[row], self.templates[row][number])

    def __getitem__(self, index: int) -> dict:
        epoch, row = divmod(index, len(self))
        item = {"row": row, "forget": self.forget[row]}
        if "template" in self.parts:
            item["template_number"] = number = self.template_of(row, epoch)
            item["template"] = self.template(row, number)
        if "retain" in self.parts:
            stream = random.Random(f"retain {self.seed} {epoch} {row}")
            item["retain"] = self.retain[stream.randrange(len(self.retain))]
        return item

    def collate(self, items: list[dict]) -> dict:
        """One padded batch of all parts, [template; forget; retain], of equally many rows each."""
        sequences = [item[part] for part in PARTS if part in self.parts for item in items]
        batch = qa.pad(sequences, self.tokenizer.pad_token_id)
        batch["row"] = torch.tensor([item["row"] for item in items])
        batch["template_number"] = torch.tensor([item.get("template_number", 0) for item in items])
        return batch


class EpochSampler(Sampler[int]):
    """A permutation each epoch, of `epoch * size + row`, which tells the dataset the epoch.

    It depends on (seed, epoch) alone.

    Args:
        size: Rows.
        seed: Of the permutations.
        epoch: Returns the current epoch when an iteration begins.
    """

    def __init__(self, size: int, seed: int, epoch: Callable[[], int]):
        self._size, self._seed, self._epoch = size, seed, epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        epoch = self._epoch()
        order = np.random.default_rng([self._seed, epoch]).permutation(self._size)
        yield from (epoch * self._size + order).tolist()


def epoch_sampler(trainer: Trainer) -> EpochSampler:
    """The sampler of a trainer's `ForgetRows`."""
    rows = trainer.train_dataset
    return EpochSampler(len(rows), rows.seed, lambda: int(trainer.state.epoch or 0))


def check_args(args, train_dataset) -> None:
    """Have TRL leave rows to forget as they are, for `prepare_rows`.

    Raises:
        ValueError: Rows that are not a map-style dataset, or none; callbacks that transformers is
            to make anew on resume.
    """
    if not isinstance(train_dataset, Dataset) or not len(train_dataset):
        raise ValueError(
            "`train_dataset` must be a map-style `Dataset` of rows to forget, at least one, got "
            f"{'no rows' if isinstance(train_dataset, Dataset) else type(train_dataset).__name__}."
        )
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "`restore_callback_states_from_checkpoint` makes callbacks anew that need the trainer; "
            "they find their own state. Leave it at False."
        )
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    args.remove_unused_columns = False


def prepare_rows(
    trainer: Trainer, parts: Sequence[str], retain_dataset, templates, skip_tokens: int = 0
) -> Callable:
    """Replace the trainer's rows by `ForgetRows`, and its collator by theirs.

    Returns:
        A function (rows, argument) that prepares others alike; None and a name stay as they are.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    retain = retain_dataset
    if "retain" in parts:
        retain = qa.read_rows(retain_dataset, "retain_dataset", tokenizer)

    def prepared(rows, argument: str):
        if rows is None or isinstance(rows, str | ForgetRows):
            return rows
        if isinstance(rows, dict):
            return {name: prepared(part, name) for name, part in rows.items()}
        return ForgetRows(
            qa.read_rows(rows, argument, tokenizer),
            tokenizer,
            parts=parts,
            retain=retain,
            templates=templates,
            resample=args.resample_templates,
            include_eos=args.include_eos,
            skip_tokens=skip_tokens,
            max_length=args.max_length,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    trainer.train_dataset = prepared(trainer.train_dataset, "train_dataset")
    trainer.eval_dataset = prepared(trainer.eval_dataset, "eval_dataset")
    trainer.data_collator = trainer.train_dataset.collate
    return prepared


def count_window(accelerator, batches: list[dict], parts: Sequence[str], device) -> dict:
    """Rows with a scored token, and scored tokens, of each part of some batches: a tensor of two.

    Over every process where there is an accelerator; at least 1.
    """
    counts = torch.zeros(len(parts), 2, device=device)
    for batch in batches:
        scored = (batch["labels"][:, 1:] != -100).sum(1).view(len(parts), -1)
        counts += torch.stack([(scored > 0).sum(1), scored.sum(1)], 1).to(device)
    if accelerator is not None:
        counts = accelerator.gather(counts.unsqueeze(0)).sum(0)
    ordered = [part for part in PARTS if part in parts]
    return dict(zip(ordered, counts.clamp(min=1), strict=True))


def forward_parts(model, batch: dict, parts: Sequence[str], head_objective=None) -> tuple:
    """Token log-probabilities and masks (B, T-1) of each part, from one forward, and its output."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    extra = {} if head_objective is None else {"head_objective": head_objective}
    output = model(**inputs, fused_lm_head=True, **extra)
    ordered = [part for part in PARTS if part in parts]
    # A model spread over several GPUs answers on the device of its head
    answered = (x.to(batch["labels"].device) for x in (output.log_probs, output.label_mask))
    chunks = zip(*(x.chunk(len(parts)) for x in answered), strict=True)
    return dict(zip(ordered, chunks, strict=True)), output


def resolve_templates(file: str | None, given) -> Sequence[str] | Callable[[dict], list[str]]:
    """The templates of a file, those given, or our own list."""
    if given is not None:
        return given if callable(given) else clean_templates(list(given), "templates")
    return REFUSALS if file is None else load_templates(file)


def _own_templates(rows: Dataset, templates) -> list[list[str]]:
    """The templates of each row: its own, or those of all."""
    if "template" in rows.column_names:
        given = [[t] if isinstance(t, str) else list(t or []) for t in rows["template"]]
        if empty := [row for row, ts in enumerate(given) if not any(t.strip() for t in ts)]:
            raise ValueError(
                f"`template` is empty in {len(empty)} rows (first: row {empty[0]}). Fill it, or "
                "remove the column to use a list for all rows."
            )
        return [list(dict.fromkeys(t.strip() for t in ts if t.strip())) for ts in given]
    if callable(templates):
        return [clean_templates(list(templates(row)), "templates") for row in rows]
    return [list(templates)] * len(rows)


def _check_templates(prompts, answers, own: list[list[str]]) -> None:
    for row, (prompt, answer, templates) in enumerate(zip(prompts, answers, own, strict=True)):
        if templates and not prompt:
            raise ValueError(
                f"Row {row} has no question for a template to answer (rows of `text` alone have "
                "none). Use a loss that needs no template, such as npo or grad_diff."
            )
        said = " ".join(answer.split()).casefold()
        if any(" ".join(t.split()).casefold() == said for t in templates):
            raise ValueError(
                f"Row {row} is to forget {answer!r}, which is one of its templates too: it would "
                "be learned and forgotten at once. Remove the row or the template."
            )


def _longest(templates: list[str]) -> list[str]:
    """The few templates that may be the longest in tokens."""
    return sorted(templates, key=len)[-3:]


def _usable(
    encoded: list[Encoded], lengths: list[int], max_length: int | None, what: str
) -> list[int]:
    """Rows with a token to score that fit; the others are counted on the log."""
    scored = [row for row, (ids, start) in enumerate(encoded) if len(ids) > start]
    kept = [row for row in scored if max_length is None or lengths[row] <= max_length]
    if not kept:
        raise ValueError(
            f"None of the {len(encoded)} {what} has a token to score and fits into `max_length="
            f"{max_length}`; the shortest has {min(lengths, default=0)} tokens. Raise `max_length`."
        )
    if dropped := len(encoded) - len(scored):
        warn_once(f"Dropped {dropped} of {len(encoded)} {what}: no token to score.")
    if dropped := len(scored) - len(kept):
        warn_once(
            f"Dropped {dropped} of {len(encoded)} {what}: longer than max_length={max_length}, and "
            "an answer cut short is another answer."
        )
    return kept


def _check_overlap(asked: list, retain: Dataset) -> None:
    texts = zip(retain["prompt"], retain["answer"], strict=True)
    if both := qa.overlap(asked, [prompt or answer for prompt, answer in texts]):
        raise ValueError(
            f"{len(both)} questions or texts stand both among the rows to forget and among those "
            f"to retain (first: {str(both[0])[:120]!r}). Remove them from one."
        )
