"""A membership attack by gradients: how far an answer would move the weights."""

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmmix.models import context_length
from llmmix.precision import evaluating
from llmmix.rows.prompts import encode_answer, template_options
from llmmix.unlearning.evaluation.scores import deal_out


def gradient_norms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    p: float = 2,
    shared: bool = False,
) -> list[float | None]:
    """How far an answer would move the weights: mean over weight tensors of ||d NLL / d W||_p.

    One answer at a time. The weights of a LoRA adapter do not count: the gradient of the weight
    below is that of the merged one. The `grad` and `requires_grad` of weights stay as they were.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's tokenizer.
        rows: Rows with `prompt` and `answer`.
        p: Order of the norm: 1, 2 or infinity.
        shared: Deal the answers out over the processes.

    Returns:
        One a row; None where an answer exceeds the context or has no token.

    Raises:
        ValueError: `p` is not 1, 2 or infinity, or no weight of the model can have a gradient.
    """
    if p not in (1, 2, float("inf")):
        raise ValueError(f"`p` must be 1, 2 or infinity, got {p}.")
    parameters = [
        weight
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and "lora_" not in name
    ]
    if not parameters:
        raise ValueError("`model` has no floating-point weights: its gradients cannot be taken.")
    context = context_length(model)

    def norm(row: dict) -> float | None:
        asked = template_options(row)
        ids, start = encode_answer(tokenizer, row["prompt"], row["answer"], options=asked)
        if len(ids) <= start or (context is not None and len(ids) > context):
            return None
        with torch.enable_grad():
            input_ids = torch.tensor([ids], device=model.device)
            logits = model(input_ids=input_ids, use_cache=False).logits[0, start - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, input_ids[0, start:].to(logits.device))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms = [g.float().norm(p) for g in gradients if g is not None]
        return float(sum(n.item() for n in norms) / len(norms))

    frozen = [weight for weight in parameters if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with evaluating(model, gradients=True):
            return deal_out(rows.to_list(), norm, shared)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
