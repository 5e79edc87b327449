r"""Which option a completion chooses: "\boxed{B}", "The answer is (B).", "**B**", "B. Paris"."""

import re

from llmmix.grading.written import boxed_answers, final_text, plain

# "the answer is (B)", "**Answer:** option B", "Answer: \text{b}"; but not "Answer: I think". A
# letter that is no word may be followed by words, "A" and "I" by those that end what is stated
NAMED = re.compile(
    r"(?i:answer|choice|option|choose|select|pick|答案)(?i:\s+(?:is|would be|should be)|[是为])?"
    r"[\s:>*_$(\-]*"
    r"(?:(?i:option|choice|letter)[\s*_$(]*)?"
    r"(?:([A-Z])(?=[\s).,:;*_$<]*(?:$|[\n).,:;*_$<]|(?i:is|because|since|as)\b))"
    r"|([B-HJ-Z])(?=\s)"
    r"|([a-j])(?=[).*_$<]*(?:$|\n|[).]|[*$<])))",
    flags=re.MULTILINE,
)
# A line that opens with a letter, "B. Paris", or is one. Within a line: empty ones without end
# would take a pattern across them for ever
OPENING = re.compile(r"^[^\w\n]*([A-Z])(?=[).:]|[^\w\n]*$)", flags=re.MULTILINE)
# A letter alone somewhere, and not denied; "A" and "I" are words too
ALONE = re.compile(r"(?<!\bnot )(?:^|(?<=[\s(*_$]))([B-HJ-Z]|A(?=[).,:*_$]))(?=[\s).,*_:;$<]|$)")
# "A, B and C" names no option
SEVERAL = re.compile(r"\(?\b[A-Z]\b\)?(?:(?:\s*(?:,|/|&|or\b|and\b))+\s*\(?\b[A-HJ-Z]\b\)?)+")
WRAPPED = re.compile(r"\\(?:text|math)\w*\s*\{([^{}]*)\}")
MARKS = str.maketrans("[]{}!?", "()  ..", "'\"‘’“”")
BOXED = re.compile(
    r"\W*(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\W+(?:is\W+)?)?([A-Za-j])"
    r"(?:\W*|\s*[).:]\s.*)",
    flags=re.IGNORECASE | re.DOTALL,
)


def chosen(completion: str) -> str | None:
    """The letter that a completion chooses, in upper case, or None.

    In order: the last box that holds a letter, or a letter and its option; the last that is named
    as the answer; the one with which a line begins, where only one does; the last that stands
    alone. What is boxed besides, a formula perhaps, is passed over.
    """
    text = WRAPPED.sub(r"\1", plain(final_text(completion)))
    boxed = [found[1] for box in boxed_answers(text) if (found := BOXED.fullmatch(box))]
    if boxed:
        return boxed[-1].upper()
    text = SEVERAL.sub(" ", text.translate(MARKS))
    if named := NAMED.findall(text):
        return "".join(named[-1]).upper()
    if whole := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return whole[1].upper()
    opening = set(OPENING.findall(text.strip()))
    if len(opening) == 1:
        return opening.pop()
    alone = ALONE.findall(text)
    return alone[-1] if alone else None
