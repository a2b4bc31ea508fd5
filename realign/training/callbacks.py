"""Callbacks that report a trainer's progress: the log file, the bar and the last line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from realign.runtime.files import finite_or_null, json_text, name_disk_errors, write_jsonl
from realign.runtime.progress import Progress, announce

# names in the progress line to keys of the log
SHOWN = {
    "loss": "loss",
    "accuracy": "rewards/text_accuracies",
    "margin": "rewards/text_margins",
    "image accuracy": "rewards/image_accuracies",
    "image margin": "rewards/image_margins",
}


def _ordered(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a log line with sorted keys, so that it is the same when it is logged and when it is
    read from a checkpoint. Values that are not finite, such as the norm of a gradient that a loss
    scaler skips, are null.
    """
    values: dict[str, Any] = finite_or_null(line)
    return dict(sorted(values.items()))


class LogLastStep(TrainerCallback):
    """Callback that always logs the last step, also of runs shorter than ``logging_steps``."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Request a log line."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class MetricsFile(TrainerCallback):
    """Callback that writes ``metrics.jsonl``, one line per logged step. When a run is resumed, the
    file is rewritten from the trainer's own history.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from the history of the resumed checkpoint."""
        if not state.is_world_process_zero:
            return
        write_jsonl(self.path, [_ordered(line) for line in state.log_history if "loss" in line])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the newest line."""
        if state.is_world_process_zero and "loss" in state.log_history[-1]:
            with name_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(_ordered(state.log_history[-1]), ensure_ascii=True) + "\n")


class ShowProgress(TrainerCallback):
    """Callback that shows steps, their rate and the remaining time instead of every log line."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the resumed step."""
        if state.is_world_process_zero:
            if state.global_step:
                announce(f"continuing at step {state.global_step:,} of {state.max_steps:,}")
            self._progress = Progress("train", state.max_steps, done=state.global_step)
            self._progress.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        if self._progress:
            self._progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the newest loss, accuracies and margins."""
        line = state.log_history[-1]
        if self._progress and "loss" in line:
            shown = [f"{name} {line[key]:.3g}" for name, key in SHOWN.items() if key in line]
            self._progress.note(", ".join(shown))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the bar."""
        if self._progress:
            self._progress.__exit__(None, None, None)


def write_tensorboard_to(trainer: Trainer, folder: Path) -> None:
    """Write TensorBoard's files to a folder of the run unless ``TENSORBOARD_LOGGING_DIR`` is set;
    Trainer would write them among the checkpoints.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)
