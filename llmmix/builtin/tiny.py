"""`builtin:tiny`: a Llama of 1M parameters that has read arithmetic facts, and its tokenizer."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

from llmmix.builtin.problems import facts, math_splits, problems_of
from llmmix.files import built_once
from llmmix.processes import save_on_any_rank

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TINY_VERSION = 1  # part of the cache key: raise it when what follows changes the checkpoint
TINY_STEPS = 400

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_checkpoint(name: str = "builtin:tiny") -> Path:
    """The folder of the built-in checkpoint, trained on the first call (about a minute).

    It has read arithmetic facts as plain text, those of the test split of `builtin:math` left out,
    and has never seen a chat message.

    Raises:
        ValueError: `name` is not `builtin:tiny`.
    """
    if name != "builtin:tiny":
        raise ValueError(f"`model_name_or_path`: no built-in {name!r}; there is builtin:tiny.")
    return built_once(f"tiny-{TINY_VERSION}", _build_tiny)


def _build_tiny(out: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        _pretrain(model, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_on_any_rank(model, out)
    tokenizer.save_pretrained(out)


def pretraining_text() -> list[str]:
    """What `builtin:tiny` has read: every fact of level 1 but those of the test split."""
    held_out = {problem.question for problem in problems_of(1)["test"]}
    return [
        problem.solution()[0].replace("\\boxed{", "").replace("}", "")
        for problem in facts()
        if problem.question not in held_out
    ]


def train_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer of `builtin:tiny`: byte-level BPE, a token a digit, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    # One token a digit and one an operator, so that each is seen alike wherever it stands
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[-+*/=(){}\\]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = math_splits()["train"]
    text = [row["prompt"][0]["content"] + "\n" + row["completion"][0]["content"] for row in rows]
    tokenizer.train_from_iterator(text + ["system\nuser\nassistant\n"] * 100, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _pretrain(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Next-token training on the facts, in a fixed order drawn from seed 0."""
    import torch
    from rich.progress import track

    ids = tokenizer(pretraining_text())["input_ids"]
    ids = [row + [tokenizer.convert_tokens_to_ids("<|endoftext|>")] for row in ids]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 40) * (1 - 0.9 * step / TINY_STEPS)
    )
    rng = random.Random(0)
    model.train()
    for _ in track(range(TINY_STEPS), description="Training builtin:tiny"):
        batch = tokenizer.pad({"input_ids": rng.sample(ids, 128)}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
