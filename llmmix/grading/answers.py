r"""The built-in verifiers: whether the answer in a completion equals the reference answer.

    math        math-verify: LaTeX, numbers, sets, intervals, compared as mathematics
    exact       the last \boxed{...} is the reference, spaces aside
    normalized  \boxed{...}, or all that was said, is the reference once case, punctuation and
                articles are gone
    choice      the letter chosen is the reference's

None stands for a completion in which no answer was found.
"""

import re
import string
from collections.abc import Callable
from typing import Any, Literal, get_args

Verdict = Literal["right", "wrong", "unparsable", "failed"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

TAIL = 200  # characters at the end of a text in which an answer without a box is looked for


def verdict_of(given: Any) -> Verdict:
    """The verdict that a verifier's answer stands for: a bool, None, or the verdict itself.

    Raises:
        ValueError: `given` is text and none of `VERDICTS`.
    """
    if isinstance(given, str):
        if given not in VERDICTS:
            raise ValueError(f"a verifier returns a bool, None or one of {VERDICTS}, got {given!r}")
        return given
    return "unparsable" if given is None else "right" if given else "wrong"


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` of a completion, braces matched, or None.

    Example:
        >>> boxed_answer(r"so x is \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, start = 1, start + len("\\boxed{")
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def exact(completion: str, answer: str) -> bool | None:
    """Whether the boxed answer equals the reference, spaces aside; None without one."""
    given = boxed_answer(completion)
    return None if given is None else _squeeze(given) == _squeeze(str(answer))


def normalized(completion: str, answer: str) -> bool | None:
    """Whether the boxed answer, or the whole completion, equals the reference as plain words.

    Case, punctuation, articles and spaces do not count, as in SQuAD's exact match.

    Raises:
        ValueError: The reference has no word left once it is normalized.
    """
    given, wanted = boxed_answer(completion), _words(str(answer))
    if not wanted:
        raise ValueError(f"the reference {answer!r} has no word left once it is normalized")
    words = _words(completion if given is None else given)
    return words == wanted if words else None


def choice(completion: str, answer: str) -> bool | None:
    r"""Whether the letter chosen is the reference's: boxed, after "answer", or the last one alone.

    Args:
        completion: Such as "The answer is (B)", "\boxed{B}" or "B. Paris".
        answer: A letter, with or without brackets.

    Raises:
        ValueError: The reference is not a letter.
    """
    wanted = re.fullmatch(r"\W*([A-Za-z])\W*", str(answer))
    if wanted is None:
        raise ValueError(f"the reference {answer!r} is not a letter")
    given = _chosen(completion)
    return None if given is None else given.upper() == wanted[1].upper()


def math(completion: str, answer: str) -> bool | None:
    """Whether math-verify finds the answer equal to the reference; None if it finds no answer.

    The boxed answer counts where there is one; else what math-verify extracts from the end of the
    text: further up stands the question's own expression as often as not, which it would evaluate.
    It is meant for a process of its own: an expression may take for ever.

    Raises:
        ValueError: math-verify cannot read the reference.
    """
    from math_verify import parse, verify

    given = boxed_answer(completion)
    if given is not None and _squeeze(given) == _squeeze(str(answer)):
        return True
    if given is not None and not given.strip():
        return None
    # The time limit is the caller's: math-verify's own needs the main thread's signals
    options = {"parsing_timeout": None}
    text = completion.strip()[-TAIL:] if given is None else f"\\boxed{{{given}}}"
    found = parse(text, **options)
    if not found:
        return None
    reference = parse(f"${answer}$", **options)
    if not reference:
        raise ValueError(f"math-verify cannot read the reference {answer!r}")
    return verify(reference, found, timeout_seconds=None, raise_on_error=True)


BUILT_IN: dict[str, Callable[[str, str], bool | None]] = {
    "math": math,
    "exact": exact,
    "normalized": normalized,
    "choice": choice,
}


def stated_answer(completion: str, verifier: str) -> str | None:
    """What a completion votes for under maj@N, or None where it gives no answer.

    Answers written differently are different votes.

    Args:
        completion: The whole text.
        verifier: Name of the verifier. `choice` takes the letter; all others take the boxed answer,
            and without a box `math` takes the last number and the others take all words.
    """
    if verifier == "choice":
        return _chosen(completion)
    if (given := boxed_answer(completion)) is not None:
        return _squeeze(given) or None
    if verifier == "math":
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion.strip()[-TAIL:])
        return numbers[-1].replace(",", "") if numbers else None
    return _words(completion) or None


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _words(text: str) -> str:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _chosen(completion: str) -> str | None:
    if (given := boxed_answer(completion)) is not None:
        bare = re.sub(r"\\(?:text|math)\w*\s*\{|[{}]", "", given)
        found = re.match(r"\W*([A-Za-z])(?![A-Za-z])", bare)
        return found[1] if found else None
    # "the answer is (B)", "**Answer:** option B"; but not "Answer: I think"
    named = re.findall(
        r"(?i:answer)(?:\s+(?i:is|would be|should be))?[\s:*$(]*(?:(?i:option|choice)[\s*$(]*)?"
        r"([A-Z])(?=[\s).,:*$]*(?:$|[\n).,:*$]))",
        completion,
        flags=re.MULTILINE,
    )
    if named:
        return named[-1]
    # A line that opens with a letter, "B. Paris": the answer, unless several do and restate options
    # (within a line: empty ones without end would take a pattern across them for ever)
    opening = set(
        re.findall(r"^[^\w\n]*([A-Z])(?=[).:]|[^\S\n]*$)", completion.strip(), flags=re.MULTILINE)
    )
    if len(opening) == 1:
        return opening.pop()
    # A letter alone somewhere; "A" and "I" are words too
    alone = re.findall(r"(?:^|[\s(*])([B-HJ-Z]|A(?=[).,:*]))(?=[\s).,*:]|$)", completion)
    return alone[-1] if alone else None
