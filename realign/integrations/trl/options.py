"""The options of a DPOConfig for rDPO: the objective that they name, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets
from accelerate.logging import get_logger
from trl import DPOConfig

from realign.errors import RefusedError
from realign_kernels import Objective

logger = get_logger(__name__)

DATA_PATHS = ("own", "native")
# TRL's loss_type to the link function of every term; no table of terms has TRL's other losses
LINKS = {"sigmoid": "logsigmoid", "hinge": "hinge", "ipo": "ipo"}
OWN_LOSS = "pass objective= with a table of terms, or use TRL's own DPOTrainer"


def make_objective(
    args: DPOConfig,
    objective: Objective | None = None,
    image_beta: float | None = None,
    image_weight: float = 1.0,
) -> Objective:
    """Return the objective: rDPO with the configuration's beta and loss, or the one that is given.

    Raises:
        RefusedError: The configuration names a loss that no table of terms has, or sets an
            objective beside the given one.
    """
    if objective is not None:
        defaults = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
        given: dict[str, tuple[Any, Any]] = {
            "beta": (args.beta, defaults["beta"]),
            "loss_type": (args.loss_type, ["sigmoid"]),
            "image_beta": (image_beta, None),
            "image_weight": (image_weight, 1.0),
        }
        for name, (value, default) in given.items():
            if value != default:
                raise RefusedError(
                    f"{name} must be left out beside objective=, got {value}. Put it into the "
                    "terms of the objective."
                )
        return objective
    if len(args.loss_type) != 1 or args.loss_type[0] not in LINKS:
        raise RefusedError(
            f"loss_type must be one of {', '.join(LINKS)}, got {args.loss_type}. Choose one of "
            f"them, {OWN_LOSS}."
        )
    link = LINKS[args.loss_type[0]]
    terms = Objective.rdpo(args.beta, image_beta, image_weight).terms
    return Objective(tuple(dataclasses.replace(term, link=link) for term in terms))


def check_options(args: DPOConfig, *, is_cached: bool, data_path: str) -> None:
    """Refuse options that rDPO would ignore, and warn about one that TRL itself ignores.

    Raises:
        RefusedError: The message names the option, its value and the remedy.
    """
    check_data_path(data_path)
    rules: list[tuple[str, Any, str]] = [
        ("f_divergence_type", "reverse_kl", f"Drop it, {OWN_LOSS}"),
        ("ld_alpha", None, "Drop it, or use TRL's own DPOTrainer"),
        ("use_weighting", False, "Drop it, or use TRL's own DPOTrainer"),
        ("loss_weights", None, "Pass image_weight= to weigh the image pair, or objective="),
        ("padding_free", False, "Drop it: shared_prefix= packs the rows of a batch"),
        ("pad_to_multiple_of", None, "Drop it: TRL's collator of images does not pad so either"),
        ("precompute_ref_log_probs", False, "Pass reference=; `realign cache` computes it"),
    ]
    if is_cached:
        rules.append(
            ("sync_ref_model", False, "Leave reference= out: cached values stay those of the start")
        )
    for name, allowed, remedy in rules:
        value = getattr(args, name)
        if value != allowed:
            beside = " beside reference=" if name == "sync_ref_model" else ""
            raise RefusedError(f"{name} must be {allowed!r}{beside}, got {value!r}. {remedy}.")
    if args.label_smoothing:
        logger.warning(
            f"label_smoothing = {args.label_smoothing} is ignored: TRL reads it for the losses "
            "robust, exo_pair, aot and aot_unpaired alone. Pass objective= with terms that have a "
            "label_smoothing for a smoothed loss."
        )


def check_data_path(data_path: str) -> None:
    """Refuse an unknown data path."""
    if data_path not in DATA_PATHS:
        raise RefusedError(
            f"data_path must be one of {', '.join(DATA_PATHS)}, got {data_path!r}. Choose own, or "
            "native for a model that own refuses."
        )


def check_left_out(data_path: str, other: str, **arguments: Any) -> None:
    """Refuse arguments that a data path does not read; None is an argument that was left out.

    Raises:
        RefusedError: The message names the other path, which reads it.
    """
    for name, value in arguments.items():
        if value is not None:
            raise RefusedError(
                f"{name} must be left out with data_path={data_path!r}, got {value!r:.60}. Drop "
                f"it, or pass data_path={other!r}."
            )


def set_options(args: DPOConfig) -> None:
    """Set the two options that image pairs require, and log every change."""
    if args.remove_unused_columns:
        args.remove_unused_columns = False
        logger.warning("remove_unused_columns is set to False: TRL would drop rejected_images.")
    if args.max_length is not None:
        logger.warning(
            f"max_length is set to None, it was {args.max_length}: sequences with images are never "
            "truncated."
        )
        args.max_length = None


def check_columns(dataset: Any, name: str, num_cells: int) -> None:
    """Refuse a dataset without images, or without retrieved ones if the objective reads them.

    Raises:
        RefusedError: The first row has no ``images`` or ``image``, or no ``rejected_images``.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_columns(part, f"{name}[{key!r}]", num_cells)
        return
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return  # TRL refuses anything else
    columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know them
    needed: list[tuple[tuple[str, ...], str]] = [(("images", "image"), "the image of each pair")]
    if num_cells > 2:
        needed.append((("rejected_images",), "the retrieved image of each pair"))
    for names, content in needed:
        if not {*names} & {*columns}:
            raise RefusedError(
                f"{name} must have the column {names[0]}, {content}, got the columns "
                f"{', '.join(columns)}. Add it (`realign build` makes both), or use TRL's own "
                "DPOTrainer for pairs of answers alone."
            )
