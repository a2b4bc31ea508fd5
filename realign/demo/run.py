"""Run ``realign demo``: every stage in order on the built-in world and model, then a page.

<out>/world/            images, train.jsonl, eval/
<out>/dataset/          preference pairs that `realign build` made
<out>/shortcut.parquet  preference pairs that can be told apart without their images
<out>/cache/            reference log-probabilities
<out>/checkpoint/       the model whose examples the page shows; metrics.jsonl lies beside it
<out>/compare/NAME/     the other models
<out>/logs/             messages of the training runs, and the CPU seconds that each took
<out>/eval/             answers and scores of all models
<out>/summary.json, report.html
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from realign.building.run import build
from realign.config import CacheConfig, EvalConfig, TrainConfig
from realign.data.formats.parquet import write_parquet
from realign.demo.data import MODEL, build_config, write_eval_data, write_training_data
from realign.demo.experiment.pairs import make_pairs
from realign.demo.experiment.records import records
from realign.demo.finding import finding
from realign.demo.models import MODELS, PAIRS_PER_STEP, SHOWN, DemoModel, train_models
from realign.evaluation.run import evaluate
from realign.evaluation.table import scores_table, split_of
from realign.reference.run import cache
from realign.review.report import write_report
from realign.runtime.files import read_jsonl, write_json
from realign.runtime.memory import usable_cores
from realign.runtime.run_folder import check_out, claim

TRAINING_SCENES = 260
EVAL_SCENES = 400

# Stages with their share of the time, measured on two idle cores.
STAGES = {"draw": 2, "build": 27, "cache": 4, "train": 63, "evaluate": 45, "report": 6}


def run_demo(out: Path, seed: int) -> dict[str, Any]:
    """Run every stage and return the summary. The same call after a kill continues.

    Args:
        out: Run folder.
        seed: Seed of scenes, masks and the order of rows.
    Raises:
        RefusedError: The folder holds a demo with another seed.
    """
    check_out(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums by another number of threads may differ in the last bit
    try:
        return _run(out, seed)
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int) -> dict[str, Any]:
    stages = _Stages()
    world, images = out / "world", out / "world" / "images"
    shortcut = out / "shortcut.parquet"
    with stages.run("draw"):
        if (
            not claim(out, "demo", {"seed": seed, "scenes": [TRAINING_SCENES, EVAL_SCENES]})
            or not (world / "eval" / "chair_objects.json").is_file()
        ):
            write_training_data(world, TRAINING_SCENES, seed)
            write_eval_data(world, EVAL_SCENES, seed)
    with stages.run("build"):
        datasets = {"pipeline": build(build_config(world, out / "dataset", seed))}
        if not shortcut.is_file():
            made = make_pairs("shortcut", seed, TRAINING_SCENES, MODEL)
            write_parquet(records(made, "retrieved"), shortcut)
        datasets["shortcut"] = shortcut
    with stages.run("cache"):
        for dataset in datasets.values():
            cache(
                CacheConfig(
                    model=str(MODEL),
                    data=dataset,
                    out=out / "cache",
                    batch_size=32,
                    dtype="float32",  # as in the training runs, also on a GPU
                )
            )
    with stages.run("train"):
        configs = {
            model.name: train_config(model, datasets[model.pairs], out, seed) for model in MODELS
        }
        training_seconds = train_models(configs, out / "logs", usable_cores())
        if torch.cuda.is_available():  # CPU seconds do not measure what runs on a GPU
            training_seconds = {}
    with stages.run("evaluate"):
        folders = {name: str(config.out / "checkpoint") for name, config in configs.items()}
        scores = evaluate(
            EvalConfig(
                models={"base": str(MODEL), **folders},
                data=world / "eval",
                images=images,
                out=out / "eval",
                seed=seed,
            )
        )
    summary = {
        "seed": seed,
        "models": {
            model.name: {"pairs": model.pairs, "epochs": model.epochs, **model.options}
            for model in MODELS
        },
        "first_logged_loss": read_jsonl(out / "metrics.jsonl")[0]["loss"],
        "scores": {
            row["task"]: {"items": split["items"], "rule": row["rule"], "models": split["models"]}
            for row in scores["table"]
            for split in [split_of(scores, row)]
        },
        "training_seconds": training_seconds,
        "seconds": stages.seconds,
    }
    with stages.run("report"):
        page = write_report(
            out, out / "report.html", lead=finding(scores, MODELS, training_seconds)
        )
    write_json(out / "summary.json", summary)
    Console().print(scores_table(scores))
    Console().print(f"{sum(stages.seconds.values()):.0f} s. Open [bold]{page}[/]")
    return summary


class _Stages:
    """Runs the stages and prints the progress of the demo."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._console = Console(stderr=True)

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        """Run a stage in the block, after a line with the time left for the demo."""
        done = sum(STAGES[name] for name in self.seconds)
        left = sum(STAGES.values()) - done
        spent = sum(self.seconds.values())
        # on a busy machine the first stages predict how slow the others are; stages that an earlier
        # call finished take no time and predict nothing
        slowness = max(1.0, spent / done) if done else 1.0
        number = len(self.seconds) + 1
        self._console.rule(
            f"[bold]{name}[/], stage {number} of {len(STAGES)}: {100 * done // (done + left)} % "
            f"done, about {left * slowness:.0f} s left"
        )
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)


def train_config(model: DemoModel, dataset: Path, out: Path, seed: int) -> TrainConfig:
    """Return the configuration of one model's run: full fine-tuning with a frozen vision tower.

    Args:
        model: Model to train.
        dataset: Pairs to train on.
        out: Folder of the demo.
        seed: Seed of the order of rows.
    """
    is_shown = model.name == SHOWN
    return TrainConfig(
        model=str(MODEL),
        data=dataset,
        out=out if is_shown else out / "compare" / model.name.lower().replace(" ", "-"),
        cache=out / "cache",
        schedule="constant",
        batch_size=PAIRS_PER_STEP,
        pairs_per_step=PAIRS_PER_STEP,
        epochs=model.epochs,
        logging_steps=5,
        save_steps=50,
        seed=seed,
        **model.options,
    )
