"""What a model has forgotten, what it leaks and what it has kept, measured into one document.

Each row has one record, in `items`. `passes` fills the records in: it scores the rows and lets the
model answer them. `summary` computes metrics from them. Above these, `document` evaluates a model
and `checkpoint` a checkpoint; `leaks` samples, `probes` asks again, `printing` prints, and
`open_unlearning` writes that framework's files. Below, `scores`, `gradients` and `texts` run a
model, and `truth`, `memorization`, `membership` and `utility` are arithmetic on numbers.

Public names are imported on first use.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for type checkers and editors, which see no lazy table
    from llmmix.unlearning.evaluation.copies import quantized as quantized
    from llmmix.unlearning.evaluation.copies import relearn as relearn
    from llmmix.unlearning.evaluation.document import evaluate_unlearning as evaluate_unlearning
    from llmmix.unlearning.evaluation.leaks import leak_at_n as leak_at_n
    from llmmix.unlearning.evaluation.membership import membership_auc as membership_auc
    from llmmix.unlearning.evaluation.membership import min_k as min_k
    from llmmix.unlearning.evaluation.membership import min_k_plus_plus as min_k_plus_plus
    from llmmix.unlearning.evaluation.membership import privacy_leakage as privacy_leakage
    from llmmix.unlearning.evaluation.memorization import exact_memorization as exact_memorization
    from llmmix.unlearning.evaluation.memorization import extraction_strength as extraction_strength
    from llmmix.unlearning.evaluation.scores import score_answers as score_answers
    from llmmix.unlearning.evaluation.truth import forget_quality as forget_quality
    from llmmix.unlearning.evaluation.truth import truth_ratio as truth_ratio
    from llmmix.unlearning.evaluation.utility import model_utility as model_utility

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "copies": ["quantized", "relearn"],
        "document": ["evaluate_unlearning"],
        "leaks": ["leak_at_n"],
        "membership": ["membership_auc", "min_k", "min_k_plus_plus", "privacy_leakage"],
        "memorization": ["exact_memorization", "extraction_strength"],
        "scores": ["score_answers"],
        "truth": ["forget_quality", "truth_ratio"],
        "utility": ["model_utility"],
    },
)
