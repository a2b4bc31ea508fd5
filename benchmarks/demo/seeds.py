"""Repeats the demo for three seeds with every named objective and writes how each came out.

``python -m benchmarks.demo.seeds``. Nothing is chosen after the fact:
the recommended objective was settled on seed 100, the seeds reported here are 0, 1 and 2.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from benchmarks.result_files import RESULTS, current_commit
from realign.demo.run import MODEL, OBJECTIVES, RECOMMENDED, run_demo
from realign.runtime.files import file_sha256, write_json
from realign_kernels import describe_backends

CRITERIA = {
    "chair_i": ("chair", "chair_i", -1),
    "adversarial_balanced_accuracy": ("pope_adversarial", "balanced_accuracy", +1),
}
RECALL_TOLERANCE = 0.01


def verdict(scores: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the criteria that improve with an interval that excludes 0, and the change of
    recall."""
    better = {}
    for name, (task, metric, sign) in CRITERIA.items():
        low = min(sign * x for x in scores[task]["models"][model][metric]["difference_interval"])
        better[name] = low > 0
    recall = scores["chair"]["models"][model]["recall"]["difference"]
    return {
        **better,
        "recall_difference": recall,
        "passes": any(better.values()) and recall > -RECALL_TOLERANCE,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_seeds.json")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    compared = [name for name in OBJECTIVES if name != RECOMMENDED]
    runs = {}
    for seed in args.seeds:
        summary = run_demo(args.runs / str(seed), seed, compared)
        verdicts = {name: verdict(summary["scores"], name) for name in OBJECTIVES}
        runs[str(seed)] = {"verdicts": verdicts, **summary}
        print(seed, {name: value["passes"] for name, value in verdicts.items()}, flush=True)
    write_json(
        args.out,
        {
            "command": "python -m benchmarks.demo.seeds",
            "commit": current_commit(),
            "head": describe_backends()["auto"],
            "model_sha256": file_sha256(MODEL / "model.safetensors"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "recommended": RECOMMENDED,
            "objectives": OBJECTIVES,
            "seeds": runs,
        },
    )


if __name__ == "__main__":
    main()
