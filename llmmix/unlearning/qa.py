"""Questions and answers whose answer is scored, to train on or to evaluate: read, cut, compared."""

from collections.abc import Iterable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llmmix.rows.formats import check_rows_type, known_shape, read_shape
from llmmix.rows.messages import Prompt, folded, spoken
from llmmix.rows.prompts import Encoded
from llmmix.rows.shapes import answer_shapes, asked

FORMATS = (
    "`question` and `answer`, `prompt` and `completion` (text or lists of messages), `prompt` and "
    "`answer` or `gt`, `instruction` and `output`, `messages`, `conversations`, or `text`"
)

# Once read they are gone, so that rows read twice are the same
READ = ("completion", "gt", "messages", "conversations", "text")


def read_rows(
    dataset: Dataset | None, argument: str, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Rows with a `prompt` (text or messages) and an `answer` (text), from any of `FORMATS`.

    A `question` is asked as `question_prompt` does. Of a chat the assistant's last turn is the
    answer. A `text` has an empty prompt. Columns of `READ` are removed, others are kept. Rows
    without a question or an answer are dropped and counted.

    Args:
        dataset: The rows.
        argument: Name of the rows, for errors.
        tokenizer: The tokenizer whose chat template asks the question.

    Raises:
        TypeError: `dataset` is text, a list or several splits.
        ValueError: There are no rows, their columns are of no accepted format, no row has both a
            question and an answer, or rows are chats and the tokenizer has no chat template.
    """
    if dataset is not None:
        check_rows_type(dataset, argument)
    if not isinstance(dataset, Dataset) or not len(dataset):
        given = "no rows" if isinstance(dataset, Dataset) else type(dataset).__name__
        raise ValueError(f"`{argument}` must be a map-style `Dataset` of {FORMATS}, got {given}.")
    shape = known_shape(dataset.column_names, answer_shapes(), argument, FORMATS)
    return read_shape(dataset, argument, shape, tokenizer, READ)


def question_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> Prompt:
    """A question as it is put to a model: a user's message, or text without a chat template."""
    return asked(question, tokenizer.chat_template is not None)


def cut(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Text in pieces of at most `max_length` tokens, the first of each not scored."""
    if encoded.prompt_length > 1 or len(encoded.ids) <= max_length:
        return [encoded]
    starts = range(0, len(encoded.ids), max_length)
    pieces = [Encoded(encoded.ids[start : start + max_length], 1) for start in starts]
    return [piece for piece in pieces if len(piece.ids) > 1]


def overlap(a: Iterable[Prompt], b: Iterable[Prompt]) -> list[Prompt]:
    """Prompts, or texts, that stand in both as `folded`, in the order of `a`."""
    known = {folded(spoken(prompt)) for prompt in b}
    return [prompt for prompt in a if folded(spoken(prompt)) in known]
