"""One run: train on the pairs of a seed, measure after some steps, and keep the answers. A run
gives the same bytes in every process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from realign.demo.experiment.align import align
from realign.demo.experiment.measure import Measurer
from realign.demo.experiment.pairs import make_pairs
from realign.demo.experiment.protocol import BASE, Protocol
from realign.demo.experiment.records import records
from realign.demo.experiment.scenes import SPLITS, Draw
from realign.runtime.files import (
    canonical_json,
    content_sha256,
    finite_or_null,
    json_text,
    write_json,
)
from realign.runtime.strict_json import read_json

NAME_DIGITS = 12


@dataclass(frozen=True)
class PairSet:
    """A set of pairs to make.

    Attributes:
        kind: A key of :data:`realign.demo.experiment.pairs.KINDS`.
        seed: Seed of scenes, questions and masks.
    """

    kind: str
    seed: int

    def file(self, out: Path) -> Path:
        """Return the file of the pairs."""
        return out / "pairs" / f"{self.kind.replace(' ', '-')}-{self.seed}.json"


@dataclass(frozen=True)
class Run:
    """A training run with its measurements.

    Attributes:
        condition: Name of the condition, or ``BASE`` for the base model without training.
        seed: Seed of the pairs and their order; 0 for the base model.
        learning_rate: Learning rate after the warm-up.
        beta: Beta of the text pair and of the image pair.
        steps: Steps after which the model is measured.
        draws: Seeds of the evaluation draws on which the model is measured.
        only_captions: Whether the model only describes free scenes, which suffices for tuning.
    """

    condition: str
    seed: int = 0
    learning_rate: float = 0.0
    beta: float = 0.0
    steps: tuple[int, ...] = (0,)
    draws: tuple[int, ...] = ()
    only_captions: bool = False

    @property
    def name(self) -> str:
        """Unique name of the run, which is also a valid file name."""
        digest = content_sha256(canonical_json(asdict(self)))[:NAME_DIGITS]
        plain = self.condition.lower().replace(", ", "-").replace(" ", "-")
        return f"{plain}-{self.seed}-{digest}"

    def file(self, out: Path) -> Path:
        """Return the file of the result."""
        return out / "runs" / f"{self.name}.json"


@dataclass(frozen=True)
class MakePairs:
    """Makes pairs of one seed; a task of :class:`realign.runtime.engine.engine.Engine`."""

    protocol: Protocol
    base: Path
    out: Path

    @contextmanager
    def open(self) -> Iterator[Callable[[PairSet], bytes]]:
        """Silence the libraries."""
        _be_quiet()
        yield self._make

    def _make(self, wanted: PairSet) -> bytes:
        with _timed(self.out, wanted.file(self.out).stem):
            made = make_pairs(wanted.kind, wanted.seed, self.protocol.scenes, self.base)
        return (json_text(made) + "\n").encode()


@dataclass(frozen=True)
class DoRun:
    """Executes one run; a task of :class:`realign.runtime.engine.engine.Engine`."""

    protocol: Protocol
    base: Path
    out: Path

    @contextmanager
    def open(self) -> Iterator[Callable[[Run], bytes]]:
        """Load the processor; the base model is loaded when a run needs it."""
        _be_quiet()
        measurer = Measurer(self.base, self.out / "images", self.protocol.kl_captions)
        draws: dict[int, Draw] = {}

        def work(run: Run) -> bytes:
            for seed in run.draws:
                draws.setdefault(seed, Draw(seed, self.protocol.eval_scenes))
            with _timed(self.out, run.name):
                found = self._do(run, measurer, [draws[seed] for seed in run.draws])
            return (json_text(finite_or_null(found)) + "\n").encode()

        yield work

    def _do(self, run: Run, measurer: Measurer, draws: list[Draw]) -> dict[str, Any]:
        points: list[dict[str, Any]] = []

        def measure_at(steps: int, model: Any) -> None:
            answers = {str(draw.seed): _answers_on(measurer, model, draw, run) for draw in draws}
            points.append({"steps": steps, "draws": answers})

        found: dict[str, Any] = {"run": asdict(run), "stopped": None, "log": {}, "pairs": 0}
        if run.condition == BASE:
            measure_at(0, measurer.reference)
        else:
            condition = self.protocol.condition(run.condition)
            made = read_json(PairSet(condition.pairs, run.seed).file(self.out))
            found["pairs"] = len(made["pairs"])
            try:
                found["log"] = align(
                    condition,
                    run.learning_rate,
                    run.beta,
                    run.seed,
                    records(made, condition.rejected_image),
                    self.base,
                    measurer.processor,
                    run.steps,
                    measure_at,
                )
            except FloatingPointError as error:  # a learning rate that is too high is a result
                found["stopped"] = str(error)
        return found | {"points": points}


def _answers_on(measurer: Measurer, model: Any, draw: Draw, run: Run) -> dict[str, Any]:
    """Return the answers of a model on a draw, in the form that ``scores.ModelAnswers`` reads."""
    sets = ["free"] if run.only_captions else [*SPLITS]
    captions = measurer.captions(model, draw, sets)
    if run.only_captions:
        return {"captions": captions, "answers": {}, "divergence": None}
    texts = [caption["text"] for caption in captions["free"]]
    return {
        "captions": captions,
        "answers": measurer.answers(model, draw),
        "divergence": measurer.divergence(model, draw, texts),
    }


@contextmanager
def _timed(out: Path, name: str) -> Iterator[None]:
    """Write the CPU seconds of the block to a file of their own, since results must be equal."""
    started = time.process_time()
    yield
    write_json(out / "seconds" / f"{name}.json", round(time.process_time() - started, 2))


def _be_quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
