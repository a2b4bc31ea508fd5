"""``realign card``: write the card of a trained model or of a dataset, without the network."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import RepoCard

from realign.errors import RefusedError
from realign.review.cards.dataset_card import dataset_card
from realign.review.cards.model_card import CardOptions, model_card
from realign.review.cards.place import CARD, ModelPlace, find_place
from realign.review.cards.seal import check_replaceable, write_sealed
from realign.runtime.progress import announce

_OF_MODELS = {"base_model": "base-model", "dataset": "dataset", "evaluation": "eval"}


def write_card(path: Path, options: CardOptions, *, overwrite: bool = False) -> Path:
    """Write ``README.md`` into the folder of a model or a dataset and return its path.

    Args:
        path: A run, whose checkpoint gets the card; another folder of a model; or a folder with
            ``dataset.parquet``.
        options: Facts that the files do not hold.
        overwrite: Whether to replace a card that a person has edited.
    Raises:
        RefusedError: There is nothing to describe, an option does not fit, or the folder has a
            card that this function did not write.
    """
    for name in ("repo", "base_model", "dataset"):
        if (value := getattr(options, name)) is not None:
            check_repo_id(value, name.replace("_", "-"))
    place = find_place(path, options.run)
    card = place.folder / CARD
    check_replaceable(card, overwrite=overwrite)
    content: RepoCard
    if isinstance(place, ModelPlace):
        content, notes = model_card(place, options)
    else:
        for name, flag in _OF_MODELS.items():
            if (value := getattr(options, name)) is not None:
                raise RefusedError(
                    f"{flag} must not be set for a dataset, got {value}. Drop --{flag}."
                )
        content, notes = dataset_card(place, options.licence, options.repo)
    for note in notes:
        announce(f"card: {note}")
    write_sealed(card, str(content))
    return card


def check_repo_id(value: str, option: str) -> None:
    """Refuse a text that is not a name of a repository on the hub.

    Args:
        value: The name.
        option: The option that gives it, for messages.
    Raises:
        RefusedError: It is not of the form ``user/name``.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(value)
        is_valid = re.fullmatch(r"[^/]+/[^/]+", value) is not None
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise RefusedError(
            f"{option} must be a name on the hub of the form user/name, got {value!r}. Correct "
            f"--{option}."
        )
