"""Data and a checkpoint that are always at hand: made here, deterministic, no network.

`builtin:math`         arithmetic problems with worked solutions and a boxed answer
`builtin:preferences`  pairs made from them: the right solution against a plausible wrong one
`builtin:authors`      questions about authors who do not exist, to be unlearned: `llmmix.authors`
`builtin:domains`      text of several domains that is on any machine: `llmmix.domains`
`builtin:tiny`         a Llama of about 1M parameters and a byte-level BPE tokenizer with a chat
                       template, trained once on arithmetic facts (about a minute) and cached

They are for trying things out and for tests. A result on them says nothing of a real model.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from llmmix.cache import built_once

LEVELS = {
    1: "one step: 23 + 48",
    2: "two steps: (23 + 4) * 6",
    3: "a word problem of two steps",
    4: "a linear equation: 3x + 7 = 52",
}
ROWS_A_LEVEL = {"train": 1000, "test": 250}

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


def dataset(name: str, config: str | None = None):
    """A built-in dataset as a `DatasetDict`.

    Args:
        name: `builtin:math` or `builtin:preferences`, of disjoint `train` and `test` splits, or
            `builtin:authors` or `builtin:domains`, of the splits of `llmmix.authors.splits` and
            `llmmix.domains.splits`.
        config: Levels to keep, such as "1" or "1,3", all of them by default; for
            `builtin:authors` its size, for `builtin:domains` its domains.

    Raises:
        ValueError: An unknown name, level, size or domain.
        FileNotFoundError: The machine lacks the text of a domain.
    """
    from datasets import Dataset, DatasetDict

    if name in ("builtin:authors", "builtin:domains"):
        from llmmix import authors, domains

        made = (authors if name == "builtin:authors" else domains).splits(config)
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in made.items()})
    makers = {"builtin:math": _math_row, "builtin:preferences": _preference_row}
    if name not in makers:
        there = ", ".join([*makers, "builtin:authors", "builtin:domains"])
        raise ValueError(f"`dataset_name`: no built-in {name!r}; there are {there}.")
    splits = {split: [] for split in ROWS_A_LEVEL}
    for level in _parse_levels(config):
        for split, problems in _problems(level).items():
            rng = random.Random(f"{name} {level} {split}")
            splits[split] += [makers[name](problem, level, rng) for problem in problems]
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def _parse_levels(config: str | None) -> list[int]:
    if config is None:
        return list(LEVELS)
    try:
        levels = sorted({int(part) for part in str(config).split(",")})
    except ValueError:
        levels = []
    if not levels or not set(levels) <= set(LEVELS):
        raise ValueError(
            f"`dataset_config` of a built-in names levels such as '1' or '1,3', among "
            f"{list(LEVELS)}; got {config!r}."
        )
    return levels


def _math_row(problem: "Problem", level: int, rng: random.Random) -> dict:
    solution, answer = problem.solution()
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "completion": [{"role": "assistant", "content": solution}],
        "answer": str(answer),
        "level": level,
    }


def _preference_row(problem: "Problem", level: int, rng: random.Random) -> dict:
    chosen, answer = problem.solution()
    # A slip in the last step: off by one, off by ten, or two digits swapped
    slips = {answer + 1, answer - 1, answer + 10, answer - 10}
    digits = str(abs(answer))
    if len(digits) > 1:
        slips.add(int(digits[:-2] + digits[-1] + digits[-2]))
    rejected, _ = problem.solution(slip=rng.choice(sorted(slips - {answer})))
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


@dataclass(frozen=True)
class Problem:
    """A question and the arithmetic steps (a, operator, b) that answer it.

    In a step, `None` stands for the result of the step before.
    """

    question: str
    steps: tuple[tuple[int | None, str, int], ...]

    def solution(self, slip: int | None = None) -> tuple[str, int]:
        """The worked solution, one step a line, its result boxed; `slip` replaces the result."""
        lines, result = [], None
        for a, operator, b in self.steps:
            a = result if a is None else a
            result = OPERATORS[operator](a, b)
            lines.append((f"{a}{operator}{b}=", result))
        shown = result if slip is None else slip
        text = "\n".join(f"{left}{right}" for left, right in lines[:-1])
        return f"{text}\n{lines[-1][0]}\\boxed{{{shown}}}".strip(), result


OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


def _problems(level: int) -> dict[str, list[Problem]]:
    """Distinct problems of a level, split into train and test."""
    rng = random.Random(f"problems of level {level}")
    wanted = sum(ROWS_A_LEVEL.values())
    if level == 1:
        found = rng.sample(_facts(), wanted)
    else:
        unique: dict[str, Problem] = {}
        while len(unique) < wanted:
            problem = GENERATORS[level](rng)
            unique[problem.question] = problem
        found = list(unique.values())
    test = ROWS_A_LEVEL["test"]
    return {"train": found[test:], "test": found[:test]}


def _facts() -> list[Problem]:
    """All problems of level 1: sums and differences up to 49, products up to 20 by 12."""
    steps = [(a, "+", b) for a in range(2, 50) for b in range(2, 50)]
    steps += [(a, "-", b) for a in range(2, 50) for b in range(2, a)]
    steps += [(a, "*", b) for a in range(2, 21) for b in range(2, 13)]
    return [Problem(f"What is {a}{o}{b}?", ((a, o, b),)) for a, o, b in steps]


def _two_steps(rng: random.Random) -> Problem:
    b, c = rng.randint(2, 19), rng.randint(2, 9)
    operator = rng.choice("+-")
    a = rng.randint(b + 1, 29) if operator == "-" else rng.randint(2, 29)
    return Problem(f"What is ({a}{operator}{b})*{c}?", ((a, operator, b), (None, "*", c)))


def _word_problem(rng: random.Random) -> Problem:
    name = rng.choice(["Ada", "Ben", "Eva", "Max", "Mia", "Noa", "Sam", "Tom"])
    thing = rng.choice(["apples", "books", "coins", "eggs", "nuts", "pens"])
    boxes, each = rng.randint(2, 12), rng.randint(2, 12)
    if rng.random() < 0.5:
        more = rng.randint(2, 40)
        question = (
            f"{name} has {boxes} boxes of {each} {thing} and finds {more} more. "
            f"How many {thing} does {name} have?"
        )
        return Problem(question, ((boxes, "*", each), (None, "+", more)))
    gone = rng.randint(1, boxes * each - 1)
    question = (
        f"{name} has {boxes} boxes of {each} {thing} and gives away {gone}. "
        f"How many {thing} are left?"
    )
    return Problem(question, ((boxes, "*", each), (None, "-", gone)))


def _equation(rng: random.Random) -> Problem:
    a, x, b = rng.randint(2, 9), rng.randint(2, 20), rng.randint(1, 40)
    return Problem(f"Solve {a}x+{b}={a * x + b}.", ((a * x + b, "-", b), (None, "/", a)))


GENERATORS = {2: _two_steps, 3: _word_problem, 4: _equation}


def tiny_checkpoint(name: str = "builtin:tiny") -> Path:
    """The folder of the built-in checkpoint, trained on the first call (about a minute).

    It has read arithmetic facts as plain text, those of the test split of `builtin:math` left out,
    and has never seen a chat message.

    Raises:
        ValueError: An unknown name.
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
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def pretraining_text() -> list[str]:
    """What `builtin:tiny` has read: every fact of level 1 but those of the test split."""
    held_out = {problem.question for problem in _problems(1)["test"]}
    return [
        problem.solution()[0].replace("\\boxed{", "").replace("}", "")
        for problem in _facts()
        if problem.question not in held_out
    ]


def train_tokenizer():
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
    rows = dataset("builtin:math")["train"]
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


def _pretrain(model, tokenizer) -> None:
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
