"""The models of the demo, trained in parallel, each in a process with one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realign.config import TrainConfig
from realign.runtime.engine.engine import Engine
from realign.runtime.files import write_json
from realign.runtime.progress import Progress
from realign.runtime.strict_json import read_json
from realign.training.run import train

PAIRS_PER_STEP = 16


@dataclass(frozen=True)
class DemoModel:
    """One way to align the built-in model, with the settings that the experiment found best.

    Attributes:
        name: Name on the page.
        pairs: Kind of pairs: ``pipeline`` or ``shortcut``.
        epochs: Passes over the pairs.
        options: Other fields of :class:`realign.TrainConfig`.
    """

    name: str
    pairs: str
    epochs: float
    options: Mapping[str, Any] = field(default_factory=dict)


# The settings that the experiment (docs/experiment.md) found best on pipeline pairs. The epochs are
# chosen so that the steps come closest to the experiment's. Shortcut pairs take the same settings.
_SFT = {"objective": "sft", "learning_rate": 4e-4}
_DPO = {"objective": "dpo", "learning_rate": 2e-4, "beta": 0.03}
_RDPO = {"objective": "rdpo", "learning_rate": 4e-4, "beta": 0.01}
_VDPO = {"objective": "vdpo", "learning_rate": 4e-4, "beta": 0.03}
MODELS = (
    DemoModel("SFT", "pipeline", 3.5, _SFT),
    DemoModel("DPO", "pipeline", 3.5, _DPO),
    DemoModel("DPO shortcut", "shortcut", 3.7, _DPO),
    DemoModel("rDPO shortcut", "shortcut", 2.4, _RDPO),
    DemoModel("vDPO shortcut", "shortcut", 3.6, _VDPO),
    DemoModel("rDPO", "pipeline", 2.3, _RDPO),
    DemoModel("rDPO + NLL", "pipeline", 2.3, {**_RDPO, "nll_weight": 3.0}),
)
SHOWN = "rDPO + NLL"  # the model whose examples the page shows


def train_models(configs: Mapping[str, TrainConfig], logs: Path, workers: int) -> dict[str, float]:
    """Train models in parallel. Their bytes do not depend on the number of processes.

    Args:
        configs: Model name to the configuration of its run.
        logs: Folder for the messages of each run and for its CPU seconds.
        workers: Number of processes.
    Returns:
        CPU seconds of each run that was not interrupted.
    """
    logs.mkdir(parents=True, exist_ok=True)
    engine = Engine(workers=workers, threads=1)
    with Progress("models trained", len(configs)) as progress:
        for _ in engine.run(_Train(logs), dict(enumerate(configs.items()))):
            progress.advance()
    files = {name: _seconds_file(logs, name) for name in configs}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def _seconds_file(logs: Path, name: str) -> Path:
    return logs / f"{name}.seconds.json"


@dataclass(frozen=True)
class _Train:
    """Trains one model; a task of :class:`realign.runtime.engine.engine.Engine`."""

    logs: Path

    @contextmanager
    def open(self) -> Iterator[Callable[[tuple[str, TrainConfig]], bytes]]:
        yield self._train

    def _train(self, item: tuple[str, TrainConfig]) -> bytes:
        name, config = item
        is_new = not (config.out / "train.json").exists()
        started = time.process_time()
        with (
            (self.logs / f"{name}.log").open("a", encoding="utf-8") as log,
            redirect_stderr(log),  # the lines of several runs would mix
        ):
            train(config)
        if is_new:
            write_json(_seconds_file(self.logs, name), round(time.process_time() - started, 1))
        return b""
