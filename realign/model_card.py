"""The README.md of a LoRA checkpoint: what it is and how it was made, without anything of the
machine that made it. peft's own is an empty form with the base's local path.
"""

from __future__ import annotations

from pathlib import Path

from realign.config import TrainConfig


def adapter_card(config: TrainConfig, base: str, num_rows: int) -> str:
    """Return the card of an adapter.

    Args:
        config: What it was trained with.
        base: Hub id or folder of its base.
        num_rows: How many pairs it was trained on.
    """
    is_local = Path(base).is_dir()
    base = Path(base).name if is_local else base
    # a folder's name is no hub id, which is what the hub would take it for
    metadata = ["---", "library_name: peft", *([] if is_local else [f"base_model: {base}"]), "---"]
    options = {
        "beta": config.beta,
        "image_beta": config.image_beta,
        "image_weight": config.image_weight,
        "nll_weight": config.nll_weight,
        "rejected_scoring": config.rejected_scoring,
        "learning_rate": config.learning_rate,
        "epochs": config.epochs,
        "seed": config.seed,
    }
    settings = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    lines = [
        f"# LoRA adapter of {base}",
        "",
        "Trained with `realign train` (Re-Align, arXiv 2502.13146).",
        "",
        f"- Base: {base}" + (" (a local folder)" if is_local else ""),
        f"- Objective: {config.objective}; {settings}",
        f"- Data: {config.data.name}, {num_rows:,} pairs",
    ]
    return "\n".join([*metadata, "", *lines]) + "\n"
