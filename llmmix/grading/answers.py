r"""The built-in verifiers: whether the answer in a completion equals the reference answer.

    math        math-verify: LaTeX, numbers, sets, intervals, compared as mathematics
    exact       the last \boxed{...} is the reference, spaces aside
    normalized  \boxed{...}, or all that was said, is the reference once case, punctuation and
                articles are gone
    choice      the letter chosen is the reference's

None stands for a completion in which no answer was found. None of them reads what a model thinks
before `</think>`, and forms of one character (NFC and NFD, a minus sign, full-width digits) are
the same to all.
"""

import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, Literal, get_args

from llmmix.grading.choices import chosen
from llmmix.grading.written import boxed_answer, decimal, final_text, latex, plain, words

Verdict = Literal["right", "wrong", "unparsable", "failed"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

RULES = 2  # raised where a built-in verifier may give another verdict: old samples are judged anew
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


def exact(completion: str, answer: str) -> bool | None:
    """Whether the boxed answer equals the reference, spaces aside; None without one."""
    given = boxed_answer(final_text(completion))
    return None if given is None else _squeeze(given) == _squeeze(str(answer))


def normalized(completion: str, answer: str) -> bool | None:
    """Whether the boxed answer, or the whole completion, equals the reference as plain words.

    Case, punctuation, articles and spaces do not count, as in SQuAD's exact match; but the point
    and the sign of a number do.

    Raises:
        ValueError: The reference has no word left once it is normalized.
    """
    said, wanted = final_text(completion), words(str(answer))
    if not wanted:
        raise ValueError(f"the reference {answer!r} has no word left once it is normalized")
    given = boxed_answer(said)
    found = words(said if given is None else given)
    return found == wanted if found else None


def choice(completion: str, answer: str) -> bool | None:
    r"""Whether the letter chosen is the reference's: boxed, after "answer", or the last one alone.

    Args:
        completion: Such as "The answer is (B)", "\boxed{B}" or "B. Paris".
        answer: A letter, with or without brackets.

    Raises:
        ValueError: The reference is not a letter.
    """
    wanted = re.fullmatch(r"\W*([A-Za-z])\W*", plain(str(answer)))
    if wanted is None:
        raise ValueError(f"the reference {answer!r} is not a letter")
    given = chosen(completion)
    return None if given is None else given == wanted[1].upper()


def math(completion: str, answer: str) -> bool | None:
    """Whether math-verify finds the answer equal to the reference; None if it finds no answer.

    The boxed answer counts where there is one; else what math-verify extracts from the end of the
    text: further up stands the question's own expression as often as not, which it would evaluate.
    It is meant for a process of its own: an expression may take for ever.

    Decimals are compared to six places, or to six digits from the first that is not zero where that
    is more: 0.333333 is 1/3, 1e-7 is not 2e-7. `1e-7` may be a number or e - 7. A percentage is
    equal to the number and to its hundredth; units, currencies and degrees do not count.

    Raises:
        ValueError: math-verify cannot read the reference.
    """
    said = final_text(completion)
    given = boxed_answer(said)
    if given is not None and _squeeze(given) == _squeeze(str(answer)):
        return True
    if given is not None and not given.strip():
        return None
    text = re.sub("</?answer>", "\n", said).strip()[-TAIL:]
    text = latex(text if given is None else given.strip().rstrip(".。"))
    wanted = latex(str(answer))
    verdict = _equal(text, wanted, given is not None)
    if not verdict and (decimal(text), decimal(wanted)) != (text, wanted):
        return _equal(decimal(text), decimal(wanted), given is not None)
    return verdict


def _equal(text: str, wanted: str, boxed: bool) -> bool | None:
    """Whether math-verify finds the answer of a text equal to another; None if it finds none."""
    from math_verify import parse, verify

    # The time limit is the caller's: math-verify's own needs the main thread's signals
    options = {"parsing_timeout": None}
    found = parse(f"\\boxed{{{text}}}" if boxed else text, **options)
    if not found:
        return None
    reference = parse(f"${wanted}$", **options)
    if not reference:
        raise ValueError(f"math-verify cannot read the reference {wanted!r}")
    leading = min((n for one in (*found, *reference) for n in _exponents(one)), default=0)
    # A float has 15 digits: of 6e23, none of them is a decimal place
    places = max(6, 5 - leading) if leading < 8 else 13 - leading
    return verify(
        reference,
        found,
        float_rounding=places,
        numeric_precision=max(15, 15 - leading),
        timeout_seconds=None,
        raise_on_error=True,
    )


def _exponents(expression: Any) -> Iterator[int]:
    """The power of ten of the first digit of each number in what math-verify has read."""
    if isinstance(expression, str):
        return
    if getattr(expression, "is_number", False):
        size = abs(expression.doit().evalf(5))
        if size.is_Float and size != 0:
            yield Decimal(str(size)).adjusted()
        return
    for part in expression.args if hasattr(expression, "args") else expression.flat():
        yield from _exponents(part)


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
        return chosen(completion)
    said = final_text(completion)
    if (given := boxed_answer(said)) is not None:
        return _squeeze(given) or None
    if verifier == "math":
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", plain(said).strip()[-TAIL:])
        return numbers[-1].replace(",", "") if numbers else None
    return words(said) or None


def _squeeze(text: str) -> str:
    return "".join(plain(text).split())
