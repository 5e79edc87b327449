r"""How answers are written: what is said last, what is boxed, and forms of one and the same text.

final_text     what follows the model's thinking
boxed_answer   the content of the last \boxed{...}
plain          one form for each character: NFC, ASCII minus and digits, nothing invisible
words          plain words: no case, punctuation or articles
latex          symbols such as x² and 90° as LaTeX has them
decimal        1e-7 as 0.0000001
"""

import re
import unicodedata
from decimal import Decimal

BRACES = re.compile(r"\\(boxed|fbox)\s*(?:\{|([\w+-]+(?:\.\w+)*))|[{}]")
LARGEST_EXPONENT = 400  # of a number that `decimal` writes out
SCIENTIFIC = re.compile(
    r"(?<![\w.])(\d+\.?\d*|\.\d+)"
    r"(?:[eE]([+-]?\d{1,3})|\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*\{?([+-]?\d{1,3})\}?)(?![\w.]*\w)"
)
# The point within a number and the sign before it; any other character that is no letter or digit
MARK = re.compile(r"((?<=\d)\.(?=\d)|(?<!\S)-?\.(?=\d)|(?<!\S)-(?=\d))|[^\w\s]|_")
ARTICLES = ("a", "an", "the")

# Full-width ASCII, the signs that stand for a minus, and what is not seen
_FORMS: dict[int, int | str | None] = {0xFF01 + i: 0x21 + i for i in range(94)}
_FORMS |= {ord(c): "-" for c in "\u2212\ufe63\u2010\u2011\u2012\u2013"}
_FORMS |= {ord(c): None for c in "\u200b\u200e\u200f\u2060\ufeff\u00ad"}
_LATEX = {"°": r"^\circ ", "·": r"\cdot ", "⋅": r"\cdot ", "×": r"\times ", "÷": r"\div "}
_LATEX |= {"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap "} | dict.fromkeys("€£¥¢", "")
_LATEX |= {c: f"^{{{unicodedata.digit(c)}}}" for c in "⁰¹²³⁴⁵⁶⁷⁸⁹"}
_FRACTIONS = ((c, unicodedata.normalize("NFKC", c).split("\u2044")) for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞")
_LATEX |= {c: rf"\frac{{{above}}}{{{below}}}" for c, (above, below) in _FRACTIONS}
_SYMBOLS = str.maketrans(_LATEX)


def final_text(completion: str) -> str:
    """What a completion says after its thinking, `</think>`; all of it where nothing follows."""
    _, _, last = completion.rpartition("</think>")
    return last if last.strip() else completion


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` of a completion, braces matched, or None.

    `\fbox{...}` and `\boxed 5` count too. A box that is not closed does not.

    Example:
        >>> boxed_answer(r"so x is \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    boxes = boxed_answers(text)
    return boxes[-1] if boxes else None


def boxed_answers(text: str) -> list[str]:
    """The content of every box of a text, in order of their beginnings."""
    found: dict[int, str] = {}
    opened: list[int | None] = []  # where a box begins, None for another brace
    for match in BRACES.finditer(text):
        if match[2] is not None:
            found[match.start(2)] = match[2]
        elif match[0] != "}":
            opened.append(match.end() if match[1] else None)
        elif opened and (start := opened.pop()) is not None:
            found[start] = text[start : match.start()]
    return [found[start] for start in sorted(found)]


def plain(text: str) -> str:
    """The text with one form for each character: NFC, ASCII minus and digits, nothing invisible."""
    return unicodedata.normalize("NFC", text).translate(_FORMS)


def words(text: str) -> str:
    """The words of a text: no case, punctuation or articles, and single spaces.

    The point within a number and the sign before one stay: 3.14 is not 314, and -5 is not 5.
    """
    text = unicodedata.normalize("NFKC", plain(text)).casefold()
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)  # .5 is 0.5
    return " ".join(w for w in MARK.sub(_kept, text).split() if w not in ARTICLES)


def _kept(mark: re.Match[str]) -> str:
    """What stays of a character that is no letter or digit."""
    symbol = not unicodedata.category(mark[0][0]).startswith("P") and mark[0] not in "$+<=>^`|~"
    return mark[0] if mark[1] or symbol else ""


def latex(text: str) -> str:
    """The symbols of a mathematical text as LaTeX, thousands and mixed numbers as one number."""
    text = plain(text).translate(_SYMBOLS)
    text = re.sub(r"√\s*(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d)(?:\\[,;:! ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\^\s*(-\s*(?:\d+|\w))", r"^{\1}", text)
    return re.sub(r"(?<![\d./^])(\d+)\s+(\d+)/(\d+)(?![\d./])", r"\1\\frac{\2}{\3}", text)


def decimal(text: str) -> str:
    r"""The text with 1e-7 and 2.5\times 10^3 as decimals, up to exponents of 400."""

    def write_out(match: re.Match[str]) -> str:
        number = Decimal(f"{match[1]}e{match[2] or match[3]}")
        return f"{number:f}" if abs(number.adjusted()) <= LARGEST_EXPONENT else match[0]

    return SCIENTIFIC.sub(write_out, text)
