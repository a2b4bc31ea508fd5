"""One step of RdpoTrainer is one step of TRL's DPOTrainer: its loss, gradients and metrics."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from realign.integrations.trl import patch_trl
from realign_kernels import Objective, Term
from tests.realign.integrations.trl.stock import (
    Step,
    cached_reference,
    distance,
    ours,
    step,
    stock,
    text_half,
)

# transformers and trl on each other's names
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LINKS = {"sigmoid": "logsigmoid", "hinge": "hinge", "ipo": "ipo"}
OF_THE_IMAGE_PAIR = {"rewards/image_margins", "rewards/image_accuracies", "logps/image_rejected"}


@cache
def expected(loss_type: str = "sigmoid", *, image_pairs: bool = False) -> Step:
    """Return a step of TRL's trainer, which is computed once."""
    training = {"loss_type": loss_type}
    with TemporaryDirectory() as folder:
        return step(stock(Path(folder), image_pairs=image_pairs, training=training))


def check(found: Step, truth: Step, *, loss: float, gradient: float) -> None:
    assert abs(found.loss - truth.loss) <= loss * max(1.0, truth.loss)
    assert distance(found.gradients, truth.gradients) <= gradient


@pytest.mark.parametrize("loss_type", LINKS)
def test_the_text_term_of_the_native_path_equals_stock_dpo(tmp_path: Path, loss_type: str) -> None:
    trainer = ours(tmp_path, data_path="native", objective=text_half(LINKS[loss_type]))
    check(step(trainer), expected(loss_type), loss=1e-6, gradient=2e-6)


@pytest.mark.parametrize(
    ("shared_prefix", "is_cached", "loss_type"),
    [
        *(
            (shared, is_cached, "sigmoid")
            for shared in (True, False)
            for is_cached in (True, False)
        ),
        (True, True, "hinge"),
        (False, False, "hinge"),
        (True, False, "ipo"),
        (False, True, "ipo"),
    ],
)
def test_the_text_term_of_the_own_path_equals_stock_dpo(
    tmp_path: Path, shared_prefix: bool, is_cached: bool, loss_type: str
) -> None:
    reference = cached_reference() if is_cached else None
    trainer = ours(
        tmp_path,
        objective=text_half(LINKS[loss_type]),
        shared_prefix=shared_prefix,
        reference=reference,
    )
    assert (trainer.ref_model is None) == is_cached
    check(step(trainer), expected(loss_type), loss=1e-6, gradient=3e-6)


PATHS: dict[str, dict[str, Any]] = {
    "native": {"data_path": "native"},
    "own, separate rows": {"shared_prefix": False},
    "own, shared rows": {"shared_prefix": True},
    "own, cached": {"reference": cached_reference},
}


@pytest.mark.parametrize(
    ("path", "loss_type"),
    [
        # of links alone: the tests of the answer pair above try each on all rows
        pytest.param(path, link, marks=[] if is_quick else pytest.mark.full)
        for path in PATHS
        for link in LINKS
        for is_quick in [link == "sigmoid" or path in ("native", "own, shared rows")]
    ],
)
def test_rdpo_equals_stock_dpo_of_both_pairs_at_weight_two(
    tmp_path: Path, path: str, loss_type: str
) -> None:
    options = {name: value() if callable(value) else value for name, value in PATHS[path].items()}
    trainer = ours(tmp_path, **options, training={"loss_type": loss_type})
    truth = expected(loss_type, image_pairs=True)
    check(step(trainer), truth, loss=1e-6, gradient=3e-6)


