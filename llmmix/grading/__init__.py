"""Whether completions are right, and what N of them are worth: verdicts, pass@N, maj@N.

Public names are imported on first use: a process that judges answers starts without torch.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for type checkers and editors, which see no lazy table
    from llmmix.grading.answers import boxed_answer as boxed_answer
    from llmmix.grading.answers import choice as choice
    from llmmix.grading.answers import exact as exact
    from llmmix.grading.answers import math as math
    from llmmix.grading.answers import normalized as normalized
    from llmmix.grading.estimators import bootstrap_interval as bootstrap_interval
    from llmmix.grading.estimators import maj_at_n as maj_at_n
    from llmmix.grading.estimators import paired_difference as paired_difference
    from llmmix.grading.estimators import pass_at_n as pass_at_n
    from llmmix.grading.evaluation import evaluate as evaluate
    from llmmix.grading.sample_log import SampleLog as SampleLog
    from llmmix.grading.verify import Verifier as Verifier
    from llmmix.grading.verify import judge as judge

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["boxed_answer", "choice", "exact", "math", "normalized"],
        "estimators": ["bootstrap_interval", "maj_at_n", "paired_difference", "pass_at_n"],
        "evaluation": ["evaluate"],
        "sample_log": ["SampleLog"],
        "verify": ["Verifier", "judge"],
    },
)
