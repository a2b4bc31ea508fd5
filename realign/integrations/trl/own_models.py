"""The forward of this project on the models that TRL's constructor is given or loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import trl
from accelerate.utils import is_peft_model
from trl.trainer import dpo_trainer

from realign.errors import RefusedError
from realign.modeling.preference_forward import attach_preference_forward

USE_NATIVE = "Pass data_path='native' to train with TRL's own forward."


def give_own_forward(model: Any) -> None:
    """Give a model, or the base of an adapter, this project's forward.

    Raises:
        RefusedError: The forward cannot score the model.
    """
    try:
        attach_preference_forward(model.get_base_model() if is_peft_model(model) else model)
    except RefusedError as error:
        raise RefusedError(f"{error} TRL's own forward may take it. {USE_NATIVE}") from None


def check_adapter(config: Any) -> None:
    """Refuse adapters that put virtual tokens before a row: the forward would read other tokens."""
    if getattr(config, "is_prompt_learning", False):
        raise RefusedError(
            f"peft_config must not add virtual tokens with data_path='own', got "
            f"{type(config).__name__}. {USE_NATIVE}"
        )


@contextmanager
def own_models(policy: Any, *, loads_reference: bool) -> Iterator[None]:
    """Within the block, every model that TRL's constructor loads gets this project's forward, and
    LoRA on the output projection is accepted.

    Args:
        policy: Argument of the constructor: a model, or the name of the first one that it loads.
        loads_reference: Whether the constructor may load a reference beside the policy.
    Raises:
        RefusedError: TRL has another version, or the forward cannot score a model.
    """
    num_loaded = 0 if isinstance(policy, str) else 1

    def load_own(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal num_loaded
        num_loaded += 1
        if num_loaded > 1 and not loads_reference:
            return None  # to TRL, no reference model
        model = load(*args, **kwargs)
        give_own_forward(model)
        return model

    with (
        _replaced("create_model_from_path", lambda load: partial(load_own, load)),
        # isinstance(head, ()) is false: our forward reads the adapter of the output projection
        _replaced("BaseTunerLayer", lambda _: ()),
    ):
        yield


@contextmanager
def _replaced(name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a name in the module of TRL's DPOTrainer by ``make(value)`` within the block."""
    if not hasattr(dpo_trainer, name):
        raise RefusedError(
            f"trl must be a version whose DPOTrainer uses {name}, got {trl.__version__}. Install "
            "trl 1.16, with which this was tested."
        )
    before = getattr(dpo_trainer, name)
    setattr(dpo_trainer, name, make(before))
    try:
        yield
    finally:
        setattr(dpo_trainer, name, before)
