"""`MixtureCallback`: what keeps a sampler and what moves its weights in step with a trainer.

It asks the controller for a plan, measures what the plan asks for when a segment ends, saves and
restores all of it with the trainer's checkpoints, and writes OUTPUT_DIR/mixture.jsonl.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
from accelerate.logging import get_logger
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from llmmix.mixing.controllers import SIGNALS, Controller, Observation, Segment
from llmmix.mixing.loader import MixtureLoader
from llmmix.mixing.record import MixtureRecord
from llmmix.mixing.rows import by_target, locate_rows, mean_scored_tokens
from llmmix.mixing.sampler import MixtureSampler
from llmmix.mixing.signals import Signals, rows_of
from llmmix.trainers import log_metric

logger = get_logger(__name__)

BEFORE_UPDATE = ("train", "excess")  # signals of the batch of a step
MANY_EPOCHS = 4  # repeats beyond this teach little: Muennighoff et al., arXiv:2305.16264


class MixtureCallback(TrainerCallback, ExportableState):
    """Keeps a sampler and what moves its weights in step with a trainer.

    Args:
        sampler: Of the trainer's rows.
        make_controller: (domains, targets, weights) to what decides the weights; without one they
            stay as they are.
        targets: Validation rows by name, as the trainer prepared them; by default the trainer's
            `eval_dataset`, by name or by its column `domain`.
        measured_rows: At most so many rows of each target, the same every time.
        measure: "nll" a token, the trainer's own "loss", or "auto".
    """

    measures_losses = True  # whether the controller cannot do without targets

    def __init__(
        self,
        sampler: MixtureSampler,
        make_controller: Callable[[list[str], list[str], np.ndarray], Controller] | None = None,
        *,
        targets: Mapping | None = None,
        measured_rows: int | None = 32,
        measure: str = "auto",
    ):
        self.sampler, self._make_controller = sampler, make_controller
        self.controller: Controller | None = None
        self._targets, self._measured_rows, self._measure = targets, measured_rows, measure
        self._begun: float | None = None
        self._forget()

    def _forget(self) -> None:
        self._segments: deque[Segment] = deque()
        self._steps = 0  # taken of the first segment
        self._learning_rate = 0.0  # summed over them
        self._counts = np.zeros(len(self.sampler.names))  # when it began
        self._early: dict | None = None  # a signal taken before the segment's last update
        self._spent = {"seconds": 0.0, "measurements": 0, "steps": 0, "total": 0.0}

    def bind(self, trainer: Trainer) -> None:
        """Take over a trainer's rows, which `attach_mixture` has found in order."""
        self.trainer, sampler, args = trainer, self.sampler, trainer.args
        locate = locate_rows(trainer, sampler)
        if sampler.unit == "tokens" and sampler.tokens_per_row is None:
            sampler.tokens_per_row = mean_scored_tokens(trainer.train_dataset, sampler.names)
        self._locate = locate
        self._record = MixtureRecord(trainer)
        self.signals = self._bind_targets()
        if self._make_controller:
            targets = self.signals.targets if self.signals else []
            self.controller = self._make_controller(sampler.names, targets, sampler.weights)
            self._fresh = self.controller.state_dict()
        # Nothing can be amiss any more: the trainer is changed from here on
        own_loader = trainer.get_train_dataloader
        process = (args.process_index, args.world_size)

        def get_train_dataloader() -> MixtureLoader:
            size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
            steps = args.max_steps if sampler.passes.endless else None
            self.loader = MixtureLoader(
                sampler, own_loader(), locate, size, accumulation, process, steps
            )
            return self.loader

        trainer.get_train_dataloader = get_train_dataloader
        trainer.args.ignore_data_skip = True  # the sampler knows where it was; nothing is replayed

    def _bind_targets(self) -> Signals | None:
        """Find the rows that losses are measured on, which a fixed mixture can do without."""
        given = self.trainer.eval_dataset if self._targets is None else self._targets
        if self._targets is not None and not self.measures_losses:
            raise ValueError(f"`targets`: {type(self).__name__} measures no losses of targets.")
        fixed = self._make_controller is None
        if fixed and getattr(self.trainer, "padding_free", False):
            return None
        try:
            targets = by_target(given, self.sampler.names)
        except ValueError:
            if fixed:
                return None
            if self.measures_losses:
                raise
            targets = {}
        return Signals(self.trainer, targets, rows=self._measured_rows, measure=self._measure)

    # Events of the trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin anew, or where the run that is resumed had come."""
        name = type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, {}).get("attributes")
        self._begun, self._warned = time.perf_counter(), set()
        if state.global_step:
            self._resume(state, saved)
            return
        self._forget()
        self.sampler.reset()
        self._drawn_before = self._drawn()
        if self.controller:
            self.controller.load_state_dict(self._fresh)
        self._record.start(self._header())
        self._extend(state)

    def _method(self) -> str:
        return type(self.controller).__name__ if self.controller else "Fixed"

    def _header(self) -> dict:
        return {
            "domains": self.sampler.names,
            "rows": self.sampler.sizes.tolist(),
            "targets": self.signals.targets if self.signals else [],
            "method": self._method(),
            "draws_a_step": self.loader.draws_a_step,
            "weights": self.sampler.weights.tolist(),
        }

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Note the step's learning rate; measure what is to be measured before its update."""
        if not self._segments:
            return
        self._learning_rate += optimizer.param_groups[0]["lr"]
        segment = self._segments[0]
        if segment.measure in BEFORE_UPDATE and self._steps + 1 == segment.steps:
            self._early = self._measured(segment.measure)

    def on_step_end(self, args, state, control, **kwargs):
        """Record what was drawn, and go on to what is due."""
        self._note_draws(state.global_step)
        # A resumed run counts its first epoch from the checkpoint on; what it logs must not
        whole, part = divmod(state.global_step - 1, self.loader.steps_an_epoch)
        state.epoch = whole + (part + 1) / self.loader.steps_an_epoch
        if self._segments:
            if self.sampler.version != self._planned:
                raise ValueError(
                    f"The sampler's weights were set by another than {self._method()}, which is in "
                    "the middle of a plan. Attach one of the two."
                )
            self._steps += 1
            self._spent["steps"] += self._segments[0].estimates
            self._finish_segments(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Stop where the domains hold no further step."""
        if self.loader.ended and state.global_step < state.max_steps:
            logger.warning(
                "The domains hold no further step: training ends after %d of %d steps. Draws by "
                "domain: %s.",
                state.global_step,
                state.max_steps,
                self.sampler.counts,
            )
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        """Say what was drawn, what the losses are now, and what the estimation cost."""
        self._spent["total"] += time.perf_counter() - self._begun
        spent = dict(self._spent)
        drawn = self._drawn()
        lines = [
            f"Share of the rows drawn: {_listed(self.sampler.names, drawn / max(drawn.sum(), 1))}."
        ]
        if self.signals and self.signals.targets:
            losses = self._measured("losses")["losses"]
            self._record.write({"step": state.global_step, "final": losses.tolist()})
            shown = _listed(self.signals.targets, losses)
            lines.append(f"Validation losses: {shown}, mean {losses.mean():.4f}.")
        if self.controller:
            self._write_decision(state.global_step)
        if spent["measurements"]:
            share = spent["seconds"] / spent["total"]
            lines.append(
                f"Measuring for the mixture: {spent['measurements']} times, {spent['seconds']:.1f} "
                f"s = {share:.1%} of the run's {spent['total']:.1f} s. Steps on mixtures chosen to "
                f"learn from: {spent['steps']} of {state.global_step}."
            )
        self._record.write({"step": state.global_step, "spent": spent})
        self.loader.close()
        if state.is_world_process_zero:
            print("\n".join(lines), flush=True)

    # What is decided and measured

    def _extend(self, state) -> None:
        """Ask for the next plan."""
        if self.controller is None or state.global_step >= state.max_steps:
            return
        segments = self.controller.plan(state.global_step, state.max_steps)
        for segment in segments:
            if segment.measure not in (None, *SIGNALS):
                raise ValueError(
                    f"{type(self.controller).__name__}.plan: `measure` must be one of "
                    f"{list(SIGNALS)} or None, got {segment.measure!r}."
                )
        steps = sum(segment.steps for segment in segments)
        if not 0 < steps <= state.max_steps - state.global_step:
            raise ValueError(
                f"{type(self.controller).__name__}.plan gave {steps} steps at step "
                f"{state.global_step} of {state.max_steps}; it must give at least one, and none "
                "past the end."
            )
        self._segments.extend(segments)
        self.loader.keep = any(segment.measure in BEFORE_UPDATE for segment in segments)
        self._set_plan(segments)
        self._write_decision(state.global_step)
        self._begin_segment()
        self._finish_segments(state)

    def _write_decision(self, step: int) -> None:
        decided = {"weights": self.controller.weights.tolist(), **self.controller.record()}
        self._record.write({"step": step, **decided})

    def _set_plan(self, segments) -> None:
        draws = self.loader.draws_a_step
        self.sampler.set_plan([(s.weights, s.steps * draws) for s in segments if s.steps])
        self._planned = self.sampler.version

    def _begin_segment(self) -> None:
        self._steps, self._learning_rate, self._early = 0, 0.0, None
        self._counts = self._drawn()

    def _finish_segments(self, state) -> None:
        """Tell the controller of the segments that have ended, and plan on when all have."""
        while self._segments and self._steps >= self._segments[0].steps:
            segment = self._segments.popleft()
            if segment.measure is not None:
                signal = self._early or self._measured(segment.measure)
                drawn = self._drawn() - self._counts
                shares = drawn / max(drawn.sum(), 1)
                self.controller.observe(
                    Observation(
                        state.global_step, segment.steps, shares, self._learning_rate, signal
                    )
                )
                found = {name: value.tolist() for name, value in signal.items()}
                self._record.write({"step": state.global_step, "measured": found})
            self._begin_segment()
        if not self._segments:
            self._extend(state)

    def _measured(self, name: str) -> dict[str, np.ndarray]:
        begun = time.perf_counter()
        rows = self._gradient_rows if name == "gradients" else None
        signal = self.signals.take(name, self.loader.kept, len(self.sampler.names), rows)
        self._spent["seconds"] += time.perf_counter() - begun
        self._spent["measurements"] += 1
        return signal

    def _gradient_rows(self, domain: int) -> list[dict]:
        """Rows of a domain, the same on every process, that depend on the step alone."""
        name, size = self.sampler.names[domain], int(self.sampler.sizes[domain])
        count, step = self.loader.draws_a_step, self.trainer.state.global_step
        if self.sampler.passes.endless:
            raise ValueError("Gradients by domain are taken on any of its rows: streams have none.")
        rows = np.array(rows_of(self.sampler.seed, step, name, size, count))
        where = self._locate(np.full(count, domain), rows, np.zeros(count, dtype=int))
        return [self.loader.dataset[index] for index in where.tolist()]

    def _drawn(self) -> np.ndarray:
        return np.array(list(self.sampler.counts.values()))

    # The record and the state

    def _note_draws(self, step: int) -> None:
        drawn = self._drawn()
        counts = (drawn - self._drawn_before).tolist()
        self._drawn_before = drawn
        self._record.write({"step": step, "counts": counts})
        for name, count in zip(self.sampler.names, counts, strict=True):
            log_metric(self.trainer, f"mixture/{name}", count / max(1, sum(counts)))
        for name, count, size in zip(self.sampler.names, drawn, self.sampler.sizes, strict=True):
            if count > MANY_EPOCHS * size and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "Domain %r has been read more than %d times over (%d rows): what repeats "
                    "beyond that teaches little. Give it less weight or more rows.",
                    name,
                    MANY_EPOCHS,
                    size,
                )

    def state(self) -> dict:
        """What a checkpoint keeps."""
        spent = dict(self._spent)
        if self._begun is not None:
            spent["total"] += time.perf_counter() - self._begun
        segments = [[s.weights.tolist(), s.steps, s.measure, s.estimates] for s in self._segments]
        attributes = {
            "sampler": self.sampler.state_dict(),
            "controller": self.controller.state_dict() if self.controller else None,
            "method": self._method(),
            "draws_a_step": self.loader.draws_a_step if hasattr(self, "loader") else None,
            "record": self._record.lines if hasattr(self, "_record") else 0,
            "segments": segments,
            "segment": [self._steps, self._learning_rate, self._counts.tolist()],
            "spent": spent,
        }
        return {"args": {}, "attributes": attributes}

    def _resume(self, state, saved: dict | None) -> None:
        if not saved:
            raise ValueError(
                f"`resume_from_checkpoint`: the checkpoint holds no state of {type(self).__name__}:"
                " it was written without this mixture. Begin anew, or resume with what wrote it."
            )
        if saved["method"] != self._method():
            raise ValueError(
                f"`resume_from_checkpoint`: the mixture was moved by {saved['method']}, and now by "
                f"{self._method()}. Begin anew, or resume with what wrote it."
            )
        header = self._header()
        self.sampler.load_state_dict(saved["sampler"])
        if self.controller:
            self.controller.load_state_dict(saved["controller"])
        self._segments = deque(
            Segment(np.array(weights), *rest) for weights, *rest in saved["segments"]
        )
        self._steps, self._learning_rate, counts = saved["segment"]
        self._counts, self._early = np.array(counts), None
        self._spent = saved["spent"]
        self.loader.keep = any(segment.measure in BEFORE_UPDATE for segment in self._segments)
        part = state.global_step % self.loader.steps_an_epoch
        self.loader.skip = part * self.trainer.args.gradient_accumulation_steps
        if state.global_step >= state.max_steps:
            self.loader.skip = len(self.loader)  # nothing is left of the run
        self._drawn_before = self._drawn()
        self._record.go_on(saved["record"], state.global_step, header)
        self._planned = self.sampler.version
        if self._segments and saved["draws_a_step"] != self.loader.draws_a_step:
            # Segments are in steps, and the plan that was saved is in draws
            first, *others = self._segments
            left = Segment(first.weights, first.steps - self._steps)
            self._set_plan([left, *others])
        if not self._segments:
            self._extend(state)  # a run that had ended goes on


def _listed(names: list[str], values: np.ndarray) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in zip(names, values, strict=True))
