"""RMU: hidden states of answers to forget are steered to a fixed vector (arXiv 2403.03218).

    forget   mean ||h - c u/|u|||^2 / d     h: a layer's output, u uniform in [0, 1)^d and fixed
    retain   mean ||h - h_ref||^2 / d       h_ref: the same of the model before unlearning

Only the layers up to the steered one are trained, three at most, and of these the down-projections
alone where there are such. Arithmetic: `rmu_loss` and `rmu_target` of llmmix/unlearning/losses.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmmix.unlearning.losses import rmu_loss, rmu_target
from llmmix.unlearning.objective import Loss, Objective
from llmmix.unlearning.parts import forward_parts, select
from llmmix.unlearning.references import Reference
from llmmix.unlearning.step import Step, Terms

if TYPE_CHECKING:
    from peft import PeftModel


class RMU(Objective):
    """The terms of rmu: both are of one layer's hidden states.

    Args:
        loss: The row of rmu.
        model: The model to unlearn.
        accelerator: The trainer's accelerator.
        parts: Parts of a batch.
        layer: Layer whose output is steered, from 0. None: 7, or half way in a model of fewer than
            14.
        steering: c.
        seed: Seed of u.
        **options: What else `Objective` takes.

    Raises:
        ValueError: The model has no such layer, or nothing is trainable there.
    """

    retains_by_row = True

    def __init__(
        self,
        loss: Loss,
        model: "PreTrainedModel | PeftModel",
        accelerator: Accelerator,
        parts: Sequence[str],
        *,
        layer: int | None,
        steering: float,
        seed: int,
        **options: Any,
    ):
        super().__init__(loss, model, accelerator, parts, **options)
        self.layer = _train_up_to(model, layer)
        size = model.config.get_text_config().hidden_size
        self.settings = {"target": rmu_target(size, steering, seed)}

    @staticmethod
    def check(retain_loss: str | None, settings: Mapping[str, Any]) -> None:
        """Refuse another retain term than that of rmu.

        Raises:
            ValueError: `retain_loss` is not "nll".
        """
        if retain_loss != "nll":
            raise ValueError("`retain_loss` is no setting of 'rmu', whose retain term is its own.")

    def forward(
        self, model: nn.Module, batch: dict[str, Tensor], reference: Reference | None
    ) -> Step:
        """One forward over all parts, which keeps the layer's hidden states."""
        with tap(self.accelerator.unwrap_model(model), self.layer) as caught:
            step = super().forward(model, batch, reference)
        hidden = _by_row(caught[0], batch["attention_mask"])
        step.hidden = dict(zip(step.parts, hidden.chunk(len(step.parts)), strict=True))
        return step

    def retain(self, step: Step) -> Terms:
        """The distance of the retained rows' hidden states from those of the reference."""
        rows = select(step.batch, self.parts, ["retain"])
        with step.before.model(step.model) as reference:
            with tap(self.accelerator.unwrap_model(reference), self.layer) as caught:
                forward_parts(reference, rows, ["retain"])
        hidden = _by_row(caught[0], rows["attention_mask"])
        found = rmu_loss(step.hidden["retain"], hidden, step.answers("retain"))
        return step.by_row(found, "retain")


def _train_up_to(model: "PreTrainedModel | PeftModel", given: int | None) -> int:
    """Leave the steered layer and the two below it trainable, and freeze the rest.

    Returns:
        Which layer is steered.
    """
    layers = decoder_layers(model)
    layer = min(7, len(layers) // 2) if given is None else given
    if not 0 <= layer < len(layers):
        raise ValueError(f"`layer` must lie in [0, {len(layers)}), got {given}.")
    near = [module for place, module in enumerate(layers) if layer - 2 <= place <= layer]
    trained = {
        parameter: name
        for module in near
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    last = {parameter for parameter, name in trained.items() if "down_proj" in name}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in (last or trained))
    if not trained:
        raise ValueError(
            f"rmu trains layers {max(layer - 2, 0)} to {layer} alone, and nothing there is "
            "trainable. Check `lora_target_modules`, or `layer`."
        )
    return layer


def _by_row(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states (B, T, d), which come as (1, N, d) where the model ran without the padding."""
    if hidden.shape[:2] == attention_mask.shape:
        return hidden
    kept = (attention_mask != 0).unsqueeze(-1).to(hidden.device)
    return hidden.new_zeros(*attention_mask.shape, hidden.size(-1)).masked_scatter(kept, hidden)


@contextmanager
def tap(model: "PreTrainedModel | PeftModel", layer: int) -> Iterator[list[Tensor]]:
    """A context with a list, to which a layer's outputs, hidden states (B, T, d), are appended.

    Of a batch that runs without its padding, they are those of its tokens, (1, N, d).
    """
    caught: list[Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()


def decoder_layers(model: "PreTrainedModel | PeftModel") -> nn.ModuleList:
    """The layers of a decoder, in or under any wrapper.

    Raises:
        ValueError: No list of modules is as long as the configuration says.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of its {depth} layers: rmu needs one.")
