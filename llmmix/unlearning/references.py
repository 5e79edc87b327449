"""What the model was before unlearning: by its adapter switched off, by numbers kept, by a copy."""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from llmmix.models import eval_mode
from llmmix.unlearning.qa import pad
from llmmix.unlearning.rows import PARTS, ForgetRows, forward_parts

KINDS = ("auto", "adapter", "precomputed", "copy")


class Reference:
    """The reference model of a trainer, made before the first step.

    Args:
        trainer: Whose model, as it is now, is the reference.
        kind: One of `KINDS`; `auto` takes the first of them that serves.
        fresh_adapter: Whether the trainer's own new adapter is all that is trained.
        logps_of_training_rows_suffice: Whether nothing else will be asked for.

    Raises:
        ValueError: A kind that does not serve, or that parameters spread over processes do not
            allow.
    """

    def __init__(
        self, trainer, kind: str, *, fresh_adapter: bool, logps_of_training_rows_suffice: bool
    ):
        if kind == "auto":
            rest = "precomputed" if logps_of_training_rows_suffice else "copy"
            kind = "adapter" if fresh_adapter else rest
        if kind == "adapter" and not fresh_adapter:
            raise ValueError(
                "`reference='adapter'` switches a new adapter off, and none is made here that "
                "leaves the weights as they are: set `use_peft` (`peft_config`), or another "
                "`reference`."
            )
        if kind == "precomputed" and not logps_of_training_rows_suffice:
            raise ValueError(
                "`reference='precomputed'` keeps log-probabilities of the training rows, and this "
                "run needs more: another loss's, or evaluation rows'. Use 'copy', or LoRA with "
                "'adapter'."
            )
        spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if kind != "adapter" and spread:
            raise ValueError(
                f"`reference={kind!r}` needs the model whole on every process, which FSDP and "
                "DeepSpeed do not leave it. Train an adapter (`use_peft`): it is switched off."
            )
        self.kind, self._trainer = kind, trainer
        self._logps: dict[tuple, float] = {}
        self._copy: nn.Module | None = None
        if kind == "copy":
            self._copy = copy.deepcopy(trainer.model).requires_grad_(False).eval()
            trainer.accelerator.wait_for_everyone()

    @contextmanager
    def model(self, model: nn.Module):
        """The reference, to be called like the model, without gradients and without dropout."""
        trainer = self._trainer
        with torch.no_grad(), trainer.accelerator.autocast():
            if self._copy is not None:
                yield self._copy
                return
            # PEFT makes every weight of the adapter trainable when it is switched on again
            frozen = [weight for weight in model.parameters() if not weight.requires_grad]
            try:
                with eval_mode(model), trainer.accelerator.unwrap_model(model).disable_adapter():
                    yield model
            finally:
                for weight in frozen:
                    weight.requires_grad_(False)

    def forward(
        self, model: nn.Module, batch: dict, parts: Sequence[str], wanted: Sequence[str], **options
    ) -> tuple[dict, object]:
        """`forward_parts` of the reference on those parts of a batch that are wanted."""
        with self.model(model) as reference:
            return forward_parts(reference, select(batch, parts, wanted), wanted, **options)

    def logps(self, model, batch: dict, parts: Sequence[str], part: str) -> Tensor:
        """(B,) summed log-probabilities of a part's answers under the reference."""
        if self.kind != "precomputed":
            found, _ = self.forward(model, batch, parts, [part])
            return found[part][0].sum(1)
        numbers = batch["template_number"].tolist()
        keys = zip(batch["row"].tolist(), numbers, strict=True)
        asked = [(part, row, number * (part == "template")) for row, number in keys]
        if missing := [key for key in asked if key not in self._logps]:
            raise ValueError(
                f"`reference='precomputed'` kept nothing for {missing[0]} (part, row, template), "
                "which `train` did not foresee. Use `reference='copy'`."
            )
        return torch.tensor([self._logps[key] for key in asked], device=batch["row"].device)

    def precompute(self, rows: ForgetRows, epochs: int, parts: Sequence[str]) -> None:
        """Keep the log-probabilities that so many epochs will ask for; the processes share them.

        Once: later the model is another.
        """
        if self.kind != "precomputed" or self._logps:
            return
        trainer, sequences = self._trainer, {}
        for row in range(len(rows)):
            sequences["forget", row, 0] = rows.forget[row]
            if "template" in parts:
                for number in {rows.template_of(row, epoch) for epoch in range(epochs)}:
                    sequences["template", row, number] = rows.template(row, number)
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        mine = sorted(sequences, key=lambda key: len(sequences[key].ids))[rank::world]
        size, found = trainer.args.per_device_eval_batch_size, []
        model = trainer.accelerator.unwrap_model(trainer.model)
        with eval_mode(model), torch.no_grad(), trainer.accelerator.autocast():
            for start in range(0, len(mine), size):
                keys = mine[start : start + size]
                batch = _padded([sequences[key] for key in keys], model.device)
                parts, _ = forward_parts(model, batch, ["forget"])
                found += zip(keys, parts["forget"][0].sum(1).tolist(), strict=True)
        self._logps = dict(gather_object(found))


def _padded(sequences, device) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in pad(sequences).items()}


def select(batch: dict, parts: Sequence[str], wanted: Sequence[str]) -> dict:
    """The rows of some parts of a batch."""
    ordered = [part for part in PARTS if part in parts]
    places = [ordered.index(part) for part in PARTS if part in wanted]
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.cat([batch[name].chunk(len(parts))[p] for p in places]) for name in names}


def logits_of(parts: Sequence[str], wanted: Sequence[str]) -> Callable:
    """A `head_objective`: the (N, V) logits at the scored positions of each part that is wanted."""
    ordered = [part for part in PARTS if part in parts]

    def objective(hidden, labels, head):
        chunks = zip(hidden.chunk(len(ordered)), labels.chunk(len(ordered)), strict=True)
        found = dict(zip(ordered, chunks, strict=True))
        return {part: head.logits(found[part][0][found[part][1] != -100]) for part in wanted}

    return objective


@contextmanager
def tap(model: nn.Module, layer: int):
    """A list that the hidden states (B, T, d) a layer puts out are appended to."""
    caught: list[Tensor] = []

    def hook(module, inputs, output):
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a decoder, in or under any wrapper.

    Raises:
        ValueError: No list of modules is as long as the configuration says.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of its {depth} layers: rmu needs one.")
