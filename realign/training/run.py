"""The verb ``realign train``: dataset, cache and VLM in; checkpoint and metrics out; continued
after a kill.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from transformers import PrinterCallback, set_seed

from realign.config import Effect, TrainConfig
from realign.data.dataset import read_kept_records
from realign.data.records import Record
from realign.modeling.adapters import quiet_peft
from realign.modeling.folder import adapter_base, is_adapter, resolve_model
from realign.modeling.processors import load_processor
from realign.modeling.row_checks import CheckedRows
from realign.reference import CacheReference, Identity, Ranks, Scoring, fill, read_cache
from realign.runtime.files import publish, write_json, write_text
from realign.runtime.progress import announce
from realign.runtime.run_folder import check_out, claim, is_claimed, only_run
from realign.training.arguments import training_arguments
from realign.training.callbacks import LogLastStep, MetricsFile, ShowProgress
from realign.training.objectives import ObjectiveOptions, make_objective
from realign.training.policy import load_policy, numerics_of
from realign.training.preflight import announce_missing_images, preflight
from realign.training.sharding import check_precision
from realign.training.trainer import RDPOTrainer
from realign_kernels import Objective

SCHEMA = 2  # what a run folder holds, and what its train.json says


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
    options = asdict(ObjectiveOptions.of(config))
    objective = options.pop("objective")
    options |= {name: getattr(config, name) for name in ("learning_rate", "epochs", "seed")}
    settings = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    lines = [
        f"# LoRA adapter of {base}",
        "",
        "Trained with `realign train` (Re-Align, arXiv 2502.13146).",
        "",
        f"- Base: {base}" + (" (a local folder)" if is_local else ""),
        f"- Objective: {objective}; {settings}",
        f"- Data: {config.data.name}, {num_rows:,} pairs",
    ]
    return "\n".join([*metadata, "", *lines]) + "\n"


def train(config: TrainConfig, *, dry_run: bool = False) -> Path:
    """Train and return the checkpoint's folder. The same call after a kill continues and ends the
    same.

    Args:
        config: The run.
        dry_run: Stop before weights are loaded, with nothing written.
    Raises:
        RefusedError: Bad rows, options that fit neither each other nor the model, a cache of
            something else, or an output folder that holds another run.
    """
    check_out(config.out)
    ranks = Ranks()  # first of all: how weights are loaded depends on who shares them
    folder = resolve_model(config.model)
    objective = make_objective(ObjectiveOptions.of(config))
    cells = max(objective.num_cells, 3)  # one cache serves dpo, rdpo and mdpo
    records = read_kept_records(config.data, config.images)
    processor = load_processor(folder)
    scoring = _scoring(config, folder, cells)
    identity = scoring.identity()
    checkpoint = config.out / "checkpoint"
    rows = [_RowSummary.of(record) for record in records]  # once: it may read them from the disk
    what = {
        "schema": SCHEMA,
        "config": config.model_dump(mode="json", exclude=set(config.marked(Effect.NONE))),
        "model": identity["semantics"]["files"],
        "rows": [row.key for row in rows],
        "processes": ranks.world_size,
    }
    labels = {"rows": [f"row {row.id}" for row in rows]}
    checked = CheckedRows.of(config.out / "checked_rows.json", what["rows"], identity)

    def is_finished() -> bool:
        if not is_claimed(config.out, "train", what, labels) or not checkpoint.is_dir():
            return False
        shutil.rmtree(config.out / "steps", ignore_errors=True)  # of a run killed at its very end
        return True

    def check() -> None:
        check_precision(scoring.numerics.dtype, autocast=config.autocast)
        announce_missing_images(sum(not row.has_retrieved for row in rows), len(rows), objective)
        found = preflight(
            config,
            folder,
            records,
            processor,
            cells=cells,
            checked=None if dry_run else checked,  # whoever asks for a dry run asks for the check
        )
        for line in found:
            announce(line)

    if ranks.first(is_finished):
        return checkpoint
    ranks.first(check)
    reference = _read_reference(config, records, scoring, identity, objective, dry_run=dry_run)
    if dry_run:
        return checkpoint
    if reference is None:
        # known by its content, so the folder stays free while the model may be refused
        fill(records, config.out / "cache", scoring, identity, shard_size=1024, ranks=ranks)
        reference = read_cache(config.out / "cache", records, identity)

    arguments = training_arguments(config, len(records))  # DeepSpeed reads them before the weights
    set_seed(config.seed)
    model = ranks.together(lambda: load_policy(config, folder))

    def claim_folder() -> None:
        claim(config.out, "train", what, labels)
        checked.keep()
        if reference.acceptance is not None:
            write_json(config.out / "accepted_numerics.json", reference.acceptance)

    with ExitStack() as held:
        ranks.first(lambda: held.enter_context(only_run(config.out, "train")))
        ranks.first(claim_folder)
        ranks.check_folder_is_shared(config.out)
        trainer = RDPOTrainer(
            model,
            arguments,
            records,
            processor,
            reference,
            callbacks=[LogLastStep(), MetricsFile(config.out / "metrics.jsonl"), ShowProgress()],
        )
        trainer.remove_callback(PrinterCallback)
        unfinished = config.out / ".checkpoint.tmp"
        if ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
        with quiet_peft():
            trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())
            trainer.save_model(str(unfinished))
        if trainer.is_world_process_zero():
            if is_adapter(unfinished):
                write_text(
                    unfinished / "README.md",
                    adapter_card(config, adapter_base(unfinished), len(records)),
                )
            publish(unfinished, checkpoint)
            shutil.rmtree(config.out / "steps")
        return checkpoint


class _RowSummary(NamedTuple):
    """What a run needs of every row before it starts."""

    id: str
    key: str
    has_retrieved: bool

    @classmethod
    def of(cls, record: Record) -> _RowSummary:
        return cls(record.id, record.key, bool(record.rejected_images))


def _scoring(config: TrainConfig, folder: Path, cells: int) -> Scoring:
    """The reference computes as the policy will."""
    return Scoring(
        folder,
        cells,
        config.rejected_scoring,
        numerics_of(config),
        batch_size=max(config.batch_size, 4),
        max_length=config.max_length,
    )


def _read_reference(
    config: TrainConfig,
    records: Sequence[Record],
    scoring: Scoring,
    identity: Identity,
    objective: Objective,
    *,
    dry_run: bool,
) -> CacheReference | None:
    """Read a given cache; None where there is none, or where accepting it would load the model in
    a dry run.
    """
    if config.cache is None or (dry_run and config.accept_numerics):
        return None
    return read_cache(
        config.cache,
        records,
        identity,
        num_cells=objective.num_cells,
        accepting=scoring.load if config.accept_numerics else None,
    )
