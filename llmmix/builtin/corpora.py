"""`builtin:domains`: text of several domains that is on any machine, for experiments on mixtures.

`code`    Python: the standard library, without module docstrings, tests and generated tables
`docs`    English: the help topics of `pydoc` and the module docstrings of the standard library
`cpp`     C++: the headers that torch ships, without licences and generated files
`math`    problems of the kinds of `builtin:math` with worked solutions, none of its test split;
          `builtin:tiny` has read more than half of their steps as facts
`noise`   uniform draws over 64 symbols: learnt at once, then ln 64 nats a symbol for ever
`noise2`  the same over 64 others, which share no byte with those of `noise`

The rows are the same each time with the same version of Python and torch, whose files they are cut
from. Every domain has as many rows, and no file or topic has rows in two splits.
"""

import ast
import hashlib
import inspect
import json
import os
import platform
import random
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llmmix.builtin.problems import GENERATORS, math_splits
from llmmix.files import built_once

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # part of the cache key: raise it when what follows changes a row or a window
DEFAULT = "code,docs,cpp,math"
ROWS = {"train": 360, "validation": 50, "test": 90}

ROW = 1000  # characters that a row aims at
SHORTEST, LONGEST = 250, 2000
SHARE = 8  # a file or topic gives at most an eighth of a split
TELLING = 30  # a line as long that stands elsewhere too is a copy, not a coincidence

# Folders and files of the standard library that are left out: tests, tables, other packages
SKIPPED_MODULES = re.compile(
    r"(^|/)(tests?|idle_test|idlelib|lib2to3|encodings|pydoc_data|site-packages|dist-packages"
    r"|config-[^/]*|entities\.py|_+sysconfigdata[^/]*)(/|$)"
)
# Torch's own headers alone: the others differ between its builds
OWN_HEADERS = re.compile(r"(ATen(?!/ops)|c10|torch)(/|$)(?!.*generated)")
GENERATED = re.compile(r"@generated|generated (by|from)|do not edit", re.IGNORECASE)
# The licence, and what every header of torch begins and ends with
BOILERPLATE = re.compile(
    r"\A(\s|//[^\n]*|/\*.*?\*/|#pragma once|#if !defined\(TORCH_STABLE[^\n]*)*"
    r'|#else\n#error "This file should not be[^\n]*\n#endif[^\n]*',
    re.DOTALL,
)

MATH_PROBLEMS, PROBLEMS_A_PASSAGE = 10_400, 20

# Letters of two bytes in UTF-8; neither their first nor their second bytes meet
NOISE = [chr(start + i) for start in (0x100, 0x140) for i in range(32)]
NOISE2 = [chr(start + i) for start in (0x420, 0x4A0) for i in range(32)]


def splits(config: str | None = None) -> dict[str, list[dict]]:
    """The rows `text`, `domain` of each split, one domain after the other.

    Args:
        config: Domains in the order wanted, such as "docs,noise,noise2"; by default `DEFAULT`.

    Returns:
        `train`, `validation` and `test`, of `ROWS` rows a domain.

    Raises:
        ValueError: `config` names an unknown domain, or one of them twice, or none.
        FileNotFoundError: The text of a domain is not on the machine.
    """
    filled = {name: _fill(name) for name in _parse_names(config)}
    return {
        split: [{"text": row, "domain": name} for name in filled for row in filled[name][split]]
        for split in ROWS
    }


def _parse_names(config: str | None) -> list[str]:
    names = [part.strip() for part in (DEFAULT if config is None else str(config)).split(",")]
    if not set(names) <= set(DOMAINS) or len(set(names)) < len(names):
        raise ValueError(
            f"`dataset_config` of builtin:domains names domains, each once, such as {DEFAULT!r}, "
            f"among {list(DOMAINS)}; got {config!r}."
        )
    return names


