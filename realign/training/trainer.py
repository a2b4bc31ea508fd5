"""RDPOTrainer: rDPO on ``transformers.Trainer``, with a collator, loss, metrics and guards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput, seed_worker

from realign.data.records import Record
from realign.errors import RefusedError
from realign.modeling.collate import PreferenceCollator
from realign.modeling.float32 import computes_exactly
from realign.modeling.memory import Footprint
from realign.modeling.packing import choose_layout
from realign.modeling.parts import (
    disable_dropout,
    freeze_parts,
    frozen_parts,
    give_projector_its_rate,
)
from realign.training.checkpoint_trainer import CheckpointTrainer
from realign.training.guards import (
    first_bad_gradient,
    gradients_are_finite,
    not_finite,
    off_reference,
)
from realign.training.metrics import PairMetrics
from realign.training.objectives import ObjectiveOptions, make_objective
from realign.training.out_of_memory import out_of_memory
from realign.training.preemption import ignore_signals
from realign.training.sampler import FilledCollator, PairSampler, choose_filler
from realign.training.sharding import (
    GatherHead,
    check_data_parallel,
    keep_reference,
    set_up_fsdp,
    whole_weights,
)
from realign_kernels import RdpoOutput

if TYPE_CHECKING:
    from realign.modeling.row_index import RowFacts
    from realign.training.plan import TrainPlan


@dataclass
class RDPOConfig(ObjectiveOptions, TrainingArguments):
    """TrainingArguments with the options of rDPO. The objective's defaults are the paper's.

    Example::

        >>> from realign import RDPOConfig
        >>> RDPOConfig("run", objective="mdpo", beta=0.2, report_to="none").objective
        'mdpo'
    """

    freeze_vision: bool = field(default=True, metadata={"help": "leave the vision tower as it is"})
    freeze_projector: bool = field(default=False, metadata={"help": "leave the projector as it is"})
    freeze_language: bool = field(
        default=False, metadata={"help": "leave the language model and its head as they are"}
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "learning rate of the projector; learning_rate by default"},
    )
    shared_prefix: bool | None = field(
        default=None,
        metadata={"help": "compute image and prompt once for both answers; None if the model can"},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "longest sequence in tokens; a longer one is an error"}
    )
    check_first_step: bool = field(
        default=True, metadata={"help": "stop if the policy does not start at its reference"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay false: rows are records, without columns"}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide NaN in the log"})

    def __post_init__(self) -> None:
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise RefusedError(
                "train_sampling_strategy must be random or sequential, got "
                f"{self.train_sampling_strategy!r}: the pairs of a step must not depend on lengths "
                "or ranks. Drop it."
            )
        if self.save_only_model:
            raise RefusedError(
                "save_only_model must be false: a run cannot continue from weights alone. Drop it."
            )
        super().__post_init__()


class RDPOTrainer(CheckpointTrainer):
    """Trainer of VLMs on dual-preference records with cached reference log-probabilities.

    Args:
        model: Model from :func:`realign.load_model`, or a peft model around one.
        args: The configuration.
        train_dataset: Sequence of records.
        processing_class: The model's processor.
        reference: Mapping of ``record.key`` to log-probabilities of the reference, shape ``(C,)``
            with C at least the objective's number of cells, from :func:`realign.read_cache`. Its
            attribute ``batch_variance``, if it has one, sets the tolerance of
            ``check_first_step``.
        callbacks: Callbacks of the Trainer.
        plan: Facts of the rows, objective and layout of a run; None determines them here.
    Raises:
        ValueError: The reference lacks a record, or the objective is unknown.
        RefusedError: ``auto_find_batch_size`` is set, nothing is left to train, or there is no
            projector for ``projector_learning_rate``.

    Example::

        >>> from pathlib import Path
        >>> import torch
        >>> import realign
        >>> records = realign.read_records(Path("pairs.parquet"), None)
        >>> scoring = realign.Scoring(Path("model"), 3, "label", realign.Numerics(torch.float32))
        >>> reference = realign.read_cache(Path("cache"), records, scoring.identity())
        >>> model = realign.load_model(Path("model"), torch.float32)
        >>> args = realign.RDPOConfig("run", max_steps=1, report_to="none", use_cpu=True)
        >>> processor = realign.load_processor(Path("model"))
        >>> trainer = realign.RDPOTrainer(model, args, records, processor, reference)
        >>> trainer.train().global_step  # after its log
        {'train_runtime': ...
        1
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
        plan: TrainPlan | None = None,
    ) -> None:
        if args.auto_find_batch_size:
            raise RefusedError(
                "auto_find_batch_size must be false: it changes the pairs of a step unasked. Set "
                "per_device_train_batch_size and gradient_accumulation_steps."
            )
        # DataParallel would scatter a packed row over the GPUs of a process
        args._n_gpu = min(args.n_gpu, 1)
        self.objective = plan.objective if plan else make_objective(args)
        rows: Sequence[Record | RowFacts] = plan.rows.rows if plan else train_dataset
        if missing := [row.id for row in rows if row.key not in reference]:
            raise ValueError(
                f"reference must have every record, lacks {len(missing)}, first: row {missing[0]}."
            )
        disable_dropout(model)
        freeze_parts(
            model,
            frozen_parts(
                vision=args.freeze_vision,
                projector=args.freeze_projector,
                language=args.freeze_language,
            ),
        )
        self._batch_variance: float | None = getattr(reference, "batch_variance", None)
        self._step_ids: list[str] = []  # ids of the rows of the current step, for messages
        layout = plan.model.layout if plan else choose_layout(model, args.shared_prefix)
        collator: Any = PreferenceCollator(
            processing_class,
            self.objective.num_cells,
            reference,
            args.max_length,
            shared_prefix=layout == "shared prefix",
            # a cache knows what its values were computed from; a plain mapping does not
            watch=getattr(reference, "check_inputs", None),
        )
        if args.world_size > 1:
            filler = choose_filler(rows)
            has_images = bool(rows[filler].images)
            collator = FilledCollator(
                collator, partial(train_dataset.__getitem__, filler), has_images=has_images
            )
            if args.ddp_find_unused_parameters is None:
                # the last layers of a trained vision tower get no gradient, nor does a projector
                # without images; every other weight gets one on every rank
                args.ddp_find_unused_parameters = not (args.freeze_vision and has_images)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=[GatherHead(), *(callbacks or [])],
        )
        check_data_parallel(self.accelerator)
        if self.is_fsdp_enabled:
            set_up_fsdp(self.accelerator, model)
        # saved in every checkpoint
        self._metrics = PairMetrics(
            self.objective, lambda sums: self.accelerator.reduce(sums, reduction="sum")
        )
        # compute_loss divides by the pairs of the whole step, so Trainer must not divide again
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Record]:
        """Return the micro-batches of this rank, in an order independent of the number of ranks."""
        args, dataset = self.args, self.train_dataset
        sampler = PairSampler(
            len(dataset),
            self._train_batch_size,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy == "random",
            drop_last=args.dataloader_drop_last,
        )
        seed = partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        )
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(ignore_signals, seed, self._preemption.is_waited_for),
            # its own generator: creating a loader would otherwise advance the global one
            generator=torch.Generator(),
        )
        # the sampler already distributes the pairs; accelerate only sets its epoch
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimizer step, and the step's pairs over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_pairs = torch.tensor(sum(len(batch["ids"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(num_pairs, reduction="sum")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return Trainer's optimizer, with the projector's own learning rate if one is set."""
        is_new, rate = self.optimizer is None, self.args.projector_learning_rate
        optimizer = super().create_optimizer(model)
        if is_new and rate is not None:
            give_projector_its_rate(optimizer, model or self.model, rate)
        return optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Prepare inputs as Trainer does, without rounding the reference's log-probabilities."""
        return keep_reference(super()._prepare_inputs, inputs, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, RdpoOutput]:
        """Return the micro-batch's share of the mean loss over all pairs of the optimizer step, or
        the mean over its own pairs if ``num_items_in_batch`` is None.
        """
        ids = inputs.pop("ids")
        output: RdpoOutput = model(
            **inputs, objective=self.objective, rejected_scoring=self.args.rejected_scoring
        )
        self._check_before_backward(output, inputs, ids)
        self._metrics.add(output, counted=bool(ids))
        loss = output.loss
        if num_items_in_batch is not None:
            # DDP, FSDP and ZeRO average the ranks' gradients; the factor turns the mean into a sum
            loss = loss * (len(ids) * self.accelerator.num_processes / num_items_in_batch)
        return (loss, output) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does; the first rank gathers and saves sharded weights.

        The weights of a checkpoint stay sharded, so that the run can resume with its optimizer.
        """
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.accelerator, self.model)
        if self.args.should_save:
            self._save(output_dir, weights)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over all pairs since the last log line, also those before a resume."""
        if "loss" in logs:
            logs = {**logs, **self._metrics.take_means()}
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as :meth:`CheckpointTrainer.train` does.

        Raises:
            FloatingPointError: A loss, an input or a gradient is not finite; that step has changed
                no weight.
            RefusedError: The policy does not start at its reference, memory is full, or the
                checkpoint to continue from is damaged.
        """
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise self._out_of_memory(error) from error

    def kept_state(self) -> Any:
        """Return the sums of the metrics since the last line."""
        return dict(self._metrics.sums())

    def restore_kept_state(self, state: Any) -> None:
        """Restore the state that :meth:`kept_state` returned."""
        self._metrics.restore(state)

    def _check_before_backward(
        self, output: RdpoOutput, inputs: Mapping[str, Any], ids: Sequence[str]
    ) -> None:
        """Stop all processes if one has a number that is not finite or starts off its reference."""
        self._step_ids += ids
        step = self.state.global_step + 1
        problem = not_finite(output, inputs, ids)
        if self.any_process(problem is not None):
            problem = problem or "another process has a number that is not finite; see its message."
            raise FloatingPointError(f"step {step}: {problem} No weight was changed by this step.")
        if step > 1 or not self.args.check_first_step:
            return
        problem = self._off_reference(output, ids) if ids else None
        if self.any_process(problem is not None):
            raise RefusedError(problem or "another process starts off its reference; see there.")

    def _off_reference(self, output: RdpoOutput, ids: Sequence[str]) -> str | None:
        autocast = self.accelerator.mixed_precision != "no"  # set by arguments or by accelerate
        return off_reference(
            output,
            self.objective,
            ids,
            is_exact=computes_exactly(self.model, autocast=autocast),
            batch_variance=self._batch_variance,
        )

    def _check_gradient(self) -> None:
        """Stop all processes before a gradient that is not finite is used or clipped."""
        ids, self._step_ids = self._step_ids, []
        if self.accelerator.scaler is not None:
            return  # gradients in float16 may overflow; the loss scaler then skips the step
        if self.any_process(not gradients_are_finite(self.model_wrapped.parameters())):
            name = first_bad_gradient(self.model_wrapped.named_parameters())
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the gradient must be finite, got "
                f"{name or 'another value on another process'}, for rows {', '.join(ids)}. "
                "No weight was changed by this step."
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._check_gradient()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing is clipped
            self._check_gradient()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and norm is not None and not math.isfinite(norm):
            # the squares overflow, or DeepSpeed reports it after it has taken its step
            changed = "may have been" if self.is_deepspeed_enabled else "was not"
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the gradient's norm must be finite, got "
                f"{float(norm)}. The model {changed} changed by this step; earlier checkpoints "
                "are as they were."
            )
        return norm

    def _out_of_memory(self, error: BaseException) -> RefusedError:
        device = self.args.device
        on_gpu = device.type == "cuda"
        return out_of_memory(
            error,
            Footprint.of(self.model),
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            allocated=torch.cuda.max_memory_allocated(device) if on_gpu else None,
            capacity=torch.cuda.mem_get_info(device)[1] if on_gpu else None,
        )
