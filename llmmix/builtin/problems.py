"""`builtin:math` and `builtin:preferences`: arithmetic with solutions, and pairs made from it."""

import random
from collections.abc import Callable
from dataclasses import dataclass

LEVELS = {
    1: "one step: 23 + 48",
    2: "two steps: (23 + 4) * 6",
    3: "a word problem of two steps",
    4: "a linear equation: 3x + 7 = 52",
}
ROWS_A_LEVEL = {"train": 1000, "test": 250}

OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
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
        lines, result = [], 0
        for given, operator, b in self.steps:
            a = result if given is None else given
            result = OPERATORS[operator](a, b)
            lines.append((f"{a}{operator}{b}=", result))
        shown = result if slip is None else slip
        text = "\n".join(f"{left}{right}" for left, right in lines[:-1])
        return f"{text}\n{lines[-1][0]}\\boxed{{{shown}}}".strip(), result


def math_splits(config: str | None = None) -> dict[str, list[dict]]:
    """Rows of `builtin:math` by split: a problem, its worked solution and its answer.

    Args:
        config: Levels to keep, such as "1" or "1,3"; all of them by default.

    Raises:
        ValueError: `config` names an unknown level.
    """
    return _splits("builtin:math", _math_row, config)


def preference_splits(config: str | None = None) -> dict[str, list[dict]]:
    """Rows of `builtin:preferences` by split: the right solution against a plausible wrong one.

    Args:
        config: Levels to keep, such as "1" or "1,3"; all of them by default.

    Raises:
        ValueError: `config` names an unknown level.
    """
    return _splits("builtin:preferences", _preference_row, config)


def _splits(name: str, row: Callable, config: str | None) -> dict[str, list[dict]]:
    splits: dict[str, list[dict]] = {split: [] for split in ROWS_A_LEVEL}
    for level in _parse_levels(config):
        for split, found in problems_of(level).items():
            rng = random.Random(f"{name} {level} {split}")
            splits[split] += [row(problem, level, rng) for problem in found]
    return splits


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


def _math_row(problem: Problem, level: int, rng: random.Random) -> dict:
    solution, answer = problem.solution()
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "completion": [{"role": "assistant", "content": solution}],
        "answer": str(answer),
        "level": level,
    }


def _preference_row(problem: Problem, level: int, rng: random.Random) -> dict:
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


def problems_of(level: int) -> dict[str, list[Problem]]:
    """Distinct problems of a level, split into train and test."""
    rng = random.Random(f"problems of level {level}")
    wanted = sum(ROWS_A_LEVEL.values())
    if level == 1:
        found = rng.sample(facts(), wanted)
    else:
        unique: dict[str, Problem] = {}
        while len(unique) < wanted:
            problem = GENERATORS[level](rng)
            unique[problem.question] = problem
        found = list(unique.values())
    test = ROWS_A_LEVEL["test"]
    return {"train": found[test:], "test": found[:test]}


def facts() -> list[Problem]:
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
