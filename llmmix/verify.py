"""Is this completion right? Verdicts on sampled answers."""


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


def exact_match(completion: str, answer: str) -> bool:
    """Whether the boxed answer of a completion equals the reference, spaces aside."""
    given = boxed_answer(completion)
    return given is not None and "".join(given.split()) == "".join(str(answer).split())
