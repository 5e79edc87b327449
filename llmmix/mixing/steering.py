"""`Steering`: follows a controller's plan step by step while a trainer runs.

The segments of a plan (llmmix/mixing/plan.py) become the sampler's plan in draws. When a segment
ends, its signal is measured and the controller is told; when all have ended, the controller is
asked for the next plan. `MixtureCallback` (llmmix/mixing/callback.py) calls it.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from llmmix.mixing.accounts import DrawAccount, Spent, listed
from llmmix.mixing.controllers import Controller, Segment
from llmmix.mixing.loader import MixtureLoader
from llmmix.mixing.plan import Plan, Signal, ask_for_segments
from llmmix.mixing.record import MixtureRecord
from llmmix.mixing.sampler import MixtureSampler
from llmmix.mixing.signals import Signals


class Steering:
    """One run of a mixture, under a controller or with fixed weights.

    Args:
        controller: Decides the weights. None: they stay as they are.
        sampler: Sampler whose weights are moved.
        signals: Measures the model. None: nothing is measured.
        loader: Loader of the run.
        draws: Account of what was drawn.
        record: Record of the run.
        total_steps: Steps of the run.
    """

    def __init__(
        self,
        controller: Controller | None,
        sampler: MixtureSampler,
        signals: Signals | None,
        loader: MixtureLoader,
        draws: DrawAccount,
        record: MixtureRecord,
        total_steps: int,
    ):
        self._controller, self._sampler, self._signals = controller, sampler, signals
        self._loader, self._draws, self._record = loader, draws, record
        self._total_steps, self._version = total_steps, sampler.version
        self._plan = Plan(len(sampler.names))
        self._spent, self._begun = Spent(), time.perf_counter()

    @property
    def method(self) -> str:
        """Class name of the controller, or "Fixed"."""
        return type(self._controller).__name__ if self._controller else "Fixed"

    def extend(self, step: int) -> None:
        """Ask for the next plan and begin it, if the last one is used up.

        Raises:
            ValueError: `ask_for_segments` refuses the plan.
        """
        if self._plan.segments or self._controller is None or step >= self._total_steps:
            return
        segments = ask_for_segments(self._controller, step, self._total_steps)
        self._plan.segments.extend(segments)
        self._loader.keep = self._plan.measures_batches
        self._set_plan(segments)
        self._write_decision(step)
        self._plan.begin_segment(self._draws.drawn())
        self._finish_segments(step)

    def _set_plan(self, segments: Sequence[Segment]) -> None:
        draws = self._loader.draws_a_step
        self._sampler.set_plan([(s.weights, s.steps * draws) for s in segments if s.steps])
        self._version = self._sampler.version

    def _write_decision(self, step: int) -> None:
        """Record the weights that the controller has decided, and its reasons."""
        if self._controller:
            weights = self._controller.weights.tolist()
            self._record.write({"step": step, "weights": weights, **self._controller.record()})

    def before_update(self, step: int, learning_rate: float) -> None:
        """Note a step's learning rate, and take a signal that is due before its update."""
        if self._plan.segments:
            self._plan.note_learning_rate(learning_rate)
            if measure := self._plan.due_before_update():
                self._plan.early = self._measure(measure, step)

    def after_step(self, step: int) -> None:
        """Count a step, and finish the segments that end with it.

        Raises:
            ValueError: Someone else has set the sampler's weights.
        """
        if not self._plan.segments:
            return
        if self._sampler.version != self._version:
            raise ValueError(
                f"The sampler's weights were set by another than {self.method}, which is in the "
                "middle of a plan. Let only one of the two set them."
            )
        self._spent.steps += self._plan.step()
        self._finish_segments(step)

    def _finish_segments(self, step: int) -> None:
        """Tell the controller of the segments that have ended; get the next plan after the last."""
        while self._controller and self._plan.ended():
            segment = self._plan.segments[0]
            if segment.measure is not None:
                signal = self._plan.early or self._measure(segment.measure, step)
                drawn = self._draws.drawn()
                self._controller.observe(self._plan.observation(step, drawn, signal))
                self._record.write({"step": step, "measured": signal})
            self._plan.segments.popleft()
            self._plan.begin_segment(self._draws.drawn())
        self.extend(step)

    def _measure(self, name: str, step: int) -> Signal:
        """A signal of the model, whose cost is counted.

        Raises:
            ValueError: Nothing can be measured in this run.
        """
        if self._signals is None:
            raise ValueError(
                f"The controller asks for the signal {name!r}, and this run measures nothing."
            )
        begun = time.perf_counter()
        rows = functools.partial(self._loader.rows_to_learn_from, step=step)
        signal = self._signals.take(name, self._loader.kept, len(self._sampler.names), rows)
        self._spent.seconds += time.perf_counter() - begun
        self._spent.measurements += 1
        return signal

    def _spent_so_far(self) -> Spent:
        return replace(self._spent, total=self._spent.total + time.perf_counter() - self._begun)

    def finish(self, step: int) -> list[str]:
        """Record the end of a run, and return the lines of its summary."""
        spent, lines = self._spent_so_far(), []  # without the last measurement
        if self._signals and self._signals.targets:
            losses = self._measure("losses", step)["losses"]
            self._record.write({"step": step, "final": losses})
            shown = listed(self._signals.targets, losses)
            lines.append(f"Validation losses: {shown}, mean {losses.mean():.4f}.")
        self._write_decision(step)
        if spent.measurements:
            lines.append(spent.summary(step))
        self._record.write({"step": step, "spent": spent})
        return lines

    def state_dict(self) -> dict:
        """The state that decides all later steps, as JSON values."""
        return {
            "sampler": self._sampler.state_dict(),
            "controller": self._controller.state_dict() if self._controller else None,
            "method": self.method,
            "draws_a_step": self._loader.draws_a_step,
            **self._plan.state_dict(),
            "spent": asdict(self._spent_so_far()),
        }

    def load_state_dict(self, state: dict, step: int) -> None:
        """Continue from a `state_dict` that was taken after `step`.

        Raises:
            ValueError: The state is of another method, or the sampler or the controller refuses
                it.
        """
        if state["method"] != self.method:
            raise ValueError(
                f"`resume_from_checkpoint`: the mixture was moved by {state['method']}, and now by "
                f"{self.method}. Begin a new run, or resume with the method that wrote it."
            )
        self._sampler.load_state_dict(state["sampler"])
        if self._controller:
            self._controller.load_state_dict(state["controller"])
        self._plan.load_state_dict(state)
        self._spent = Spent(**state["spent"])
        self._version = self._sampler.version
        self._loader.keep = self._plan.measures_batches
        self._loader.go_on(step, self._total_steps)
        if self._plan.segments and state["draws_a_step"] != self._loader.draws_a_step:
            # The saved plan counts draws, of which a step now has another number
            self._set_plan(self._plan.left())
