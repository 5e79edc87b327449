"""What a run reports of its mixture: the rows that each step drew, and the time spent measuring.

llmmix/mixing/record.py writes the file; llmmix/mixing/steering.py counts the time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from accelerate.logging import get_logger
from transformers import Trainer

from llmmix.mixing.record import MixtureRecord
from llmmix.mixing.sampler import MixtureSampler
from llmmix.training.means import log_metric

logger = get_logger(__name__)

MANY_EPOCHS = 4  # repeats beyond this teach little: Muennighoff et al., arXiv:2305.16264


class DrawAccount:
    """Reports what each step drew, to the record and the trainer's log; warns of many repeats.

    Args:
        sampler: Sampler that draws.
        trainer: Trainer whose log shows the shares.
        record: Record of the run.
    """

    def __init__(self, sampler: MixtureSampler, trainer: Trainer, record: MixtureRecord):
        self._sampler, self._trainer, self._record = sampler, trainer, record
        self.begin()

    def begin(self) -> None:
        """Start counting at the sampler's current position."""
        self._before, self._warned = self.drawn(), set[str]()

    def drawn(self) -> np.ndarray:
        """(m,) rows drawn of each domain since training began."""
        return np.array(list(self._sampler.counts.values()))

    def note(self, step: int) -> None:
        """Report the rows that a step drew."""
        drawn = self.drawn()
        counts = (drawn - self._before).tolist()
        self._before = drawn
        self._record.write({"step": step, "counts": counts})
        for name, count in zip(self._sampler.names, counts, strict=True):
            log_metric(self._trainer, f"mixture/{name}", count, sum(counts))
        for name, count, size in zip(self._sampler.names, drawn, self._sampler.sizes, strict=True):
            if count > MANY_EPOCHS * size and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "Domain %r has been read more than %d times over (%d rows): further repeats "
                    "teach little. Give it less weight or more rows.",
                    name,
                    MANY_EPOCHS,
                    size,
                )

    def summary(self) -> str:
        """One line with each domain's share of the rows drawn."""
        drawn = self.drawn()
        shares = listed(self._sampler.names, drawn / max(drawn.sum(), 1))
        return f"Share of the rows drawn: {shares}."


@dataclass
class Spent:
    """What measuring cost a run.

    Args:
        seconds: Time that measuring took.
        measurements: Number of measurements.
        steps: Steps on mixtures that were chosen to estimate something.
        total: Seconds of the whole run.
    """

    seconds: float = 0.0
    measurements: int = 0
    steps: int = 0
    total: float = 0.0

    def summary(self, steps: int) -> str:
        """One line about the cost; `steps` is the number of steps of the run."""
        share = self.seconds / self.total
        return (
            f"Measuring for the mixture: {self.measurements} times, {self.seconds:.1f} s = "
            f"{share:.1%} of the run's {self.total:.1f} s. Steps on mixtures chosen to learn from: "
            f"{self.steps} of {steps}."
        )


def listed(names: list[str], values: Iterable[float]) -> str:
    """Names with their numbers, on one line: "code 0.2500, web 0.7500"."""
    return ", ".join(f"{name} {value:.4f}" for name, value in zip(names, values, strict=True))
