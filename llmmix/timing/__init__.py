"""Timing our code against its peers: how a row is measured, and the rows of each kind.

`clock.py`      contenders in turns, medians, ratios, and the peak memory of each
`head.py`       the fused head alone
`steps.py`      whole training steps
`padding.py`    training steps on uneven rows, without their padding and with it
`sampling.py`   completions of prompts
`draws.py`      the draws of a mixture

`llmmix eval speed` prints them as one table.
"""

from llmmix.timing.clock import Case, machine, measure, measure_apart, quiet

__all__ = ["Case", "machine", "measure", "measure_apart", "quiet"]
