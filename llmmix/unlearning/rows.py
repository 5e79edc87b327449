"""Rows to forget, each with a template answer and a row to retain, for the steps of unlearning.

The template and the retained row of a forgotten one are drawn from (seed, epoch, row) alone. So
they are the same whatever the batch, the number of processes, of loader workers or of accumulation
steps, and a run that was killed draws what it would have drawn.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from llmmix.data import pad
from llmmix.processes import warn_once
from llmmix.rows.prompts import Encoded, Options, Prompt, encode_answer, options_of
from llmmix.rows.weights import ROW, has_column, row_weights
from llmmix.unlearning import qa
from llmmix.unlearning.parts import PARTS, in_order
from llmmix.unlearning.templates import REFUSALS, Templates, check_templates, templates_of


class ForgetRows(torch.utils.data.Dataset):
    """Rows to forget, indexed by `epoch * len(self) + row`; see `EpochSampler`.

    Args:
        rows: Rows to forget: `prompt` and `answer` as `qa.read_rows` gives them, and perhaps
            `template`, a text or a list of texts, and `weight`, which a batch passes on.
        tokenizer: The model's tokenizer.
        parts: Which of `PARTS` an item has.
        retain: Rows to retain, where `parts` has them; one is drawn for each forgotten row, with
            replacement.
        templates: Texts to draw from where a row has none of its own, or a function of a row.
        resample: Draw a template again in each epoch, instead of once.
        include_eos: Score the end-of-sequence token.
        skip_tokens: Number of first tokens of each answer to forget that are not scored; the last
            token of an answer always is.
        max_length: Rows that are longer in tokens, with any of their templates, are dropped and
            counted.
        seed: Seed of the draws.

    Raises:
        ValueError: No row is left; a template is the answer of its row; a row stands among those to
            forget and those to retain; a template is asked for and a row has no question.
    """

    def __init__(
        self,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        parts: Sequence[str] = PARTS,
        retain: Dataset | None = None,
        templates: Templates = REFUSALS,
        resample: bool = True,
        include_eos: bool = True,
        skip_tokens: int = 0,
        max_length: int | None = None,
        seed: int = 0,
    ):
        self.tokenizer, self.parts, self.seed = tokenizer, tuple(parts), seed
        self.resample, self.include_eos = resample, include_eos
        prompts, answers = rows["prompt"][:], rows["answer"][:]
        options = options_of(rows)
        own = templates_of(rows, templates) if "template" in parts else [[] for _ in prompts]
        check_templates(prompts, answers, own)
        if retain is not None and "retain" in parts:
            pairs = zip(prompts, answers, strict=True)
            _check_overlap([prompt or answer for prompt, answer in pairs], retain)
        encoded, whence = self._encode_all(prompts, answers, options, max_length)
        if len(encoded) > len(prompts):  # text alone is cut into rows
            prompts, own = [""] * len(encoded), [[]] * len(encoded)
            options = [{}] * len(encoded)
        longest = [
            max([len(e.ids), *(len(self._encode(prompt, t, asked).ids) for t in _longest(ts))])
            for e, prompt, asked, ts in zip(encoded, prompts, options, own, strict=True)
        ]
        kept = _usable(encoded, longest, max_length, "rows to forget")
        self.prompts = [prompts[row] for row in kept]
        self.options = [options[row] for row in kept]
        self.templates = [own[row] for row in kept]
        self.weighed = has_column(rows, ROW)
        self.weights = _weights_of(rows, [whence[row] for row in kept], "rows to forget")
        # `attach_mixture` reads `domain`, unless a row was cut into several, and `pass_length`
        whole = "domain" in rows.column_names and len(prompts) == len(rows)
        self.domain = [rows["domain"][row] for row in kept] if whole else None
        self.pass_length = len(kept)
        self.forget = [
            Encoded(ids, min(start + skip_tokens, len(ids) - 1))
            for ids, start in (encoded[row] for row in kept)
        ]
        self.retain: list[Encoded] = []
        self.retain_weights: list[float] = []
        if retain is not None and "retain" in parts:
            asked = options_of(retain)
            found, whence = self._encode_all(retain["prompt"], retain["answer"], asked, max_length)
            kept = _usable(found, [len(e.ids) for e in found], max_length, "rows to retain")
            self.retain = [found[row] for row in kept]
            self.weighed |= has_column(retain, ROW)
            whence = [whence[row] for row in kept]
            self.retain_weights = _weights_of(retain, whence, "rows to retain")

    def _encode_all(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        options: Sequence[Options],
        max_length: int | None,
    ) -> tuple[list[Encoded], list[int]]:
        """A sequence for each row, and the row of each sequence.

        Text without a prompt that is too long is cut into pieces.
        """
        found = [self._encode(*row) for row in zip(prompts, answers, options, strict=True)]
        if max_length is None or any(prompts):
            return found, list(range(len(found)))
        pieces = [
            (piece, row) for row, each in enumerate(found) for piece in qa.cut(each, max_length)
        ]
        return [piece for piece, _ in pieces], [row for _, row in pieces]

    def _encode(self, prompt: Prompt, answer: str, options: Options) -> Encoded:
        return encode_answer(
            self.tokenizer, prompt, answer, include_eos=self.include_eos, options=options
        )

    def __len__(self) -> int:
        return len(self.forget)

    def template_of(self, row: int, epoch: int) -> int:
        """Which of a row's templates an epoch has."""
        stream = random.Random(f"template {self.seed} {epoch if self.resample else 0} {row}")
        return stream.randrange(len(self.templates[row]))

    def template(self, row: int, number: int) -> Encoded:
        """A row's question with one of its templates for an answer."""
        return self._encode(self.prompts[row], self.templates[row][number], self.options[row])

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, row = divmod(index, len(self))
        item: dict[str, Any] = {"row": row, "forget": self.forget[row]}
        if self.weighed:
            item[ROW] = self.weights[row]
        if "template" in self.parts:
            item["template_number"] = number = self.template_of(row, epoch)
            item["template"] = self.template(row, number)
        if "retain" in self.parts:
            stream = random.Random(f"retain {self.seed} {epoch} {row}")
            drawn = stream.randrange(len(self.retain))
            item["retain"] = self.retain[drawn]
            if self.weighed:
                item["retain_weight"] = self.retain_weights[drawn]
        return item

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One padded batch of all parts, [template; forget; retain], of equally many rows each.

        Where rows have weights, `weight` has one for each row of each part.
        """
        sequences = [item[part] for part in in_order(self.parts) for item in items]
        batch = pad(sequences, self.tokenizer.pad_token_id)
        batch["row"] = torch.tensor([item["row"] for item in items])
        batch["template_number"] = torch.tensor([item.get("template_number", 0) for item in items])
        if ROW in items[0]:  # of rows to evaluate, which may have weights where ours have none
            names = ["retain_weight" if part == "retain" else ROW for part in in_order(self.parts)]
            batch[ROW] = torch.tensor([item[name] for name in names for item in items])
        return batch


class EpochSampler(Sampler[int]):
    """A permutation of the rows each epoch, as `epoch * size + row`: the dataset learns the epoch.

    It depends on (seed, epoch) alone.

    Args:
        size: Number of rows.
        seed: Seed of the permutations.
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


def _weights_of(rows: Dataset, kept: list[int], argument: str) -> list[float]:
    """The weights of the rows that are kept, 1 where rows have none."""
    if not has_column(rows, ROW):
        return [1.0] * len(kept)
    weights = row_weights(rows, argument)
    return [weights[row] for row in kept]


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


def _check_overlap(asked: list[Prompt], retain: Dataset) -> None:
    texts = zip(retain["prompt"], retain["answer"], strict=True)
    if both := qa.overlap(asked, [prompt or answer for prompt, answer in texts]):
        raise ValueError(
            f"{len(both)} questions or texts stand both among the rows to forget and among those "
            f"to retain (first: {str(both[0])[:120]!r}). Remove them from one."
        )
