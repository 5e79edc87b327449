"""The segments that a controller asked for and that have not ended, step by step."""

from collections import deque

import numpy as np

from llmmix.mixing.controllers import SIGNALS, Controller, Observation, Segment

BEFORE_UPDATE = ("train", "excess")  # signals of the batch of a step

Signal = dict[str, np.ndarray]


class Plan:
    """What is due, and what is known of the segment that the run is in.

    Args:
        domains: m.

    Attributes:
        segments: Segments that have not ended, the one that the run is in first.
        early: Its signal, where that is taken before its last update.
    """

    def __init__(self, domains: int):
        self.segments: deque[Segment] = deque()
        self.begin_segment(np.zeros(domains))

    def begin_segment(self, drawn: np.ndarray) -> None:
        """Count steps anew, from where so many rows (m,) of each domain were drawn."""
        self.early: Signal | None = None
        self._steps, self._learning_rate, self._drawn = 0, 0.0, drawn

    @property
    def measures_batches(self) -> bool:
        """Whether a segment is measured on the batch of a step."""
        return any(segment.measure in BEFORE_UPDATE for segment in self.segments)

    def due_before_update(self) -> str | None:
        """The signal to take before the update of the step that is being made, if any."""
        segment = self.segments[0]
        last = self._steps + 1 == segment.steps
        return segment.measure if last and segment.measure in BEFORE_UPDATE else None

    def note_learning_rate(self, rate: float) -> None:
        """Add the learning rate of the step that is being made."""
        self._learning_rate += rate

    def step(self) -> bool:
        """Count a step; says whether its mixture was chosen to learn from."""
        self._steps += 1
        return self.segments[0].estimates

    def ended(self) -> bool:
        """Whether the segment that the run is in has no step left."""
        return bool(self.segments) and self._steps >= self.segments[0].steps

    def observation(self, step: int, drawn: np.ndarray, signal: Signal) -> Observation:
        """What the controller is told of the segment that has ended.

        Args:
            step: Steps taken since training began.
            drawn: (m,) rows drawn of each domain since then.
            signal: What was measured.
        """
        own = drawn - self._drawn
        shares = own / max(own.sum(), 1)
        steps = self.segments[0].steps
        return Observation(step, steps, shares, self._learning_rate, signal)

    def left(self) -> list[Segment]:
        """The segments with the steps that are left of each."""
        first, *others = self.segments
        return [Segment(first.weights, first.steps - self._steps), *others]

    def state_dict(self) -> dict:
        """The plan and where it stands, as JSON has it."""
        segments = [[s.weights.tolist(), s.steps, s.measure, s.estimates] for s in self.segments]
        here = [self._steps, self._learning_rate, self._drawn.tolist()]
        return {"segments": segments, "segment": here}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`."""
        self.segments = deque(
            Segment(np.array(weights), *rest) for weights, *rest in state["segments"]
        )
        steps, learning_rate, drawn = state["segment"]
        self.begin_segment(np.array(drawn))
        self._steps, self._learning_rate = steps, learning_rate


def ask_for_segments(controller: Controller, step: int, total_steps: int) -> list[Segment]:
    """A controller's next plan, checked.

    Raises:
        ValueError: A segment asks for a signal that is not known, the plan has no step, or it goes
            past the end.
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
            "least one, and none past the end."
        )
    return segments
