"""The verb ``realign demo``: every stage in order on the embedded world and model, then a page to
look at.

<out>/world/          images, train.jsonl, eval/
<out>/dataset/        the preference pairs
<out>/cache/          reference log-probabilities
<out>/checkpoint/     the aligned model, with metrics.jsonl beside it
<out>/compare/NAME/   the same pairs with other objectives
<out>/eval/           answers and scores of all of them
<out>/summary.json, report.html
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from realign.building.run import build
from realign.config import BuildConfig, CacheConfig, EvalConfig, TrainConfig
from realign.demo.data import write_eval_data, write_training_data
from realign.demo.tasks import LEXICON_PATH
from realign.evaluation.run import evaluate
from realign.evaluation.table import scores_table, split_of
from realign.reference.run import cache
from realign.review.report import write_report
from realign.runtime.files import read_jsonl, write_json
from realign.runtime.run_folder import check_out, claim
from realign.training.run import train

MODEL = Path(__file__).with_name("model")
TRAINING_SCENES = 1000
EVAL_SCENES = 600

# Objectives on the same pairs, settled on seed 100. Everything that is not the paper's
# plain rDPO is named here. The negative log-likelihood is a mean over tokens where the others are
# sums times beta, hence its weight.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "DPO": {"objective": "dpo", "epochs": 1},
    "SFT": {"objective": "sft", "epochs": 3},
    "rDPO": {"objective": "rdpo", "epochs": 1},
    "mDPO": {"objective": "mdpo", "epochs": 1},
    "DPO + NLL": {"objective": "dpo", "nll_weight": 30.0, "epochs": 3},
    "rDPO + NLL": {"objective": "rdpo", "nll_weight": 30.0, "epochs": 3},
}
RECOMMENDED = "rDPO + NLL"


def run_demo(out: Path, seed: int, compared: Sequence[str] = ("DPO", "SFT")) -> dict[str, Any]:
    """Run every stage and return the summary. The same call after a kill continues.

    Args:
        out: Run folder.
        seed: Of scenes, masks and order of rows.
        compared: Objectives beside the recommended one.
    Raises:
        RefusedError: The folder holds a demo with another seed.
    """
    check_out(out)
    console = Console(stderr=True)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        console.rule(f"[bold]{name}")
        started = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - started, 1)

    world = out / "world"
    images = world / "images"
    with stage("draw"):
        if (
            not claim(out, "demo", {"seed": seed, "scenes": [TRAINING_SCENES, EVAL_SCENES]})
            or not (world / "eval" / "chair_objects.json").is_file()
        ):
            write_training_data(world, TRAINING_SCENES, seed)
            write_eval_data(world, EVAL_SCENES, seed)
    with stage("build"):
        dataset = build(build_config(world, out / "dataset", seed))
    with stage("cache"):
        cache(
            CacheConfig(
                model=str(MODEL),
                data=dataset,
                out=out / "cache",
                batch_size=32,
                dtype="float32",  # full fine-tuning's, also on a GPU
            )
        )
    models = {"base": str(MODEL)}
    for name in (*compared, RECOMMENDED):
        folder = out if name == RECOMMENDED else out / "compare" / name.lower().replace(" + ", "-")
        with stage(f"train {name}"):
            models[name] = str(train(train_config(name, dataset, folder, out / "cache", seed)))
    with stage("evaluate"):
        scores = evaluate(
            EvalConfig(
                models=models, data=world / "eval", images=images, out=out / "eval", seed=seed
            )
        )
    summary = {
        "seed": seed,
        "recommended": RECOMMENDED,
        "objectives": {name: OBJECTIVES[name] for name in (*compared, RECOMMENDED)},
        "first_logged_loss": read_jsonl(out / "metrics.jsonl")[0]["loss"],
        "scores": {
            row["task"]: {"items": split["items"], "rule": row["rule"], "models": split["models"]}
            for row in scores["table"]
            for split in [split_of(scores, row)]
        },
        "seconds": seconds,
    }
    write_json(out / "summary.json", summary)
    with stage("report"):
        page = write_report(out, out / "report.html")
    Console().print(scores_table(scores))
    Console().print(f"{sum(seconds.values()):.0f} s. Open [bold]{page}[/]")
    return summary


def build_config(world: Path, out: Path, seed: int) -> BuildConfig:
    """Four fifths of the segments masked, yes and no always, unmasked words kept.

    Fewer masks give closer negatives, of which hardly any keep four objects: at 40 % the pairs are
    short descriptions, and training on them shortens all.
    """
    return BuildConfig(
        source=world / "train.jsonl",
        images=world / "images",
        model=str(MODEL),
        out=out,
        lexicon=LEXICON_PATH,
        mask_rates={"objects": 0.8, "attributes": 0.8, "relations": 0.8},
        keep_unmasked=True,
        batch_size=64,
        max_new_tokens=72,
        seed=seed,
    )


def train_config(name: str, dataset: Path, out: Path, cache_root: Path, seed: int) -> TrainConfig:
    """One named objective on the demo's pairs: full fine-tuning with a frozen vision tower."""
    return TrainConfig(
        model=str(MODEL),
        data=dataset,
        out=out,
        cache=cache_root,
        learning_rate=2e-4,
        batch_size=16,
        pairs_per_step=16,
        logging_steps=5,
        save_steps=50,
        seed=seed,
        **OBJECTIVES[name],
    )