def windows(
    tokenizer: "PreTrainedTokenizerBase", length: int, config: str | None = None
) -> "DatasetDict":
    """The splits as windows of `length` tokens, tokenized once and cached.

    The texts of a domain and split are joined, each followed by the tokenizer's end of sequence,
    and cut; what is left at the end, shorter than `length`, is dropped.

    Args:
        tokenizer: A fast tokenizer with an end of sequence.
        length: Tokens a window.
        config: Domains in the order wanted, as `splits` takes them.

    Returns:
        `train`, `validation` and `test`, with the columns `input_ids` and `domain`.

    Raises:
        ValueError: `config` names an unknown domain, or one of them twice; the tokenizer is not
            fast or has no end of sequence; or `length` is below 1, or so long that a domain has no
            window.
        FileNotFoundError: The text of a domain is not on the machine.
    """
    from datasets import load_from_disk

    if length < 1:
        raise ValueError(f"`length` is the tokens a window, 1 or more; got {length}.")
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no end of sequence: set its `eos_token`.")
    names = _parse_names(config)
    key = [VERSION, _digest(tokenizer), length, names]
    key += [platform.python_version(), metadata.version("torch")]
    folder = f"domains/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    return load_from_disk(built_once(folder, lambda out: _save(out, tokenizer, length, names)))


def _digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"`tokenizer` is a {type(tokenizer).__name__}; give a fast one.")
    content = json.loads(backend.to_str())
    # The first two are what the last call left there, not what the tokenizer is
    content.update(truncation=None, padding=None, eos=tokenizer.eos_token_id)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _save(out: Path, tokenizer: "PreTrainedTokenizerBase", length: int, names: list[str]) -> None:
    import numpy as np
    from datasets import Dataset, DatasetDict

    made = {}
    for split, rows in splits(",".join(names)).items():
        blocks, domain = [], []
        for name in names:
            texts = [row["text"] for row in rows if row["domain"] == name]
            # verbose=False: that a text is longer than the model's context does not matter here
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            ids = [token for row in encoded for token in [*row, tokenizer.eos_token_id]]
            count = len(ids) // length
            if count == 0:
                raise ValueError(
                    f"`length={length}`: the {split} split of {name!r} has {len(ids)} tokens."
                )
            blocks.append(np.array(ids[: count * length]).reshape(count, length))
            domain += [name] * count
        made[split] = Dataset.from_dict({"input_ids": np.concatenate(blocks), "domain": domain})
    DatasetDict(made).save_to_disk(out)


