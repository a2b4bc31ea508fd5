"""The losses of examples/losses.py against the formulas of the papers, and against TRL."""

from __future__ import annotations

import re
import runpy
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SCRIPT = Path(__file__).parents[2] / "examples" / "losses.py"
LOSSES = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
NUM_ROWS, T, V, D = 6, 9, 41, 8


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and labels of answers that begin and end in different places."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(NUM_ROWS, T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 2 / D**0.5
    labels = torch.randint(0, V, (NUM_ROWS, T), generator=generator)
    for row in range(NUM_ROWS):
        labels[row, : 2 + row % 2] = -100
        labels[row, T - row % 3 :] = -100
    return hidden, weight, labels


def token_logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, 0 where it is -100."""
    index = labels.clamp(min=0)[..., None]
    logps = (hidden @ weight.T).log_softmax(dim=-1).gather(-1, index).squeeze(-1)
    return torch.where(labels != -100, logps, 0.0)


def check(loss: Tensor, oracle: Tensor, leaves: list[Tensor], exact: list[Tensor]) -> None:
    torch.testing.assert_close(loss, oracle, rtol=1e-10, atol=1e-10)
    actual, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(oracle, exact)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def kto_inputs(labels: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "ref_logps": -20 + torch.randn(NUM_ROWS, generator=generator, dtype=torch.float64),
        "is_desirable": torch.arange(NUM_ROWS) % 3 > 0,
        "kl_hidden": torch.randn(NUM_ROWS, T, D, generator=generator, dtype=torch.float64),
        "ref_kl_logps": torch.full((NUM_ROWS,), -70.0, dtype=torch.float64),
        "kl_labels": labels.roll(1, dims=0),
    }


def kto(
    hidden: Tensor, weight: Tensor, labels: Tensor, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """KTO by the example, with weights and the estimate of the KL divergence; and the latter."""
    kl = LOSSES.estimate_kl(given["kl_hidden"], weight, given["kl_labels"], given["ref_kl_logps"])
    loss = LOSSES.kto_loss(
        hidden, weight, labels, given["ref_logps"], given["is_desirable"], kl, 0.3, (1.5, 0.7)
    )
    return loss, kl


def test_kto_equals_its_formula() -> None:
    hidden, weight, labels = make_batch()
    leaves, exact, given = leaves_of(hidden, weight), leaves_of(hidden, weight), kto_inputs(labels)
    loss, kl = kto(*leaves, labels, given)
    kl_logps = token_logps_of(given["kl_hidden"], weight, given["kl_labels"]).sum(dim=1)
    oracle_kl = (kl_logps - given["ref_kl_logps"]).mean()
    assert oracle_kl > 0
    torch.testing.assert_close(kl, oracle_kl)
    assert not kl.requires_grad
    rewards = 0.3 * (token_logps_of(*exact, labels).sum(dim=1) - given["ref_logps"])
    losses = [
        1.5 * (1 - torch.sigmoid(reward - 0.3 * oracle_kl))
        if is_desirable
        else 0.7 * (1 - torch.sigmoid(0.3 * oracle_kl - reward))
        for reward, is_desirable in zip(rewards, given["is_desirable"], strict=True)
    ]
    check(loss, torch.stack(losses).mean(), leaves, exact)


def test_kto_clamps_a_negative_divergence_estimate_to_0() -> None:
    hidden, weight, labels = make_batch()
    ref_logps = torch.zeros(NUM_ROWS, dtype=torch.float64)
    assert LOSSES.estimate_kl(hidden, weight, labels, ref_logps) == 0


def test_simpo_equals_its_formula() -> None:
    hidden, weight, labels = make_batch()
    leaves, exact = leaves_of(hidden, weight), leaves_of(hidden, weight)
    loss = LOSSES.simpo_loss(*leaves, labels, beta=2.5, gamma=0.8)
    counts = (labels != -100).sum(dim=1)
    chosen, rejected = (token_logps_of(*exact, labels).sum(dim=1) / counts).chunk(2)
    check(loss, -F.logsigmoid(2.5 * (chosen - rejected) - 0.8).mean(), leaves, exact)


def orpo_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of whole texts in the chosen rows, and which of all labels belong to answers."""
    whole = labels.clone()
    whole[: NUM_ROWS // 2, :2] = 5
    return whole, labels != -100


def test_orpo_equals_its_formula() -> None:
    hidden, weight, labels = make_batch()
    leaves, exact = leaves_of(hidden, weight), leaves_of(hidden, weight)
    whole, is_answer = orpo_labels(labels)
    loss = LOSSES.orpo_loss(*leaves, whole, is_answer, beta=0.4)
    half = NUM_ROWS // 2
    logits = exact[0] @ exact[1].T
    nll = F.cross_entropy(logits[:half].flatten(0, 1), whole[:half].flatten())
    probs = (token_logps_of(*exact, labels).sum(dim=1) / is_answer.sum(dim=1)).exp()
    odds = probs / (1 - probs)
    ratio = (odds[:half] / odds[half:]).log()
    check(loss, nll - 0.4 * F.logsigmoid(ratio).mean(), leaves, exact)


@pytest.mark.filterwarnings("ignore")  # of the libraries that TRL imports
def test_the_losses_equal_those_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own code gets log-probabilities in place of a trained model's."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl import KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    hidden, weight, labels = make_batch()
    token_logps = token_logps_of(hidden, weight, labels)
    means = token_logps.sum(dim=1) / (labels != -100).sum(dim=1)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda values: values
    )

    trainer = SimpleNamespace(
        alpha=0.0, loss_type="simpo", beta=2.5, simpo_gamma=0.8, label_smoothing=0.0,
        accelerator=accelerator,
    )  # fmt: skip
    losses, *_ = CPOTrainer.cpo_loss(trainer, *means.chunk(2))
    loss = LOSSES.simpo_loss(hidden, weight, labels, beta=2.5, gamma=0.8)
    torch.testing.assert_close(loss, losses.mean())

    trainer.beta = 0.4
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *means.chunk(2))
    whole, is_answer = orpo_labels(labels)
    half = NUM_ROWS // 2
    nll = F.cross_entropy((hidden @ weight.T)[:half].flatten(0, 1), whole[:half].flatten())
    loss = LOSSES.orpo_loss(hidden, weight, whole, is_answer, beta=0.4)
    torch.testing.assert_close(loss, nll - losses.mean(), check_dtype=False)

    given = kto_inputs(labels)
    kl_logps = token_logps_of(given["kl_hidden"], weight, given["kl_labels"]).sum(dim=1)
    outputs = SimpleNamespace(
        log_probs=token_logps, entropy=torch.zeros_like(labels), mean_logits=token_logps
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, calculate_KL=True,
        _compute_kl_logps=lambda model, batch: kl_logps, precompute_ref_logps=True,
        loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7,
        aux_loss_enabled=False, _metrics={"train": defaultdict(list)}, _tp_size=1,
        _total_train_tokens=0,
    )  # fmt: skip
    ids = F.pad(labels.clamp(min=0), (1, 0))
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "label": given["is_desirable"],
        "completion_mask": F.pad((labels != -100).long(), (1, 0)),
        "ref_logps": given["ref_logps"], "ref_KL_logps": given["ref_kl_logps"],
    }  # fmt: skip
    expected = KTOTrainer._compute_loss(trainer, lambda **kwargs: outputs, batch, False)
    loss, kl = kto(hidden, weight, labels, given)
    torch.testing.assert_close(loss, expected)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(kl.item())]


def test_the_example_prints_every_loss(capsys: pytest.CaptureFixture[str]) -> None:
    LOSSES.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["KTO", "SimPO", "ORPO"]
    for line in lines:
        assert re.fullmatch(r"\w+: loss \d+\.\d{4}, gradient \d+\.\d{4}", line)
