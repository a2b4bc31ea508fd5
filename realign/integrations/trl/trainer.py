"""RdpoTrainer: rDPO as a trainer of TRL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from realign.errors import RefusedError
from realign.integrations.trl.native import GivenCollator, NativeBatch, NativeCollator
from realign.integrations.trl.options import (
    check_columns,
    check_left_out,
    check_options,
    make_objective,
    set_options,
)
from realign.integrations.trl.own_models import (
    USE_NATIVE,
    check_adapter,
    give_own_forward,
    own_models,
)
from realign.integrations.trl.rows import RowCollator, check_rows, with_image_bytes
from realign.integrations.trl.step_metrics import NUM_TOKENS, step_metrics
from realign.modeling.float32 import computes_exactly
from realign.modeling.packing import choose_layout
from realign.modeling.preference_forward import lora_of_head
from realign.training.checkpoint_trainer import load_saved_weights
from realign.training.guards import off_reference
from realign.training.sharding import (
    GatherHead,
    check_data_parallel,
    keep_reference,
    set_up_fsdp,
)
from realign_kernels import Objective, RdpoStatsOutput

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import TrainerCallback

logger = get_logger(__name__)


class RdpoTrainer(DPOTrainer):
    """Trainer that adds rDPO to TRL's DPOTrainer: configuration, callbacks, adapters, checkpoints
    and metrics are DPOTrainer's, and each row has an image pair beside its answer pair.

    Args:
        model: As for DPOTrainer: a model, a peft model, or a name.
        ref_model: As for DPOTrainer; must be None beside ``reference``.
        args: As for DPOTrainer. ``beta`` and ``loss_type`` (sigmoid, hinge or ipo) make the
            objective; ``remove_unused_columns`` and ``max_length`` are set to False and None.
        data_collator: Only for ``data_path="native"``: function that returns TRL's batch with the
            rows cell by cell, ``[v y_w | v y_l | v_l y_w]``.
        train_dataset: Rows with TRL's columns (``prompt``, ``chosen``, ``rejected``, ``images`` or
            ``image``) and ``rejected_images``, the retrieved images.
        eval_dataset: The same, or a dictionary of such datasets.
        processing_class: The model's processor.
        compute_metrics: As for DPOTrainer, only for ``data_path="native"``.
        callbacks: As for DPOTrainer.
        optimizers: As for DPOTrainer.
        quantization_config: As for DPOTrainer.
        peft_config: As for DPOTrainer. The output projection may be one of its targets with
            ``data_path="own"``.
        reference: Mapping of ``record.key`` to log-probabilities of the reference, shape ``(C,)``,
            from :func:`realign.read_cache`; no reference model is then loaded. None computes them
            at every step, as DPOTrainer does.
        data_path: ``"own"``: this project's collator and forward. ``"native"``: TRL's collator and
            forward, for models that ``own`` refuses.
        objective: Another table of terms instead of rDPO with the configuration's beta and loss.
        image_beta: KL strength of the image pair; None for ``beta``.
        image_weight: Weight of the image pair; >= 0.
        shared_prefix: Whether the answers of a pair share their image and prompt in one row; None
            shares if the model can.
    Raises:
        RefusedError: An option, a row or the reference does not fit; the message names it and the
            remedy.

    Example::

        >>> from datasets import Dataset
        >>> from transformers import AutoProcessor
        >>> from trl import DPOConfig
        >>> from realign.integrations.trl import RdpoTrainer
        >>> args = DPOConfig("out", max_steps=1, report_to="none", use_cpu=True, bf16=False)
        >>> trainer = RdpoTrainer(
        ...     "model",
        ...     args=args,
        ...     train_dataset=Dataset.from_parquet("pairs.parquet", cache_dir="rows"),
        ...     processing_class=AutoProcessor.from_pretrained("model"),
        ... )
        >>> trainer.train().global_step  # after its log
        {'train_runtime': ...
        1
    """

    # DPOTrainer writes these into model cards
    _tag_names: ClassVar = ["trl", "dpo", "rdpo"]
    _name = "rDPO"
    _paper: ClassVar = {
        "title": "Re-Align: Aligning Vision Language Models via Retrieval-Augmented Direct "
        "Preference Optimization",
        "id": "2502.13146",
    }

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        reference: Mapping[str, Tensor] | None = None,
        data_path: Literal["own", "native"] = "own",
        objective: Objective | None = None,
        image_beta: float | None = None,
        image_weight: float = 1.0,
        shared_prefix: bool | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DPOConfig(f"{name.rstrip('/').rpartition('/')[2]}-rDPO")
        if reference is not None and not isinstance(reference, Mapping):
            raise RefusedError(
                f"reference must map record.key to log-probabilities, got "
                f"{type(reference).__name__}. Pass what read_cache returns."
            )
        check_options(args, is_cached=reference is not None, data_path=data_path)
        self.objective = make_objective(args, objective, image_beta, image_weight)
        self.reference = reference
        self._is_compared = False  # whether the first loss was compared with the reference's
        self._is_own = data_path == "own"
        if self._is_own:
            check_left_out(
                "own", "native", data_collator=data_collator, compute_metrics=compute_metrics
            )
            check_adapter(peft_config)
        else:
            check_left_out("native", "own", reference=reference, shared_prefix=shared_prefix)
        if reference is not None and ref_model is not None:
            raise RefusedError(
                f"ref_model must be None beside reference=, got {type(ref_model).__name__}: the "
                "reference's values are known. Drop one of them."
            )
        train_dataset = self._checked(train_dataset, "train_dataset")
        eval_dataset = self._checked(eval_dataset, "eval_dataset")
        if self._is_own:
            for given in (model, ref_model):
                if isinstance(given, nn.Module):
                    give_own_forward(given)
            callbacks = [GatherHead(), *(callbacks or [])]
        set_options(args)
        is_given_adapter = isinstance(model, nn.Module) and is_peft_model(model)
        loading = own_models(model, loads_reference=reference is None)
        with loading if self._is_own else nullcontext():
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if reference is not None and is_given_adapter and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")  # TRL's copy of the adapter, which nothing reads
        if self._is_own:
            self._set_up_own(shared_prefix)
            return
        num_cells = self.objective.num_cells
        collator: Any = (
            NativeCollator(self.processing_class, num_cells=num_cells)
            if data_collator is None
            else GivenCollator(data_collator, num_cells)
        )
        self.data_collator = collator

    def _checked(self, dataset: Any, name: str) -> Any:
        """Return a dataset as its data path reads it, after checking its columns and rows."""
        check_columns(dataset, name, self.objective.num_cells)
        if not self._is_own or dataset is None or isinstance(dataset, str):
            return dataset
        dataset = with_image_bytes(dataset)
        check_rows(dataset, name, self.reference, self.objective.num_cells)
        return dataset

    def _set_up_own(self, shared_prefix: bool | None) -> None:
        """Replace TRL's collator by this project's, and refuse what its forward would ignore."""
        check_adapter(getattr(self.model, "active_peft_config", None))
        lora_of_head(self.model.get_output_embeddings())
        if self.aux_loss_enabled:
            raise RefusedError(
                f"router_aux_loss_coef must be 0 with data_path='own', got "
                f"{self.router_aux_loss_coef} for {type(self.model).__name__}, a mixture of "
                "experts. Set it to 0.0, or pass data_path='native'."
            )
        check_data_parallel(self.accelerator)
        if self.is_fsdp_enabled:
            set_up_fsdp(self.accelerator, self.model)
        collator: Any = RowCollator(
            self.processing_class,
            self.objective.num_cells,
            self.reference,
            shared_prefix=choose_layout(self.model, shared_prefix) == "shared prefix",
        )
        self.data_collator = collator

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as DPOTrainer does; a dataset is checked like those of the constructor."""
        dataset = self._checked(eval_dataset, "eval_dataset")
        return super().evaluate(dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Predict as DPOTrainer does.

        Raises:
            RefusedError: Logits are requested, which ``data_path="own"`` does not compute.
        """
        if self._is_own and not prediction_loss_only:
            raise RefusedError(
                "prediction_loss_only must be True with data_path='own', got False: no logits are "
                f"made. Call evaluate(). {USE_NATIVE}"
            )
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights by name; Trainer finds none of a VLM and keeps the initial ones."""
        target = model or self.model
        if self.is_fsdp_enabled or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_saved_weights(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load as :meth:`_load_from_checkpoint` does."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_sharded or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
            return
        load_saved_weights(self.model, self.state.best_model_checkpoint)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Prepare inputs as Trainer does, without rounding the reference's log-probabilities."""
        return keep_reference(super()._prepare_inputs, inputs, self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss over the pairs of a micro-batch, as DPOTrainer does; Trainer divides
        it by the accumulation steps.
        """
        mode = "train" if self.model.training else "eval"
        num_tokens_read = inputs["attention_mask"].sum()
        outputs: Any
        if self._is_own:
            loss, output = self._own_loss(model, inputs)
            outputs = output
        else:
            loss, output, outputs = self._native_loss(model, inputs, mode, return_outputs)
        self._log_step(mode, output, num_tokens_read)
        return (loss, outputs) if return_outputs else loss

    def _own_loss(
        self, model: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, RdpoStatsOutput]:
        ids = inputs["ids"]
        inputs = {name: value for name, value in inputs.items() if name != "ids"}
        if "ref_logps" not in inputs:
            inputs["ref_logps"] = self._of_reference(
                lambda reference: reference(**inputs, objective=self.objective).logps
            )
        output = model(**inputs, objective=self.objective, statistics=True)
        if self.reference is not None and self.model.training and not self._is_compared:
            self._is_compared = True
            self._warn_off_reference(output, ids)
        return output.loss, output

    def _warn_off_reference(self, output: RdpoStatsOutput, ids: list[str]) -> None:
        """Warn of a policy that does not start at its cached reference, such as one of another
        model or precision. This may be intended.
        """
        problem = off_reference(
            output,
            self.objective,
            [row_id or "(without an id)" for row_id in ids],
            is_exact=computes_exactly(
                self.model, autocast=self.accelerator.mixed_precision != "no"
            ),
            batch_variance=getattr(self.reference, "batch_variance", None),
        )
        if problem and self.state.global_step == 0:
            lines = problem.splitlines()[:2]  # the third line names an option of realign train
            logger.warning(
                "\n".join([*lines, "Go on only if the policy is meant to begin elsewhere."])
            )

    def _native_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], mode: str, return_outputs: bool
    ) -> tuple[Tensor, RdpoStatsOutput, Any]:
        batch = NativeBatch.of(inputs, self.objective.num_cells)
        ref_logps = self._of_reference(
            lambda reference: batch.sums(batch.score(reference).log_probs)
        )
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = batch.score(model, **options)
        output = batch.output(outputs, ref_logps, self.objective)
        loss = output.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            gathered = self.accelerator.gather_for_metrics(outputs.aux_loss.detach())
            self._metrics[mode]["aux_loss"].append(gathered.mean().item())
        if return_outputs:  # the fused head makes no logits
            with torch.no_grad():
                outputs = model(**{**batch.inputs, "labels": None})
        return loss, output, outputs

    def _of_reference(self, score: Callable[[Any], Tensor]) -> Tensor:
        """Return the scores of the reference: a second model, or the policy without its adapter."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
            )
            if self.ref_model is not None:
                return score(self.ref_model)
            adapted = self.accelerator.unwrap_model(self.model)
            # TRL's copy of a given adapter, if there is one
            stack.enter_context(
                use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None)
            )
            return score(self.model)

    def _log_step(self, mode: str, output: RdpoStatsOutput, num_tokens_read: Tensor) -> None:
        found = step_metrics(
            output, num_tokens_read, lambda sums: self.accelerator.reduce(sums, reduction="sum")
        )
        num_tokens = found.pop(NUM_TOKENS)
        if mode == "train":
            self._total_train_tokens += int(num_tokens) // self._tp_size
        self._metrics[mode][NUM_TOKENS] = [self._total_train_tokens]
        for name, value in found.items():
            self._metrics[mode][name].append(value)
