"""What a training logs, a line at a time for people to read: step, epoch, loss, and the rest.

A terminal gets as many metrics as its line has room for, a pipe or a file gets all. Both get no
bar into their lines: it stands below them on a terminal, and nowhere else. All that is logged is in
`trainer_state.json` as ever.
"""

import sys
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

FIRST = (
    *("loss", "eval_loss", "nll_per_token", "eval_nll_per_token"),
    *("token_losses/weight", "weight/mean"),  # how much of a gradient is left
)
LAST = ("grad_norm", "learning_rate", "entropy", "num_tokens", "mean_token_accuracy")
LEFT_OUT = ("epoch", "total_flos")


def log_lines(trainer: Trainer, stage: str = "") -> None:
    """Let a trainer print lines instead of dictionaries; other callbacks that print are kept.

    Args:
        trainer: The trainer, before it trains.
        stage: What it is about to do, where it is one of several things: printed at once.
    """
    if stage and trainer.is_world_process_zero():
        print(f"\n{stage}", flush=True)
    bar = trainer.pop_callback(ProgressCallback)
    if bar is not None or trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(LogLines(bar is not None))


def log_line(state: TrainerState, logs: dict[str, Any], width: int | None = None) -> str:
    """What was logged, in a line: whole metrics, as many as fit into `width` characters."""
    if "train_runtime" in logs:
        loss = f", mean loss {logs['train_loss']:z.4g}" if "train_loss" in logs else ""
        return f"Trained for {state.global_step} steps in {logs['train_runtime']:.0f} s{loss}."
    line = f"step {state.global_step:>{len(str(state.max_steps))}}  epoch {state.epoch or 0:.2f}"
    for name in sorted(logs.keys() - set(LEFT_OUT), key=_rank):
        value = logs[name]
        shown = f"{value:z.4g}" if isinstance(value, float) else str(value)
        part = f"  {name} {shown:<9}"
        if width is not None and len(line + part.rstrip()) > width:
            break
        line += part
    return line.rstrip()


def _rank(name: str) -> tuple[int, str]:
    """Losses, then the method's own metrics, then what TRL logs for all, then times."""
    if name in FIRST:
        return FIRST.index(name), name
    late = name.removeprefix("eval_") in LAST or name.endswith(("runtime", "per_second"))
    return len(FIRST) + late, name


class LogLines(ProgressCallback):
    """A progress bar on a terminal, and lines above it.

    Args:
        bar: Whether to show a bar.
    """

    def __init__(self, bar: bool = True):
        super().__init__()
        self.shows_bar = bar and sys.stderr.isatty()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            disable = not self.shows_bar
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=disable)
        self.current_step = 0

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Show the bar of an evaluation."""
        if self.shows_bar:
            super().on_prediction_step(*args, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a line above the bar."""
        if state.is_world_process_zero and logs:
            from rich.console import Console

            width = Console().width if sys.stdout.isatty() else None
            tqdm.write(log_line(state, logs, width))
            sys.stdout.flush()
