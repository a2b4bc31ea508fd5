"""Metrics are means over pairs, for any micro-batches, ranks and checkpoints in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from realign.runtime.strict_json import iter_jsonl
from realign.training.callbacks import MetricsFile
from realign.training.metrics import MAX_PENDING, PairMetrics, metrics_by_pair
from realign_kernels import Objective, RdpoOutput

RDPO = Objective.rdpo(0.1, 0.1, 1.0)


def output(*losses: float, images: bool = True) -> RdpoOutput:
    """Return a batch with as many pairs as losses; its other values follow from them."""
    values = torch.tensor(losses)
    num_tokens = torch.ones(3, len(losses), dtype=torch.int64)
    num_tokens[2] *= images
    cells = torch.stack((values, -values, values / 2))
    return RdpoOutput(values.mean(), -cells, num_tokens, cells, values, -values)


def metrics(sum_over_ranks=lambda sums: sums) -> PairMetrics:
    return PairMetrics(RDPO, sum_over_ranks)


def test_means_are_over_pairs_not_over_micro_batches() -> None:
    line = metrics()
    for batch in (output(1.0, 2.0, 3.0), output(6.0)):
        line.add(batch)
    means = line.take_means()
    assert means["loss"] == means["rewards/chosen"] == means["rewards/text_margins"] == 3
    assert means["rewards/text_accuracies"] == 1
    assert means["rewards/image_accuracies"] == 0
    assert line.take_means() == {}


def test_a_pair_without_a_cell_is_not_averaged_for_that_cell() -> None:
    line = metrics()
    line.add(output(1.0, 1.0))
    line.add(output(3.0, images=False))
    means = line.take_means()
    assert means["logps/image_rejected"] == -0.5
    assert means["logps/chosen"] == pytest.approx(-5 / 3)
    line.add(output(3.0, images=False))
    assert "logps/image_rejected" not in line.take_means()


def test_an_uncounted_batch_has_no_weight_even_with_nan() -> None:
    line = metrics()
    line.add(output(2.0))
    line.add(output(float("nan")), counted=False)
    assert line.take_means()["loss"] == 2


def test_ranks_are_summed_only_when_means_are_read() -> None:
    calls = []

    def other_rank_has_the_same(sums: torch.Tensor) -> torch.Tensor:
        calls.append(len(sums))
        return 2 * sums

    line = metrics(other_rank_has_the_same)
    for loss in (1.0, 2.0):
        line.add(output(loss))
    assert not calls
    assert line.sums()["loss"] == (6.0, 4.0)
    assert line.take_means()["loss"] == 1.5
    assert calls == [2]


def test_a_logged_line_does_not_depend_on_checkpoints_in_between() -> None:
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    lines = []
    for interval in (1, 7, 50):
        line = metrics()
        for number, loss in enumerate(losses):
            line.add(output(loss, loss * 3))
            if number % interval == 0:  # a checkpoint, and a new process that goes on from it
                saved = line.sums()
                line = metrics()
                line.restore(saved)
        lines.append(line.take_means())
    assert lines[0] == lines[1] == lines[2]


def test_metrics_of_a_run_that_never_logs_do_not_grow() -> None:
    line = metrics()
    for _ in range(MAX_PENDING):
        line.add(output(1.0))
    assert not line._pending
    assert line.sums()["loss"] == (MAX_PENDING, MAX_PENDING)


@pytest.mark.parametrize("objective", [Objective.dpo(0.1), RDPO, Objective.symmetric(0.1, 0.1, 1)])
def test_metric_names_depend_only_on_the_objective(objective: Objective) -> None:
    """Ranks add metrics up by their position."""
    cells = objective.num_cells

    def of(images: bool) -> RdpoOutput:
        num_tokens = torch.ones(cells, 2, dtype=torch.int64)
        num_tokens[2:] *= images
        zeros = torch.zeros(cells, 2)
        return RdpoOutput(zeros.mean(), zeros, num_tokens, zeros, zeros[0], zeros[0])

    assert list(metrics_by_pair(of(True), objective)) == list(metrics_by_pair(of(False), objective))


def test_non_finite_metrics_are_null_in_the_file(tmp_path: Path) -> None:
    """A loss scaler skips the step of a gradient whose norm is infinite, and the line is logged."""
    path = tmp_path / "metrics.jsonl"
    line = {"loss": 1.5, "grad_norm": float("inf"), "step": 1}
    state = TrainerState(log_history=[line, {**line, "rewards/chosen": float("nan"), "step": 2}])
    callback = MetricsFile(path)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None)
    first, second, again = [row for _, row in iter_jsonl(path)]
    assert first == {"loss": 1.5, "grad_norm": None, "step": 1}
    assert second == again == {**first, "rewards/chosen": None, "step": 2}
