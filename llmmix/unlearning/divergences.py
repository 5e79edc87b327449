r"""f-divergences of two probabilities, as FLAT minimizes them.

    L = -g(a) + f*(g(c)),     a = P_e of the template answer, c = P_f of the answer to forget

    kl                 -a + exp(c - 1)                           dL/dc = exp(c - 1)
    js                 softplus(-a) + softplus(c) - 2 ln 2       sigmoid(c)
    pearson            -a + c + c^2 / 4                          1 + c / 2
    tv                 (tanh c - tanh a) / 2                     sech^2(c) / 2: falls with c
    jeffrey            -a + w + 1/w + c - 2,  w + ln w = 1 - c   1 / w
    reverse_kl         exp(-a) - 1 + c                           1
    squared_hellinger  exp(-a) + exp(c) - 2                      exp(c)
    neyman             exp(-a) + 1 - 2 exp(-c / 2)               exp(-c / 2): falls with c

FLAT's released code has a wrong sign in three: its reverse_kl and squared_hellinger lower a and
raise c, and its neyman lowers both. It truncates jeffrey at the third power. The forms here are
those of the textbook.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _jeffrey(a: Tensor, c: Tensor) -> Tensor:
    with torch.no_grad():
        w = 1 - c / 2  # for c in [0, 1], w + ln w = 1 - c has one root in [0.5, 1]
        for _ in range(4):
            w = w - (w + w.log() - 1 + c) / (1 + 1 / w)
    w = w - (w + w.log() - 1 + c) / (1 + 1 / w)  # once more, for the gradient of w by c
    return -a + w + 1 / w + c - 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda a, c: -a + torch.exp(c - 1),
    "js": lambda a, c: F.softplus(-a) + F.softplus(c) - 2 * math.log(2),
    "pearson": lambda a, c: -a + c + c**2 / 4,
    "tv": lambda a, c: (torch.tanh(c) - torch.tanh(a)) / 2,
    "jeffrey": _jeffrey,
    "reverse_kl": lambda a, c: torch.exp(-a) - 1 + c,
    "squared_hellinger": lambda a, c: torch.exp(-a) + torch.exp(c) - 2,
    "neyman": lambda a, c: torch.exp(-a) + 1 - 2 * torch.exp(-c / 2),
}

ALIASES = {"jensen_shannon": "js", "jenson_shannon": "js", "total_variation": "tv"}


def check_divergence(name: str) -> str:
    """The name in `DIVERGENCES` of a divergence, however it is written.

    Raises:
        ValueError: No divergence has that name.
    """
    plain = str(name).strip().lower().replace("-", "_").replace(" ", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in DIVERGENCES:
        raise ValueError(f"`divergence` must be one of {', '.join(DIVERGENCES)}, got {name!r}.")
    return plain
