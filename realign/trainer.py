"""RDPOTrainer: rDPO on ``transformers.Trainer``. Ours are the collator, the loss, the metrics and
the guards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from realign.collate import PreferenceCollator
from realign.files import write_json, write_jsonl, write_text
from realign.modeling import disable_dropout, vision_module
from realign.objectives import make_objective
from realign.progress import Progress
from realign.records import Record
from realign.shared_prefix import choose_layout
from realign_kernels import RdpoOutput

METRIC_SUMS = "metric_sums.json"
COMPLETE = "complete"  # written into a checkpoint folder after everything else


@dataclass
class RDPOConfig(TrainingArguments):
    """TrainingArguments with the objective; loss defaults are the paper's."""

    objective: str = field(default="rdpo", metadata={"help": "rdpo, dpo, mdpo, symmetric or sft"})
    beta: float = field(default=0.1, metadata={"help": "tie to the reference in the answer pair"})
    image_beta: float | None = field(
        default=None, metadata={"help": "the same in the image pair; beta by default"}
    )
    image_weight: float = field(default=1.0, metadata={"help": "weight of the image pair"})
    nll_weight: float = field(
        default=0.0, metadata={"help": "weight of the chosen answer's mean NLL"}
    )
    rejected_scoring: str = field(
        default="label", metadata={"help": "label, or top_non_label (the authors' code)"}
    )
    freeze_vision: bool = field(default=True, metadata={"help": "leave the vision tower as it is"})
    shared_prefix: bool | None = field(
        default=None,
        metadata={"help": "compute image and prompt once for both answers; None: where it can be"},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "longest sequence in tokens; longer is an error"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay false: rows are records"}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "a NaN must be seen"})


class RecordDataset(Dataset[Record]):
    """Records as a torch dataset."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


class RDPOTrainer(Trainer):
    """Trains a VLM on dual-preference records with cached reference log-probabilities.

    Args:
        model: From :func:`realign.modeling.load_model`, or a peft model around it.
        args: The configuration.
        train_dataset: Records, as a sequence.
        processing_class: The model's processor.
        reference: ``record.key`` to log-probabilities of the reference, shape ``(C,)``, from
            :func:`realign.cache.read_cache`; C at least the objective's number of cells.
    Raises:
        ValueError: The reference lacks a record, or the objective is unknown.
    """

    args: RDPOConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: RDPOConfig,
        train_dataset: Sequence[Record],
        processing_class: Any,
        reference: Mapping[str, Tensor],
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.objective = make_objective(
            args.objective,
            beta=args.beta,
            image_beta=args.image_beta,
            image_weight=args.image_weight,
            nll_weight=args.nll_weight,
        )
        if missing := [record.id for record in train_dataset if record.key not in reference]:
            raise ValueError(
                f"reference must have every record, lacks {len(missing)}, first: row {missing[0]}."
            )
        disable_dropout(model)
        if args.freeze_vision:
            vision_module(model)[1].requires_grad_(False)
        # metric -> sum and weight since the last line; part of every checkpoint
        self._sums: dict[str, tuple[float, float]] = {}
        super().__init__(
            model=model,
            args=args,
            data_collator=PreferenceCollator(
                processing_class,
                self.objective.num_cells,
                reference,
                args.max_length,
                shared_prefix=choose_layout(model, args.shared_prefix) == "shared prefix",
            ),
            train_dataset=RecordDataset(train_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        # the loss is a mean over pairs, not over label tokens
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, RdpoOutput]:
        """Mean loss over the pairs of one micro-batch; sums its metrics for the next log line."""
        ids = inputs.pop("ids")
        output: RdpoOutput = model(
            **inputs, objective=self.objective, rejected_scoring=self.args.rejected_scoring
        )
        if not torch.isfinite(output.loss):
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} must be finite, got "
                f"{output.loss.item()} "
                f"for rows {', '.join(ids)}. No weight was changed by this step."
            )
        self._add_metrics(output)
        return (output.loss, output) if return_outputs else output.loss

    def _add_metrics(self, output: RdpoOutput) -> None:
        # a pair without a retrieved image has no image cells and no part in their means
        is_present = (output.num_tokens > 0).to(output.logps.device)
        loss = output.loss.expand(output.logps.shape[1])
        by_pair = {"loss": (loss, torch.ones_like(loss))}  # name -> values and weights, (P,) each
        if self.objective.nll_weight > 0:
            nll = -output.logps[0] / output.num_tokens[0].clamp(min=1).to(output.logps)
            by_pair["nll"] = (nll, is_present[0])
        for cell, name in enumerate(
            ("chosen", "text_rejected", "image_rejected", "both_rejected")[: len(output.logps)]
        ):
            by_pair[f"logps/{name}"] = (output.logps[cell], is_present[cell])
            by_pair[f"rewards/{name}"] = (output.rewards[cell], is_present[cell])
        for cell, kind, margins in (
            (1, "text", output.text_margins),
            (2, "image", output.image_margins),
        ):
            if len(output.logps) > cell:
                by_pair[f"rewards/{kind}_margins"] = (margins, is_present[cell])
                by_pair[f"rewards/{kind}_accuracies"] = (margins > 0, is_present[cell])
        pairs = torch.stack(
            [torch.stack((values.float(), of.float())) for values, of in by_pair.values()]
        ).detach()  # (metrics, 2, P)
        sums = torch.stack((pairs.prod(dim=1).sum(-1), pairs[:, 1].sum(-1)), dim=1)
        for name, (total, weight) in zip(
            by_pair, self.accelerator.reduce(sums, "sum").tolist(), strict=True
        ):
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + total, before[1] + weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put in the means over all pairs since the last line.

        The loss is one of them: Trainer's own is the mean since it was last started.
        """
        if self._sums and "loss" in logs:
            means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
            logs = {**logs, **means}
            self._sums.clear()
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a full checkpoint through ``from_pretrained``, which knows the saved names of the
        weights.

        Trainer's own loading does not: it finds no weight by its name and goes on from the first
        ones (huggingface/transformers#43701).
        """
        target: Any = model or self.model
        if not isinstance(target, PreTrainedModel):  # peft: Trainer loads adapters rightly
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            sums = json.loads((Path(checkpoint) / METRIC_SUMS).read_text(encoding="utf-8"))
            self._sums = {name: (total, weight) for name, (total, weight) in sums.items()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            write_json(folder / METRIC_SUMS, self._sums)
            write_text(folder / COMPLETE, f"{self.state.global_step}\n")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; newer unfinished ones are removed."""
    found = sorted(
        folder.glob("checkpoint-*"),
        key=lambda path: int(path.name.rpartition("-")[2]),
        reverse=True,
    )
    for path in found:
        if (path / COMPLETE).is_file():
            return path
        shutil.rmtree(path)
    return None


def _ordered(line: Mapping[str, Any]) -> dict[str, Any]:
    """One order of keys, whether the line was just logged or read from a checkpoint."""
    return dict(sorted(line.items()))


class LogLastStep(TrainerCallback):
    """Logs the last step, whatever ``logging_steps`` is: a short run has an end as well."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a line."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class MetricsFile(TrainerCallback):
    """Keeps ``metrics.jsonl``: one line a logged step, rewritten from the trainer's own history
    after a resume.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start from what the resumed checkpoint remembers."""
        write_jsonl(self.path, [_ordered(line) for line in state.log_history if "loss" in line])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the newest line."""
        if state.is_world_process_zero and "loss" in state.log_history[-1]:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_ordered(state.log_history[-1])) + "\n")


class ShowProgress(TrainerCallback):
    """Steps with rate and time left, instead of the Trainer's dump of every log line."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start at the resumed step."""
        if state.is_world_process_zero:
            self._progress = Progress("train", state.max_steps, done=state.global_step)
            self._progress.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        if self._progress:
            self._progress.advance()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the bar."""
        if self._progress:
            self._progress.__exit__(None, None, None)
