"""The table of docs/results/step.md, from ``cpu_step.json`` and ``step_<device>.json``.

This module only formats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.result_files import load

HEADER = (
    "| step | seconds | pairs / s | times ours | by token counts | peak memory, MiB | "
    "beyond weights | loss differs by |\n|---|---:|---:|---:|---:|---:|---:|---:|"
)
NAMES = {
    "ours": "**ours**",
    "authors": "authors' scheme",
    "trl": "TRL DPOTrainer",
    "trl, plain head": "TRL DPOTrainer, plain head",
}
MODES = {"lora": "LoRA", "full": "full fine-tuning"}


def step_block(results: Path) -> str:
    """Return the text between the marks."""
    of_gpus = sorted(results.glob("step_*.json"))
    files = [path for path in (results / "cpu_step.json", *of_gpus) if path.is_file()]
    parts = [table(load(path)) for path in files]
    if not files:
        parts = ["*Training steps have not been measured yet: `python -m benchmarks.step`.*"]
    elif not of_gpus:
        parts.append("No step has been measured on a GPU yet.")
    return "\n\n".join(parts)


def table(content: dict[str, Any]) -> str:
    """Return one table per device, with a part for each shape, mode and setting."""
    cells = content["cells"]
    lines = [HEADER]
    for group in sorted({key.rpartition("/")[0] for key in cells}, key=_order):
        _, shape, mode, dtype, pairs, checkpointing = group.split("/")
        recomputes = {"off": "", "on": ", activations recomputed"}.get(
            checkpointing, ", each as by default"
        )
        size = f"{pairs} pair{'s' if int(pairs) > 1 else ''} per step"
        lines.append(f"| *{MODES[mode]}, {shape}, {dtype}, {size}{recomputes}* | | | | | | | |")
        names = {key.rpartition("/")[2] for key in cells if key.rpartition("/")[0] == group}
        for name in sorted(names, key=lambda name: (not name.startswith("ours"), name)):
            lines.append(line(name, cells[f"{group}/{name}"]))
    return "\n".join([*lines, "", _note(content)])


def line(name: str, cell: dict[str, Any]) -> str:
    """Return a cell as a row of the table."""
    label = NAMES.get(name, name)
    if cell["status"] != "ok":
        return f"| {label} | {cell['reason']} | | | | | | |"
    seconds, ratio = cell["step_seconds"], cell.get("ratio")
    is_ours = name == "ours"
    times = predicted = differs = ""
    if ratio and not is_ours:
        times = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        predicted = f"{cell['predicted_ratio']:.2f}"
        differs = f"{cell['loss_difference']:.0e}".replace("e-0", "e-")
    memory = [
        f"{cell[f'{name}_bytes'] / 2**20:,.0f}"
        + (f" ({cell[f'{name}_ratio']:.2f}x)" if ratio and not is_ours else "")
        for name in ("peak", "beyond_weights")
    ]
    numbers = [f"{seconds['median']:.2f}", f"{cell['pairs_per_second']:.2f}", times, predicted]
    return f"| {label} | {' | '.join([*numbers, *memory, differs])} |"


def _order(group: str) -> tuple[str, bool, str]:
    _, shape, mode, *rest = group.split("/")
    return shape, mode != "lora", "/".join(rest)


def _note(content: dict[str, Any]) -> str:
    cells = content["cells"]
    run = content["runs"][max(content["runs"], key=int)]
    ours = [cell for key, cell in cells.items() if key.endswith("/ours") and "seconds" in cell]
    cache = " and ".join(f"{cell['cache_seconds_a_pair']:.2f}" for cell in ours)
    versions = run["versions"]
    return (
        "Same weights, pairs, optimizer and loop (`transformers.Trainer`); forward, backward, "
        "clipping and optimizer step of one micro-batch, every scheme in a process of its own, in "
        "turn; medians, and ratios of each turn with their range. *By token counts*: the ratio "
        "that the number of tokens through the language model predicts by itself; image encodes "
        "and the head are not in it. *Peak memory*: of the process, weights, gradients and "
        "optimizer included, libraries not; *beyond weights*: without the policy's own. *Loss "
        "differs by*: from ours, the most of any step. "
        f"Our references are computed once, beforehand: {cache} s per pair. Left out of the "
        "authors' scheme, in its favour: a loss over all positions that is thrown away, copies of "
        "all logits to the host. *Plain head*: without a GPU TRL scores every position, in PyTorch "
        "operations that imitate its kernel; here it scores the answers alone, as on a GPU, by a "
        f"log-softmax. Made by `{run['command']}` at {run['commit']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, TRL {versions['trl']}, "
        f"{run['device']}, {run['threads']} threads."
    )