@pytest.mark.parametrize("path", PATHS)
def test_metrics_of_the_answer_pair_are_those_of_stock(tmp_path: Path, path: str) -> None:
    options = {name: value() if callable(value) else value for name, value in PATHS[path].items()}
    found, truth = step(ours(tmp_path, **options)).metrics, expected().metrics
    assert found.keys() == truth.keys() | OF_THE_IMAGE_PAIR
    assert found.pop("mean_token_accuracy") == truth["mean_token_accuracy"]
    assert found.pop("rewards/accuracies") == truth["rewards/accuracies"]
    num_tokens = found.pop("num_tokens")  # what was read, the image pair too
    for name in found.keys() - OF_THE_IMAGE_PAIR:
        assert found[name] == pytest.approx(truth[name], abs=1e-5, rel=1e-6), name
    if path in ("native", "own, separate rows"):
        assert num_tokens > truth["num_tokens"]
    # the image pair, in TRL's own numbers: with both pairs it logs the means over the two
    both = expected(image_pairs=True).metrics
    image = 2 * both["rewards/margins"] - truth["rewards/margins"]
    assert found["rewards/image_margins"] == pytest.approx(image, abs=1e-5)
    rejected = 2 * both["logps/rejected"] - truth["logps/rejected"]
    assert found["logps/image_rejected"] == pytest.approx(rejected, abs=1e-4)
    accuracy = 2 * both["rewards/accuracies"] - truth["rewards/accuracies"]
    assert found["rewards/image_accuracies"] == pytest.approx(accuracy)


def test_separate_rows_read_as_many_tokens_as_stock_dpo_and_shared_rows_fewer(
    tmp_path: Path,
) -> None:
    truth = expected().metrics["num_tokens"]
    separate = step(ours(tmp_path, objective=text_half(), shared_prefix=False))
    assert separate.metrics["num_tokens"] == truth
    assert separate.metrics.keys() == expected().metrics.keys()
    shared = step(ours(tmp_path, objective=text_half(), shared_prefix=True))
    assert shared.metrics["num_tokens"] < 0.8 * truth  # image and prompt once


@pytest.mark.parametrize(
    "objective",
    [
        Objective.symmetric(0.2, image_beta=0.3, image_weight=0.5),
        pytest.param(Objective.mdpo(0.2, anchor_weight=0.5), marks=pytest.mark.full),
        pytest.param(
            Objective((Term((1, -1), label_smoothing=0.1), Term((1, 0, -1))), nll_weight=0.3),
            marks=pytest.mark.full,
        ),
    ],
    ids=["four cells", "mdpo", "smoothed"],
)
def test_native_and_own_paths_agree_on_four_cells_and_other_weights(
    tmp_path: Path, objective: Objective
) -> None:
    """No trainer of TRL has these options, so the two paths are compared with each other."""
    native = step(ours(tmp_path, data_path="native", objective=objective))
    for shared_prefix in (True, False):
        own = step(ours(tmp_path, objective=objective, shared_prefix=shared_prefix))
        check(own, native, loss=1e-6, gradient=3e-6)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "own, cached"])
def test_gradient_checkpointing_does_not_change_a_step(tmp_path: Path, path: str) -> None:
    trainer = ours(tmp_path, **PATHS[path])
    expected = step(trainer)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = step(trainer)
    assert found.loss == expected.loss
    assert distance(found.gradients, expected.gradients) == 0


@pytest.mark.parametrize("path", PATHS)
def test_the_patch_does_not_change_a_step(tmp_path: Path, path: str) -> None:
    """The native path scores by the patch; the own path has the exact head without it."""
    options = {name: value() if callable(value) else value for name, value in PATHS[path].items()}
    with patch_trl() as patch:
        found = step(ours(tmp_path, **options))
    check(found, expected(image_pairs=True), loss=1e-6, gradient=3e-6)
    assert (patch.calls, patch.passed_on) == (2 if path == "native" else 0, 0)
    unpatched = step(ours(tmp_path, **options))
    assert found.metrics == pytest.approx(unpatched.metrics, abs=1e-5)


def test_settings_of_the_image_pair_are_arguments(tmp_path: Path) -> None:
    trainer = ours(tmp_path, image_beta=0.3, image_weight=0.5, training={"beta": 0.2})
    assert trainer.objective == Objective.rdpo(0.2, 0.3, 0.5)
