"""The command ``realign train``: from a dataset, a cache and a model to a checkpoint and metrics. A
run that was stopped continues.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, set_seed

from realign.config import TrainConfig
from realign.errors import RefusedError
from realign.modeling.adapters import quiet_peft
from realign.modeling.folder import lasting_name
from realign.modeling.identity import version_of
from realign.modeling.row_index import RowFile, RowIndex
from realign.reference import CacheReference, Ranks, build_cache, read_cache
from realign.runtime.files import file_sha256, publish, write_json
from realign.runtime.progress import announce
from realign.runtime.run_folder import check_out, claim, is_begun, is_claimed, only_run
from realign.runtime.strict_json import read_json
from realign.runtime.write_errors import explain_write_errors
from realign.training.arguments import training_arguments
from realign.training.callbacks import (
    LogLastStep,
    MetricsFile,
    ShowProgress,
    write_tensorboard_to,
)
from realign.training.plan import TrainPlan
from realign.training.policy import load_policy
from realign.training.preflight import preflight
from realign.training.trainer import RDPOTrainer


def checkpoint_facts(plan: TrainPlan, folder: Path, steps: int) -> dict[str, Any]:
    """Return the facts about a finished checkpoint that its own files do not hold. They are written
    to ``checkpoint.json`` beside it, since paths of this machine must not be published with it.

    Args:
        plan: Facts of the run.
        folder: The finished checkpoint.
        steps: Number of updates of the weights.
    """
    snapshot = plan.folder
    return {
        "realign": version_of("realign"),
        "model": lasting_name(plan.config.model),
        "revision": snapshot.name if snapshot.parent.name == "snapshots" else None,
        "data": str(plan.config.data.absolute()),
        "pairs": len(plan.records),
        "steps": steps,
        "weights": {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))},
    }


def train(config: TrainConfig, *, dry_run: bool = False) -> Path:
    """Train a model and return the folder of its checkpoint. After an interruption, the same call
    continues the run.

    Args:
        config: Options of the run.
        dry_run: Whether to stop before weights are loaded, without writing anything.
    Raises:
        RefusedError: Rows are bad, options do not fit each other or the model, the cache has
            another identity, or the output folder holds another run.

    Example::

        >>> from pathlib import Path
        >>> from realign import TrainConfig, train
        >>> config = TrainConfig(model="model", data=Path("pairs.parquet"), out=Path("run"))
        >>> train(config, dry_run=True)  # checks everything; without dry_run it trains
        PosixPath('run/checkpoint')
    """
    check_out(config.out)
    ranks = Ranks()  # before anything else: loading of weights depends on the processes
    plan = TrainPlan.of(config)
    checkpoint = config.out / "checkpoint"
    file = RowFile(
        config.out / "row_index.json", config.data, config.images, plan.records, plan.identity
    )
    known: RowIndex | None = None
    if ranks.run_on_first(lambda: is_begun(config.out, "train")):
        known = ranks.run_together(file.restore)
        claimed = replace(plan, rows=known)
        if ranks.run_on_first(lambda: _is_finished(claimed, ranks)):
            return checkpoint

    def find_rows() -> RowIndex:
        """Read the rows once; the first rank also checks them."""
        if not ranks.is_first:
            return known or RowIndex.of(plan.records)
        # a dry run always checks, even if the facts of the rows are stored
        rows, findings = preflight(plan, None if dry_run else known)
        for line in findings:
            announce(line)
        return rows

    plan = replace(plan, rows=ranks.run_together(find_rows))
    reference = _read_reference(plan, dry_run=dry_run)
    if dry_run:
        return checkpoint
    if reference is None:
        # written before the run folder is claimed: its content identifies it for any run
        root, rows = config.out / "cache", plan.rows
        build_cache(
            plan.records, plan.scoring, root, identity=plan.identity, ranks=ranks, rows=rows
        )
        reference = read_cache(root, plan.records, plan.identity, rows=rows)

    # before the model, because DeepSpeed reads them when weights are loaded
    arguments = training_arguments(config, len(plan.records))
    set_seed(config.seed)
    model = ranks.run_together(lambda: load_policy(plan))

    def claim_folder() -> None:
        claim(config.out, "train", plan.claim(ranks.world_size), _labels(plan))
        file.keep(plan.rows)
        if reference.acceptance is not None:
            write_json(config.out / "accepted_numerics.json", reference.acceptance)

    with ExitStack() as lock:
        ranks.run_on_first(lambda: lock.enter_context(only_run(config.out, "train")))
        ranks.run_on_first(claim_folder)
        ranks.check_folder_is_shared(config.out)
        trainer = RDPOTrainer(
            model,
            arguments,
            plan.records,
            plan.model.processor,
            reference,
            callbacks=[LogLastStep(), MetricsFile(config.out / "metrics.jsonl"), ShowProgress()],
            plan=plan,
        )
        trainer.remove_callback(PrinterCallback)
        write_tensorboard_to(trainer, config.out / "tensorboard")
        unfinished = config.out / ".checkpoint.tmp"
        if ranks.is_first:
            shutil.rmtree(unfinished, ignore_errors=True)
        with quiet_peft():
            trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())
            try:
                with explain_write_errors(checkpoint):
                    trainer.save_model(str(unfinished))
                    if trainer.is_world_process_zero():
                        _publish(plan, unfinished, trainer.state.global_step)
            except RefusedError:  # the disk is full: leave room
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        return checkpoint


def _publish(plan: TrainPlan, unfinished: Path, steps: int) -> None:
    """Make the saved model the checkpoint of the run, and remove those of its steps."""
    out = plan.config.out
    # peft's model card is an empty template; `realign card` writes a full one
    (unfinished / "README.md").unlink(missing_ok=True)
    write_json(out / "checkpoint.json", checkpoint_facts(plan, unfinished, steps))
    publish(unfinished, out / "checkpoint")
    _remove_checkpoints(out / "steps")


def _labels(plan: TrainPlan) -> dict[str, list[str]]:
    return {"rows": [f"row {row.id}" for row in plan.rows.rows]}


def _is_finished(plan: TrainPlan, ranks: Ranks) -> bool:
    """Return whether the run's folder belongs to this run and has its checkpoint.

    Raises:
        RefusedError: The folder belongs to another run, or the checkpoint has other weights than
            the run wrote.
    """
    out = plan.config.out
    is_ours = is_claimed(out, "train", plan.claim(ranks.world_size), _labels(plan))
    if not is_ours or not (out / "checkpoint").is_dir():
        return False
    _check_written_weights(out)
    _remove_checkpoints(out / "steps")  # left by a run that was killed at its very end
    return True


def _check_written_weights(out: Path) -> None:
    """Refuse a finished checkpoint whose weights were damaged since; ``checkpoint.json`` has their
    hashes.
    """
    if not (facts := out / "checkpoint.json").is_file():
        return
    written = read_json(facts)
    for name, digest in (written.get("weights", {}) if isinstance(written, dict) else {}).items():
        path = out / "checkpoint" / name
        if not path.is_file() or file_sha256(path) != digest:
            raise RefusedError(
                f"{path} must be the file that this run wrote, got "
                f"{'another' if path.is_file() else 'none'}. Restore it, or remove "
                f"{path.parent} to train again."
            )


def _remove_checkpoints(steps: Path) -> None:
    """Remove the checkpoints of a finished run; files of trackers beside them stay."""
    for path in (*steps.glob("checkpoint-*"), *steps.glob(".*")):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        steps.rmdir()


def _read_reference(plan: TrainPlan, *, dry_run: bool) -> CacheReference | None:
    """Read the given cache. Return None without one, and in a dry run that would have to load the
    model to accept it.
    """
    config = plan.config
    if config.cache is None or (dry_run and config.accept_numerics):
        return None
    return read_cache(
        config.cache,
        plan.records,
        plan.identity,
        num_cells=plan.objective.num_cells,
        accepting=plan.scoring.load if config.accept_numerics else None,
        rows=plan.rows,
    )
