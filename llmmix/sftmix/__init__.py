"""SFTMix: confidence-guided mixup of hidden states (arXiv 2410.05248).

    Conf(Y|X) = -(1/C) sum_c exp(mean NLL of Y under checkpoint c)       stage 1, scoring.py
    D^c, D^u  = the confident and the unconfident half, at the median    stage 2, pairing.py
    Z~ = lam Z^c + (1 - lam) Z^u,   Y~ = lam Y^c + (1 - lam) Y^u,   lam ~ Beta(alpha, alpha)
    L  = L_NTP(D^c and D^u) + mu * CE(Y~, softmax(W Z~))                 stage 3

Z are the hidden states after the final norm at the positions that predict response tokens; token n
of one response meets token n of the other, up to the shorter one. The two-target cross-entropy
needs no soft labels: CE(Y~) = -lam log p[y^c] - (1 - lam) log p[y^u].

    symbol   name
    alpha    mixup_alpha
    mu       mixup_weight
    lam      lam            one a pair

losses.py has the arithmetic, pairing.py the halves and their pairs, trainer.py stages 2 and 3,
reference_run.py and scoring.py stage 1. Recipes: recipes/sftmix.py, recipes/confidence.py.
Invariants: tests/test_invariants.py.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:  # for type checkers and editors, which see no lazy table
    from llmmix.sftmix.losses import confidence as confidence
    from llmmix.sftmix.losses import mix_pairs as mix_pairs
    from llmmix.sftmix.losses import mixup_loss as mixup_loss
    from llmmix.sftmix.pairing import PairSampler as PairSampler
    from llmmix.sftmix.pairing import confident_half as confident_half
    from llmmix.sftmix.scoring import add_confidence as add_confidence
    from llmmix.sftmix.trainer import SFTMixConfig as SFTMixConfig
    from llmmix.sftmix.trainer import SFTMixTrainer as SFTMixTrainer

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "losses": ["confidence", "mix_pairs", "mixup_loss"],
        "pairing": ["PairSampler", "confident_half"],
        "scoring": ["add_confidence"],
        "trainer": ["SFTMixConfig", "SFTMixTrainer"],
    },
)
