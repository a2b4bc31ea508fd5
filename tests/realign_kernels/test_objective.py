"""preference_loss against the paper's numbers, closed forms and hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from realign_kernels import Objective, Term, preference_loss
from realign_kernels.objective import differentiate_losses
from realign_kernels.testing import seeded

LN2 = math.log(2)


def logps(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


# eq. (1) of the paper: one pair, three cells.
PAPER_LOGPS = [[-10.0], [-12.0], [-11.0]]
PAPER_REF = [[-10.5], [-11.0], [-10.8]]


def test_the_loss_equals_the_numbers_of_the_paper():
    policy = logps(*PAPER_LOGPS).requires_grad_()
    output = preference_loss(policy, logps(*PAPER_REF), Objective.rdpo())
    output.loss.backward()
    assert output.loss.item() == pytest.approx(1.2797166033382292, abs=1e-15)
    expected = [-0.0945077297, 0.0462570155, 0.0482507142]
    assert policy.grad[:, 0].tolist() == pytest.approx(expected, abs=1e-10)
    assert output.rewards[:, 0].tolist() == pytest.approx([0.05, -0.1, -0.02])
    assert output.text_margins.item() == pytest.approx(0.15)
    assert output.image_margins.item() == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [(Objective.dpo(), 0.6209570477895321), (Objective.rdpo(image_weight=0.0), 0.6209570477895321)],
)
def test_text_only_objectives_equal_their_closed_form(objective, expected):
    output = preference_loss(logps(*PAPER_LOGPS), logps(*PAPER_REF), objective)
    assert output.loss.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("objective", "num_terms"),
    [
        (Objective.dpo(), 1),
        (Objective.rdpo(), 2),
        (Objective.mdpo(), 3),
        (Objective.symmetric(), 4),
    ],
)
def test_an_untrained_policy_has_a_loss_of_log_two_per_term(objective, num_terms):
    policy = -100 * torch.rand(4, 5, generator=seeded(0))
    output = preference_loss(policy, policy.clone(), objective)
    torch.testing.assert_close(output.losses, torch.full((5,), num_terms * LN2), rtol=0, atol=1e-6)
    for part in (output.rewards, output.text_margins, output.image_margins):
        assert not part.any()


def random_ratios(num_cells=4, num_pairs=3):
    generator = seeded(1)
    shape = (2, num_cells, num_pairs)
    policy, ref = -30 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return policy, ref, policy - ref


def test_mdpo_equals_rdpo_plus_an_anchor():
    policy, ref, rho = random_ratios(3)
    objective = Objective.mdpo(0.2, 0.3, 0.5, anchor_weight=0.7, anchor_offset=0.1)
    expected = (
        -F.logsigmoid(0.2 * (rho[0] - rho[1]))
        - 0.5 * F.logsigmoid(0.3 * (rho[0] - rho[2]))
        - 0.7 * F.logsigmoid(0.2 * rho[0] - 0.1)
    )
    torch.testing.assert_close(preference_loss(policy, ref, objective).losses, expected)


def test_the_symmetric_objective_compares_all_four_cells():
    policy, ref, rho = random_ratios()
    expected = (
        -F.logsigmoid(0.2 * (rho[0] - rho[1]))
        - F.logsigmoid(0.2 * (rho[3] - rho[2]))
        - 0.5 * F.logsigmoid(0.3 * (rho[0] - rho[2]))
        - 0.5 * F.logsigmoid(0.3 * (rho[3] - rho[1]))
    )
    output = preference_loss(policy, ref, Objective.symmetric(0.2, 0.3, 0.5))
    torch.testing.assert_close(output.losses, expected)
    torch.testing.assert_close(output.loss, expected.mean())
    torch.testing.assert_close(output.rewards, 0.2 * rho)
    torch.testing.assert_close(output.image_margins, 0.3 * (rho[0] - rho[2]))


def test_each_link_equals_its_formula():
    policy, ref, rho = random_ratios(2)
    num_tokens = torch.tensor([[3, 5, 2], [4, 1, 7]])
    margin = rho[0] - rho[1]
    per_token = rho / num_tokens
    expected = {
        "logsigmoid": -0.9 * F.logsigmoid(0.2 * margin - 0.5)
        - 0.1 * F.logsigmoid(0.5 - 0.2 * margin),
        "hinge": (1 - 0.2 * margin).clamp(min=0),
        "ipo": (per_token[0] - per_token[1] - 1 / 0.4) ** 2,
    }
    extras = {"logsigmoid": {"offset": 0.5, "label_smoothing": 0.1}}
    for link, losses in expected.items():
        term = Term((1, -1), beta=0.2, link=link, **extras.get(link, {}))
        output = preference_loss(policy, ref, Objective((term,)), num_tokens=num_tokens)
        torch.testing.assert_close(output.losses, losses)


def test_nll_is_the_mean_over_the_chosen_answer():
    policy, ref, _ = random_ratios(2)
    num_tokens = torch.tensor([[3, 5, 2], [4, 1, 7]])
    plain = preference_loss(policy, ref, Objective.dpo(), num_tokens=num_tokens)
    objective = Objective(Objective.dpo().terms, nll_weight=0.4)
    actual = preference_loss(policy, ref, objective, num_tokens=num_tokens)
    torch.testing.assert_close(actual.losses, plain.losses - 0.4 * policy[0] / num_tokens[0])


@pytest.mark.parametrize("margin", [0.0, 30.0, -30.0, 80.0, -80.0, 1e4, -1e4])
def test_saturated_margins_keep_value_and_gradient(margin):
    """Values and gradients of float32 follow float64 down to where float32 ends."""
    policy = torch.tensor([[10 * margin], [0.0]], requires_grad=True)
    loss = preference_loss(policy, None, Objective.dpo()).loss
    loss.backward()
    x = torch.tensor(0.1 * 10 * margin, dtype=torch.float64)
    assert loss.item() == pytest.approx(-F.logsigmoid(x).item(), rel=1e-6, abs=1e-37)
    expected = -0.1 * torch.sigmoid(-x).item()
    assert policy.grad[0].item() == pytest.approx(expected, rel=1e-6, abs=1e-37)


def test_infinite_margins_are_not_nan():
    policy = logps([0.0, -math.inf], [-math.inf, 0.0])
    losses = preference_loss(policy, None, Objective.dpo()).losses
    assert losses.tolist() == [0.0, math.inf]


def test_an_absent_cell_drops_the_terms_that_read_it():
    policy, ref, rho = random_ratios(3)
    policy[2, 1] = 0.0
    ref[2, 1] = math.nan  # whatever a cache holds for a cell that does not exist
    policy.requires_grad_()
    num_tokens = torch.tensor([[3, 5, 2], [4, 1, 7], [3, 0, 2]])
    output = preference_loss(policy, ref, Objective.mdpo(), num_tokens=num_tokens)
    output.loss.backward()
    text = -F.logsigmoid(0.1 * (rho[0] - rho[1]))
    image = -F.logsigmoid(0.1 * (rho[0] - rho[2])) * torch.tensor([1.0, 0.0, 1.0])
    losses = text + image - F.logsigmoid(0.1 * rho[0])
    torch.testing.assert_close(output.losses, losses)
    torch.testing.assert_close(output.loss, losses.sum() / 3)
    assert output.rewards[2, 1] == output.image_margins[1] == policy.grad[2, 1] == 0
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("link", ["logsigmoid", "hinge", "ipo"])
def test_a_cell_absent_from_every_pair_gives_zero_for_every_link(link):
    objective = Objective((Term((1, -1), link=link),), nll_weight=1.0)
    policy = torch.zeros(2, 3, requires_grad=True)
    num_tokens = torch.tensor([[1, 1, 1], [0, 0, 0]])
    output = preference_loss(policy, None, objective, num_tokens=num_tokens)
    assert output.losses.tolist() == [0.0, 0.0, 0.0]
    assert output.text_margins.tolist() == [0.0, 0.0, 0.0]


def test_a_batch_without_pairs_gives_zero_loss():
    policy = torch.zeros(3, 0, requires_grad=True)
    output = preference_loss(policy, torch.zeros(3, 0), Objective.rdpo())
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.losses.shape == output.image_margins.shape == (0,)


def test_a_missing_reference_equals_a_reference_of_zero():
    policy, _, _ = random_ratios(3)
    zero = preference_loss(policy, torch.zeros_like(policy), Objective.rdpo())
    torch.testing.assert_close(preference_loss(policy, None, Objective.rdpo()), zero)


def test_metrics_are_detached_and_the_reference_is_constant():
    policy, ref, _ = random_ratios(3)
    policy.requires_grad_()
    ref.requires_grad_()
    output = preference_loss(policy, ref, Objective.rdpo())
    output.loss.backward()
    assert [part.requires_grad for part in output] == [True, True, False, False, False]
    assert ref.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_dtype_is_that_of_logps(dtype):
    policy, ref, _ = random_ratios(3)
    output = preference_loss(policy.to(dtype), ref, Objective.rdpo())
    assert all(part.dtype == dtype for part in output)


def test_two_cells_have_no_image_margins():
    policy, ref, _ = random_ratios(2)
    assert preference_loss(policy, ref, Objective.dpo()).image_margins.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("objective", "num_cells"),
    [
        (Objective.dpo(), 2),
        (Objective.rdpo(), 3),
        (Objective.mdpo(), 3),
        (Objective.symmetric(), 4),
        (Objective((Term((1,)),)), 2),
    ],
)
def test_objectives_report_the_number_of_cells_they_need(objective, num_cells):
    assert objective.num_cells == num_cells


def test_metrics_use_the_beta_of_their_term():
    assert (Objective.rdpo(0.2).beta, Objective.rdpo(0.2).image_beta) == (0.2, 0.2)
    assert (Objective.rdpo(0.2, 0.3).beta, Objective.rdpo(0.2, 0.3).image_beta) == (0.2, 0.3)
    reordered = Objective(Objective.rdpo(0.2, 0.3).terms[::-1])
    assert (reordered.beta, reordered.image_beta) == (0.2, 0.3)
    anchor = Objective((Term((1,), beta=0.5),))
    assert (anchor.beta, anchor.image_beta) == (0.5, 0.5)


def test_gradcheck():
    policy, ref, _ = random_ratios()
    policy.requires_grad_()
    num_tokens = torch.tensor([[3, 5, 2], [4, 1, 7], [3, 0, 2], [4, 1, 0]])
    terms = (
        Term((1, -1), label_smoothing=0.1, offset=0.2),
        Term((1, 0, -1), weight=0.5, link="hinge"),
        Term((0, -1, 0, 1), link="ipo"),
    )
    objective = Objective(terms, nll_weight=0.3)
    assert torch.autograd.gradcheck(
        lambda policy: preference_loss(policy, ref, objective, num_tokens=num_tokens).losses,
        policy,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficients": ()}, "coefficients must be 1 to 4 finite numbers"),
        ({"coefficients": (0, 0)}, r"that are not all 0, got \(0, 0\)"),
        ({"coefficients": (1, 2, 3, 4, 5)}, "coefficients must be 1 to 4 finite numbers"),
        ({"coefficients": (math.nan,)}, "coefficients must be 1 to 4 finite numbers"),
        ({"weight": -1.0}, "weight must be finite and >= 0, got -1.0"),
        ({"beta": 0.0}, "beta must be finite and > 0, got 0.0"),
        ({"offset": math.inf}, "offset must be finite, got inf"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"link": "sigmoid"}, r"link must be one of \['hinge', 'ipo', 'logsigmoid'\], got 'sigm"),
        ({"link": "ipo", "offset": 1.0}, "offset must be 0 for link 'ipo', got 1.0"),
        ({"link": "hinge", "label_smoothing": 0.1}, "label_smoothing must be 0 for link 'hinge'"),
    ],
)
def test_terms_refuse_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Term(**{"coefficients": (1, -1), **arguments})


def test_objectives_refuse_invalid_arguments():
    with pytest.raises(ValueError, match="terms must hold at least one Term, got none"):
        Objective(())
    with pytest.raises(TypeError, match="terms must be Term objects, got tuple"):
        Objective(((1, -1),))
    with pytest.raises(ValueError, match="nll_weight must be finite and >= 0, got -1"):
        Objective(Objective.dpo().terms, nll_weight=-1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"logps": torch.zeros(6)},
            ValueError,
            r"logps must have shape \(C, P\) with C in \[3, 4\]",
        ),
        ({"logps": torch.zeros(2, 1)}, ValueError, r"to match objective, got \(2, 1\)"),
        ({"logps": torch.zeros(5, 1)}, ValueError, r"to match objective, got \(5, 1\)"),
        ({"logps": torch.zeros(3, 1).half()}, TypeError, "logps must be torch.float32 or torch.f"),
        ({"ref_logps": torch.zeros(3, 2)}, ValueError, r"ref_logps must have shape \(3, 1\)"),
        ({"ref_logps": torch.zeros(3, 1).bfloat16()}, TypeError, "ref_logps must be torch.float32"),
        ({"ref_logps": torch.zeros(3, 1, device="meta")}, ValueError, "ref_logps must be on cpu"),
        ({"num_tokens": torch.ones(3, 1, device="meta")}, ValueError, "num_tokens must be on cpu"),
        ({"num_tokens": torch.ones(3)}, ValueError, r"num_tokens must have shape \(3, 1\)"),
        (
            {"num_tokens": torch.zeros(3, 1)},
            ValueError,
            r"num_tokens must be > 0 in cell 0 .* \[0\]",
        ),
        (
            {"objective": Objective((Term((1,), link="ipo"),))},
            ValueError,
            "num_tokens must be given",
        ),
        ({"objective": Objective.dpo(), "nll": 1.0}, ValueError, "num_tokens must be given"),
    ],
)
def test_preference_loss_refuses_invalid_arguments(arguments, error, message):
    arguments = {"logps": torch.zeros(3, 1), "ref_logps": None, **arguments}
    objective = arguments.pop("objective", Objective.rdpo())
    objective = Objective(objective.terms, nll_weight=arguments.pop("nll", 0.0))
    with pytest.raises(error, match=message):
        preference_loss(objective=objective, **arguments)


@pytest.mark.parametrize(
    "objective",
    [
        Objective.rdpo(0.2, 0.3, 0.7),
        Objective.symmetric(0.3, 0.1, 2.0),
        Objective((Term((1, -1), label_smoothing=0.1), Term((1, 0, -1), offset=-0.3))),
        Objective((Term((1, -1), beta=0.7, link="hinge"), Term((0.5, 0, 0, -2), weight=3.1))),
        Objective((Term((1, -1), link="ipo"), Term((1, 0, -1), link="ipo")), nll_weight=0.4),
    ],
    ids=["rdpo", "symmetric", "smoothed", "hinge", "ipo"],
)
def test_the_kernel_derivative_equals_that_of_autograd(objective):
    generator = seeded(0)
    policy = torch.randn(objective.num_cells, 7, generator=generator, dtype=torch.float64)
    policy.requires_grad_()
    num_tokens = torch.randint(4, policy.shape, generator=generator)
    num_tokens[0] = 3
    loss = preference_loss(policy, None, objective, num_tokens=num_tokens).loss
    (expected,) = torch.autograd.grad(loss, policy)
    log_ratios = torch.where(num_tokens > 0, policy.detach(), 0.0)
    actual = differentiate_losses(log_ratios, objective, num_tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)
