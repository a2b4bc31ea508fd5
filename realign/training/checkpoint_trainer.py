"""transformers.Trainer with the checkpoints of :mod:`realign.training.checkpoints`: whole or
absent, without pickle, also when the process is asked to end during a step.

For a sharded model (FSDP, DeepSpeed), accelerate saves weights and optimizer in the engine's own
format; folder, manifest and random state are the same.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from realign.errors import RefusedError
from realign.runtime.progress import announce
from realign.training.checkpoints import (
    SAVING,
    checkpoint_step,
    damage,
    newest_checkpoint,
    prune,
    seal,
)
from realign.training.preemption import Preemption
from realign.training.state_file import random_state, read_state, set_random_state, write_state

STATE = "state"  # subfolder of a checkpoint; from_pretrained does not look into it


class CheckpointTrainer(Trainer):
    """A Trainer with atomic, pickle-free checkpoints. It resumes bit for bit after SIGKILL, and on
    SIGTERM or Ctrl-C it saves before it ends.

    A subclass with state between two steps returns it from :meth:`kept_state` and restores it in
    :meth:`restore_kept_state`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._preemption = Preemption()
        self._must_stop = False  # the same on all processes
        self._run_folder: str | None = None  # folder that Trainer writes into while it saves
        # state at the beginning of the current step, if it has several micro-batches
        self._step_began: dict[str, Any] | None = None
        self._flos_before = 0.0
        self._verified: str | None = None
        self._saved_step = 0  # before the first step there is nothing to save
        super().__init__(*args, **kwargs)
        self.add_callback(_StopWhenAsked(self))

    def kept_state(self) -> Any:
        """Return this trainer's own state between steps, for :func:`write_state`."""
        return None

    def restore_kept_state(self, state: Any) -> None:
        """Restore the state that :meth:`kept_state` returned."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train, continuing from a checkpoint if one is given.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest intact one in
                ``output_dir``.
            *args: As for :meth:`transformers.Trainer.train`.
            **kwargs: As for :meth:`transformers.Trainer.train`.
        Raises:
            RefusedError: The checkpoint is damaged, or there is none; or one cannot be written.
            SystemExit: With code 143 after SIGTERM, once the state is saved.
            KeyboardInterrupt: After SIGINT, once the state is saved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.newest_checkpoint()
            if resume_from_checkpoint is None:
                raise RefusedError(
                    f"output_dir must hold a checkpoint to continue from, {self.args.output_dir} "
                    "holds none that is whole. Start without resume_from_checkpoint."
                )
        elif resume_from_checkpoint and resume_from_checkpoint != self._verified:
            self._verify(resume_from_checkpoint)
        self._must_stop, self._step_began = False, None
        self._saved_step = checkpoint_step(Path(resume_from_checkpoint or "checkpoint-0"))
        with self._preemption:
            output = super().train(resume_from_checkpoint or None, *args, **kwargs)
            if self._agrees_to_stop():
                self._save_now()
        if self._must_stop:
            self._preemption.end()
        return output

    def newest_checkpoint(self) -> str | None:
        """Return the newest intact checkpoint or None; the first process searches for all."""
        step = torch.tensor(-1, device=self.args.device)
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and (found := newest_checkpoint(folder, announce)):
            step.fill_(checkpoint_step(found))
        chosen = int(broadcast(step))
        self._verified = str(folder / f"checkpoint-{chosen}") if chosen >= 0 else None
        return self._verified

    def _verify(self, checkpoint: str) -> None:
        """Verify a checkpoint on one process, since hashing a large model takes a while."""
        problem = damage(Path(checkpoint)) if self.is_world_process_zero() else None
        if self.any_process(problem is not None):
            raise RefusedError(
                f"resume_from_checkpoint must be an intact checkpoint, got {checkpoint}: "
                f"{problem or 'the first process found it damaged'}. Name another one."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step as Trainer does; then all processes agree on whether to stop."""
        loss = super().training_step(*args, **kwargs)
        self._agrees_to_stop()
        return loss

    def any_process(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any process; all processes must call it."""
        if self.args.world_size == 1:
            return flag
        count: Tensor = self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device))
        return bool(count.item() > 0)

    def _agrees_to_stop(self) -> bool:
        self._must_stop = self._must_stop or self.any_process(self._preemption.is_requested)
        return self._must_stop

    def _save_now(self) -> None:
        """Save the last finished step, unless it is saved already."""
        if self.state.global_step != self._saved_step:
            if self._step_began:
                self.current_flos = self._flos_before
            self._save_checkpoint(self.model_wrapped, None)

    def _position(self) -> dict[str, Any]:
        return {"random": random_state(), "kept": self.kept_state()}

    # ---- Trainer's own steps of saving and loading

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_folder or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        place = folder / f"checkpoint-{self.state.global_step}"
        saving = folder / SAVING
        try:
            if self.args.should_save:
                shutil.rmtree(saving, ignore_errors=True)  # left by a run that was killed
            self.accelerator.wait_for_everyone()
            self._run_folder = str(saving)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(saving / place.name, place)
                keep = self.args.save_total_limit
                # a second one to fall back on, should the newest be damaged
                prune(folder, place, None if keep is None else max(2, keep))
                shutil.rmtree(saving)
            self._saved_step = self.state.global_step
        except (OSError, SafetensorError) as error:
            shutil.rmtree(saving, ignore_errors=True)
            raise RefusedError(
                f"{place} could not be written: {error}. Older checkpoints are as they were; make "
                "room or repair the disk, and give the same command again."
            ) from error
        finally:
            self._run_folder = None
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if backend := getattr(tokenizer, "backend_tokenizer", None):
            # the padding and truncation of the last call would be saved as the tokenizer's settings
            backend.no_padding()
            backend.no_truncation()
        super()._save(output_dir, state_dict)
        # a pickle, and nothing reads it
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            folder = _state_folder(output_dir)
            write_state(folder / "optimizer.safetensors", self.optimizer.state_dict())
            write_state(folder / "schedule.safetensors", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            folder = _state_folder(checkpoint)
            self.optimizer.load_state_dict(read_state(folder / "optimizer.safetensors"))
            self.lr_scheduler.load_state_dict(read_state(folder / "schedule.safetensors"))
        self.restore_kept_state(self._read_position(checkpoint)["kept"])

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            write_state(_state_folder(output_dir) / "scaler.safetensors", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None:
            scaler.load_state_dict(read_state(_state_folder(checkpoint) / "scaler.safetensors"))

    def _save_rng_state(self, output_dir: str) -> None:
        # in the middle of an accumulation, the state at its beginning is saved: the resumed run
        # repeats the whole step
        path = _state_folder(output_dir) / f"process-{self.args.process_index}.safetensors"
        write_state(path, self._step_began or self._position())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(self._read_position(checkpoint)["random"])

    def _read_position(self, checkpoint: str) -> dict[str, Any]:
        folder = _state_folder(checkpoint)
        path = folder / f"process-{self.args.process_index}.safetensors"
        # fewer processes wrote the checkpoint; the others take the state of the first one
        return read_state(path if path.is_file() else folder / "process-0.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a full checkpoint by :func:`load_saved_weights`."""
        target: Any = model or self.model
        if self.is_fsdp_enabled or not isinstance(target, PreTrainedModel):
            # Trainer loads shards and adapters correctly
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_saved_weights(target, resume_from_checkpoint)


def load_saved_weights(model: PreTrainedModel, folder: str) -> None:
    """Load the weights of a folder with ``from_pretrained``, which knows their names in files.

    Trainer's own loading finds no weight of a VLM by its name and continues from the initial ones
    (huggingface/transformers#43701).
    """
    # a dtype that holds the values of all weights, so that none is rounded
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    saved = type(model).from_pretrained(folder, dtype=functools.reduce(torch.promote_types, dtypes))
    model.load_state_dict(saved.state_dict())


class _StopWhenAsked(TrainerCallback):
    """Callback that saves and stops between two micro-batches if a signal has asked for it."""

    def __init__(self, trainer: CheckpointTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.gradient_accumulation_steps > 1:
            self._trainer._step_began = self._trainer._position()
            self._trainer._flos_before = self._trainer.current_flos

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._must_stop:
            self._trainer._save_now()
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._step_began = None
        if self._trainer._must_stop:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not earlier, because the checkpoint would contain this flag
        if self._trainer._must_stop:
            control.should_training_stop = True


def _state_folder(checkpoint: str) -> Path:
    return Path(checkpoint) / STATE