def _fill(name: str) -> dict[str, list[str]]:
    """The rows of a domain: passages fill the test split, then validation, then train."""
    origin, draw = DOMAINS[name]
    passages = draw()
    seen: set[str] = set()
    filled: dict[str, list[str]] = {}
    for split in reversed(ROWS):
        rows: list[str] = []
        while len(rows) < ROWS[split]:
            passage = next(passages, None)
            if passage is None:
                raise FileNotFoundError(
                    f"`dataset_config` of builtin:domains: {origin}, which the domain {name!r} is "
                    f"cut from, are not on this machine or too few to fill its {split} split. "
                    f"Install them, or name other domains of {list(DOMAINS)}."
                )
            rows += _new_rows(passage, seen)[: ROWS[split] // SHARE]
        filled[split] = rows[: ROWS[split]]
    return {split: filled[split] for split in ROWS}


def _new_rows(passage: str, seen: set[str]) -> list[str]:
    """The rows of a passage of which at most a third are lines of passages before it.

    Help topics quote each other, and headers are copied for another backend: without this, a test
    split would hold text of the training split.
    """
    rows: list[str] = []
    lines: set[str] = set()
    for row in dict.fromkeys(_cut(passage)):
        telling = {row, *(line.strip() for line in row.splitlines() if len(line) >= TELLING)}
        if row not in seen and 3 * len(telling & seen) <= len(telling):
            rows.append(row)
            lines |= telling
    seen |= lines
    return rows


def _cut(passage: str) -> list[str]:
    """Rows of about `ROW` characters, as even as the ends of lines allow."""
    count = max(1, round(len(passage) / ROW))
    rows, start = [""] * count, 0
    for line in passage.splitlines(keepends=True):
        middle = start + len(line) / 2
        rows[int(middle * count / len(passage))] += line
        start += len(line)
    rows = [row.strip("\n") for row in rows]
    return [row for row in rows if SHORTEST <= len(row) <= LONGEST]


def _files(root: Path, suffix: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """Name and path of the files below `root`, in an order that depends on the names alone."""
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        below = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if wanted((below / name).as_posix())]
        paths = [(below / name).as_posix() for name in names if name.endswith(suffix)]
        found |= {path: root / path for path in paths if wanted(path)}
    yield from sorted(found.items(), key=lambda item: _shuffled(item[0]))


def _shuffled(name: str) -> bytes:
    """A sort key in random order, by which two names are ordered the same whatever the others."""
    return hashlib.sha256(name.encode()).digest()


def _modules() -> Iterator[tuple[str, str, str]]:
    """Name, docstring and code of the modules of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name, path in _files(stdlib, ".py", lambda name: not SKIPPED_MODULES.search(name)):
        with tokenize.open(path) as file:
            lines = file.readlines()
        docstring, first = "", 0
        # A parser would have to read the whole file
        for token in tokenize.generate_tokens(iter(lines).__next__):
            if token.type == tokenize.STRING and not docstring:
                docstring = inspect.cleandoc(ast.literal_eval(token.string))
            elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
                first = token.start[0] - 1
                break
        yield name, docstring, "".join(lines[first:])


def _docs() -> Iterator[str]:
    found = {f"module {name}": docstring for name, docstring, _ in _modules()}
    with suppress(ModuleNotFoundError):  # too few rows say so later
        from pydoc_data.topics import topics

        found |= {f"topic {name}": text for name, text in topics.items()}
    return (found[name] for name in sorted(found, key=_shuffled))


def _cpp() -> Iterator[str]:
    torch = find_spec("torch")  # found, not imported
    if torch is None or torch.origin is None:
        return
    include = Path(torch.origin).with_name("include")
    for _, path in _files(include, ".h", lambda name: bool(OWN_HEADERS.match(name))):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not GENERATED.search(text[:ROW]):
            yield BOILERPLATE.sub("", text)


def _math() -> Iterator[str]:
    rng = random.Random("builtin:domains math")
    rows = math_splits()
    held_out = {row["prompt"][0]["content"] for row in rows["test"]}
    solved = {r["prompt"][0]["content"]: r["completion"][0]["content"] for r in rows["train"]}
    while len(solved) < MATH_PROBLEMS:
        problem = GENERATORS[rng.choice(sorted(GENERATORS))](rng)
        if problem.question not in held_out:
            solved[problem.question] = problem.solution()[0]
    texts = [f"{question}\n{solution}\n\n" for question, solution in solved.items()]
    rng.shuffle(texts)
    for start in range(0, len(texts), PROBLEMS_A_PASSAGE):
        passage = "".join(texts[start : start + PROBLEMS_A_PASSAGE])
        yield passage.replace("\\boxed{", "").replace("}", "")


def _noise(name: str, symbols: list[str]) -> Iterator[str]:
    rng = random.Random(f"builtin:domains {name}")
    while True:
        yield "".join(rng.choices(symbols, k=ROW // 2))  # of two bytes each


# Where the text comes from, and what draws its passages, always in the same order
DOMAINS: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "code": ("the standard library's sources", lambda: (code for *_, code in _modules())),
    "docs": ("pydoc_data.topics and the standard library's docstrings", _docs),
    "cpp": ("the headers in the include folder of torch", _cpp),
    "math": ("the problems of builtin:math", _math),
    "noise": ("random symbols", lambda: _noise("noise", NOISE)),
    "noise2": ("random symbols", lambda: _noise("noise2", NOISE2)),
}
