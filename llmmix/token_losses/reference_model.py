"""`reference_model` of a token loss: found, its tokens compared with the model's, and loaded."""

from typing import Any

from torch import nn

from llmmix.models import check_checkpoints, load_checkpoint, named_checkpoints, tokenizer_of

ARGUMENT = "reference_model"
TAKES_ONE = ("asft", "select")


def check_reference_model(args: Any, tokenizer: Any = None) -> None:
    """Refuse a reference that is not there, or that has other tokens than the trained model.

    Args:
        args: The trainer's settings, a `TokenLossConfig`.
        tokenizer: The trained model's; None while it is not known.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: It is not whole; its vocabulary is another; or the loss takes none.
    """
    if args.reference_model is None:
        return
    if args.loss_type not in TAKES_ONE:
        raise ValueError(
            f"`reference_model` is a setting of {' and '.join(TAKES_ONE)}, and `loss_type` is "
            f"{args.loss_type!r}: leave it out."
        )
    (checkpoint,) = named_checkpoints([str(args.reference_model)], argument=ARGUMENT)
    check_checkpoints([checkpoint])
    if tokenizer is None:
        return
    own = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()  # a processor holds one
    other = tokenizer_of(checkpoint, args.trust_remote_code).get_vocab()
    if own != other:
        apart = sorted(own.items() ^ other.items(), key=lambda item: item[1])[0]
        raise ValueError(
            f"`{ARGUMENT}`: {args.reference_model} has another vocabulary than the model "
            f"({len(other)} tokens and {len(own)}; the first that differs is number {apart[1]}, "
            f"{apart[0]!r}). Tokens are compared one by one: name a model of the same family."
        )


def load_reference_model(args: Any, model: Any) -> nn.Module:
    """The reference, in the precision of the trained model's weights.

    Args:
        args: The trainer's settings, a `TokenLossConfig`.
        model: The trained model.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: It does not load whole; or asft compares distributions over another vocabulary.
    """
    (checkpoint,) = named_checkpoints([str(args.reference_model)], argument=ARGUMENT)
    given: Any = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    attention = given.get("attn_implementation")
    loading = {} if attention is None else {"attn_implementation": attention}
    reference = load_checkpoint(
        checkpoint, dtype=model.dtype, trust_remote_code=args.trust_remote_code, **loading
    )
    rows = [one.get_output_embeddings().weight.size(0) for one in (model, reference)]
    if args.loss_type == "asft" and rows[0] != rows[1]:
        raise ValueError(
            f"`{ARGUMENT}`: the head of {args.reference_model} has {rows[1]} rows and the model's "
            f"has {rows[0]}. asft compares their distributions over one vocabulary: name another."
        )
    return reference
