"""The plan of a controller, counted step by step.

`Steering` (llmmix/mixing/steering.py) follows it; llmmix/mixing/controllers.py defines a segment.
"""

from collections import deque

import numpy as np

from llmmix.mixing.controllers import SIGNALS, Controller, Observation, Segment

BEFORE_UPDATE = ("train", "excess")  # signals that are measured on the batch of a step

Signal = dict[str, np.ndarray]


class Plan:
    """The segments that have not ended, and the progress of the current one.

    Args:
        domains: Number m of domains.

    Attributes:
        segments: Segments that have not ended, the current one first.
        early: Signal of the current segment, if it was taken before the last update.
    """

    def __init__(self, domains: int):
        self.segments: deque[Segment] = deque()
        self.begin_segment(np.zeros(domains))

    def begin_segment(self, drawn: np.ndarray) -> None:
        """Start counting for the next segment; `drawn` (m,) are the rows drawn so far."""
        self.early: Signal | None = None
        self._steps, self._learning_rate, self._drawn = 0, 0.0, drawn

    @property
    def measures_batches(self) -> bool:
        """Whether any segment is measured on the batch of a step."""
        return any(segment.measure in BEFORE_UPDATE for segment in self.segments)

    def due_before_update(self) -> str | None:
        """The signal that must be taken before the update of the current step, if any."""
        segment = self.segments[0]
        last = self._steps + 1 == segment.steps
        return segment.measure if last and segment.measure in BEFORE_UPDATE else None

    def note_learning_rate(self, rate: float) -> None:
        """Add the learning rate of the current step."""
        self._learning_rate += rate

    def step(self) -> bool:
        """Count a step, and return whether its segment has `estimates` set."""
        self._steps += 1
        return self.segments[0].estimates

    def ended(self) -> bool:
        """Whether the current segment has no step left."""
        return bool(self.segments) and self._steps >= self.segments[0].steps

    def observation(self, step: int, drawn: np.ndarray, signal: Signal) -> Observation:
        """What the controller is told of the segment that has ended.

        Args:
            step: Steps taken since training began.
            drawn: (m,) rows drawn of each domain since training began.
            signal: What was measured.
        """
        own = drawn - self._drawn
        shares = own / max(own.sum(), 1)
        steps = self.segments[0].steps
        return Observation(step, steps, shares, self._learning_rate, signal)

    def left(self) -> list[Segment]:
        """The segments that have not ended, with the steps that remain of each."""
        first, *others = self.segments
        return [Segment(first.weights, first.steps - self._steps), *others]

    def state_dict(self) -> dict:
        """The plan and its progress, as JSON values."""
        segments = [[s.weights.tolist(), s.steps, s.measure, s.estimates] for s in self.segments]
        here = [self._steps, self._learning_rate, self._drawn.tolist()]
        return {"segments": segments, "segment": here}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        self.segments = deque(
            Segment(np.array(weights), *rest) for weights, *rest in state["segments"]
        )
        steps, learning_rate, drawn = state["segment"]
        self.begin_segment(np.array(drawn))
        self._steps, self._learning_rate = steps, learning_rate


def ask_for_segments(controller: Controller, step: int, total_steps: int) -> list[Segment]:
    """A controller's next plan, checked.

    Raises:
        ValueError: A segment asks for an unknown signal, or the plan has no step or goes past
            `total_steps`.
    """
    segments, name = controller.plan(step, total_steps), type(controller).__name__
    for segment in segments:
        if segment.measure not in (None, *SIGNALS):
            raise ValueError(
                f"{name}.plan: `measure` must be one of {list(SIGNALS)} or None, got "
                f"{segment.measure!r}."
            )
    steps = sum(segment.steps for segment in segments)
    if not 0 < steps <= total_steps - step:
        raise ValueError(
            f"{name}.plan gave {steps} steps at step {step} of {total_steps}; it must give at "
            "least one, and none past the end of the run."
        )
    return segments
