"""rdpo_loss from hidden states: forms of a batch, absent cells, ways to score rejected cells."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from realign_kernels import Objective, Term, linear_logprob, preference_loss, rdpo_loss
from realign_kernels.testing import dense_log_probs, make_head_inputs, seeded

pytestmark = pytest.mark.usefixtures("each_backend")

LN2 = math.log(2)
V, D = 19, 4


def make_batch(num_cells=3, num_pairs=2, length=5, dtype=torch.float64, **options):
    """Return a padded call with answers of different lengths, and reference sums."""
    num_sequences = num_cells * num_pairs
    inputs = make_head_inputs(num_sequences * length, V, D, dtype, **options)
    labels = inputs.labels.view(num_sequences, length)
    labels[:, 0] = -100
    for sequence in range(num_sequences):
        labels[sequence, 2 + sequence % 4 :] = -100
    hidden_states = inputs.hidden_states.view(num_sequences, length, D)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ref_logps = -10 * torch.rand(num_cells, num_pairs, generator=seeded(3))
    return hidden_states, inputs.lm_head_weight, labels, ref_logps.to(wide)


def pack(hidden_states, weight, labels, order=None):
    """Return the answer tokens alone, in any order, with the sequence of each."""
    sequence_ids = torch.arange(len(labels))[:, None].expand_as(labels)[labels != -100]
    tokens = hidden_states[labels != -100], labels[labels != -100], sequence_ids
    order = torch.arange(len(sequence_ids)) if order is None else order
    hidden_states, labels, sequence_ids = (part[order] for part in tokens)
    return (hidden_states, weight, labels), sequence_ids


def lengths(labels, num_cells=3):
    return (labels != -100).sum(1).view(num_cells, -1).cpu()


def loss_and_gradients(*tensors, **options):
    hidden_states, weight, labels, ref_logps = tensors
    hidden_states, weight = hidden_states.clone(), weight.clone()
    hidden_states.requires_grad_()
    weight.requires_grad_()
    output = rdpo_loss(hidden_states, weight, labels, ref_logps, **options)
    output.loss.backward()
    return output, hidden_states.grad, weight.grad


def test_rdpo_loss_equals_the_objective_of_sequence_sums():
    hidden_states, weight, labels, ref_logps = make_batch()
    output, _, _ = loss_and_gradients(hidden_states, weight, labels, ref_logps)
    logps = linear_logprob(hidden_states, weight, labels).sum(1).view(3, 2)
    torch.testing.assert_close(output.logps, logps)
    assert torch.equal(output.num_tokens, lengths(labels))
    expected = preference_loss(logps, ref_logps, Objective.rdpo())
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output[3:], expected[2:])


def test_rdpo_loss_equals_the_formula_of_the_paper():
    hidden_states, weight, labels, ref_logps = make_batch()
    log_probs = (hidden_states @ weight.T).log_softmax(-1)
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    rho = picked.sum(1).view(3, 2) - ref_logps
    expected = -F.logsigmoid(0.2 * (rho[0] - rho[1])) - 0.5 * F.logsigmoid(0.3 * (rho[0] - rho[2]))
    actual = rdpo_loss(
        hidden_states, weight, labels, ref_logps, beta=0.2, image_beta=0.3, image_weight=0.5
    )
    torch.testing.assert_close(actual.loss, expected.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_zero_is_two_log_two_and_margins_are_zero(dtype):
    hidden_states, weight, labels, _ = make_batch(dtype=dtype)
    logps = rdpo_loss(hidden_states, weight, labels, None).logps
    output = rdpo_loss(hidden_states, weight, labels, logps)
    assert abs(output.loss.item() - 2 * LN2) <= 1e-6
    assert not output.text_margins.any()
    assert not output.image_margins.any()
    assert not output.rewards.any()


def test_gradcheck():
    hidden_states, weight, labels, ref_logps = make_batch(num_pairs=1, length=4)
    hidden_states.requires_grad_()
    weight.requires_grad_()

    def outputs(hidden_states, weight):
        output = rdpo_loss(hidden_states, weight, labels, ref_logps)
        return output.loss, output.logps

    assert torch.autograd.gradcheck(outputs, (hidden_states, weight))


@pytest.mark.parametrize("rejected_scoring", ["label", "top_non_label"])
@pytest.mark.parametrize("seed", range(4))
def test_packed_equals_padded_in_any_order(seed, rejected_scoring):
    hidden_states, weight, labels, ref_logps = make_batch()
    num_tokens = int((labels != -100).sum())
    order = torch.randperm(num_tokens, generator=seeded(seed))
    packed, sequence_ids = pack(hidden_states, weight, labels, order)
    options = {"rejected_scoring": rejected_scoring}
    padded_output, padded_grad, padded_weight_grad = loss_and_gradients(
        hidden_states, weight, labels, ref_logps, **options
    )
    output, grad, weight_grad = loss_and_gradients(
        *packed, ref_logps, sequence_ids=sequence_ids, **options
    )
    torch.testing.assert_close(output, padded_output)
    torch.testing.assert_close(grad, padded_grad[labels != -100][order])
    torch.testing.assert_close(weight_grad, padded_weight_grad)


def test_sums_do_not_depend_on_the_order_of_tokens():
    """Sums in float64 round once: shuffled float32 tokens give the same bits."""
    hidden_states, weight, labels, ref_logps = make_batch(length=300, dtype=torch.float32)
    labels[:, 1:] = torch.randint(0, V, (6, 299), generator=seeded(5))
    packed, sequence_ids = pack(hidden_states, weight, labels)
    token_logps = linear_logprob(*packed)
    expected = [token_logps[sequence_ids == sequence].double().sum() for sequence in range(6)]
    for order in (torch.arange(6 * 299), torch.randperm(6 * 299)):
        shuffled, ids = pack(hidden_states, weight, labels, order)
        logps = rdpo_loss(*shuffled, ref_logps, sequence_ids=ids).logps.flatten()
        torch.testing.assert_close(logps.double(), torch.stack(expected), rtol=6e-8, atol=0)


@pytest.mark.parametrize("any_id", [-7, 0, 2, 5, 6, 2**40])
def test_ignored_tokens_of_a_packed_batch_may_have_any_sequence_id(any_id):
    hidden_states, weight, labels, ref_logps = make_batch()
    expected = rdpo_loss(hidden_states, weight, labels, ref_logps)
    sequence_ids = torch.arange(6)[:, None].expand_as(labels).clone()
    sequence_ids[labels == -100] = any_id
    actual = rdpo_loss(
        hidden_states.flatten(0, 1),
        weight,
        labels.flatten(),
        ref_logps,
        sequence_ids=sequence_ids.flatten(),
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("is_packed", [False, True])
def test_sequence_lengths_change_nothing(is_packed):
    hidden_states, weight, labels, ref_logps = make_batch()
    options = {}
    tensors = (hidden_states, weight, labels)
    if is_packed:
        tensors, options["sequence_ids"] = pack(*tensors)
    plain = rdpo_loss(*tensors, ref_logps, **options)
    given = rdpo_loss(*tensors, ref_logps, sequence_lengths=lengths(labels), **options)
    assert all(map(torch.equal, plain, given))


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_missing_reference_equals_a_reference_of_zero(is_packed):
    hidden_states, weight, labels, _ = make_batch()
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    expected = rdpo_loss(hidden_states, weight, labels, zeros)
    tensors, options = (hidden_states, weight, labels), {}
    if is_packed:
        tensors, options["sequence_ids"] = pack(*tensors)
        options["sequence_lengths"] = lengths(labels)
    torch.testing.assert_close(rdpo_loss(*tensors, None, **options), expected)


def test_absent_cells_contribute_nothing():
    hidden_states, weight, labels, ref_logps = make_batch()
    labels[2 * 2 + 1] = -100  # image_rejected of pair 1, as for a record without images
    output, grad, _ = loss_and_gradients(hidden_states, weight, labels, ref_logps)
    assert output.num_tokens[2].tolist() == [1, 0]
    assert output.logps[2, 1] == output.rewards[2, 1] == output.image_margins[1] == 0
    rho = output.logps.detach() - ref_logps
    text = -F.logsigmoid(0.1 * (rho[0] - rho[1]))
    image = -F.logsigmoid(0.1 * (rho[0, 0] - rho[2, 0]))
    torch.testing.assert_close(output.loss.detach(), (text.sum() + image) / 2)
    assert not grad[5].any()


@pytest.mark.parametrize("lengths_given", [False, True])
def test_an_absent_chosen_answer_is_refused(lengths_given):
    hidden_states, weight, labels, ref_logps = make_batch()
    labels[1] = -100
    options = {"sequence_lengths": lengths(labels)} if lengths_given else {}
    with pytest.raises(ValueError, match=r"cell 0 \(chosen\) of every pair, got 0 in pairs \[1\]"):
        rdpo_loss(hidden_states, weight, labels, ref_logps, **options)


def test_a_batch_without_pairs_gives_zero_loss():
    weight = torch.randn(V, D, requires_grad=True)
    hidden_states = torch.zeros(0, 5, D, requires_grad=True)
    labels = torch.zeros(0, 5, dtype=torch.int64)
    output = rdpo_loss(hidden_states, weight, labels, torch.zeros(3, 0))
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(V, D))


def test_top_non_label_scoring_equals_values_by_hand():
    """The hidden states are the logits of three tokens, and the best non-label is scored."""
    logits = [[5.0, 1.0, 0.0], [5.0, 1.0, 0.0], [2.0, 2.0, 2.0]]
    hidden_states = torch.tensor(logits)[:, None]
    labels = torch.tensor([[0], [0], [0]])
    output = rdpo_loss(hidden_states, torch.eye(3), labels, None, rejected_scoring="top_non_label")
    log_sum = math.log(math.exp(5) + math.e + 1)
    # Cell 0 scores the label; cell 1 the runner-up, token 1; cell 2 a tie, token 1.
    expected = [5 - log_sum, 1 - log_sum, -math.log(3)]
    assert output.logps[:, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_top_non_label_gradient_goes_to_the_lowest_of_equals():
    hidden_states = torch.tensor([[[0.0, 0.0, 3.0]], [[1.0, 2.0, 2.0]]], requires_grad=True)
    labels = torch.tensor([[2], [0]])
    output = rdpo_loss(
        hidden_states,
        torch.eye(3),
        labels,
        None,
        objective=Objective.dpo(),
        rejected_scoring="top_non_label",
    )
    output.logps[1].backward(torch.ones(1))
    probs = hidden_states.detach()[1, 0].softmax(0)
    torch.testing.assert_close(hidden_states.grad[1, 0], torch.tensor([0.0, 1.0, 0.0]) - probs)


def test_top_non_label_scoring_equals_the_dense_definition():
    hidden_states, weight, labels, ref_logps = make_batch()
    inputs = make_head_inputs(1, V, D)
    hidden_states.requires_grad_()
    weight.requires_grad_()
    output = rdpo_loss(hidden_states, weight, labels, ref_logps, rejected_scoring="top_non_label")
    actual = torch.autograd.grad(output.loss, (hidden_states, weight))

    log_probs = dense_log_probs(inputs.replace_tensors([hidden_states, weight]))
    index = labels.clamp(min=0)[..., None]
    tops = log_probs.scatter(-1, index, -torch.inf).amax(-1)
    is_chosen = (torch.arange(6) < 2)[:, None]
    scores = torch.where(is_chosen, log_probs.gather(-1, index)[..., 0], tops)
    logps = torch.where(labels != -100, scores, 0.0).sum(1).view(3, 2)
    expected = preference_loss(logps, ref_logps, Objective.rdpo())
    torch.testing.assert_close(output.loss, expected.loss)
    grads = torch.autograd.grad(expected.loss, (hidden_states, weight))
    torch.testing.assert_close(actual, grads)


@pytest.mark.parametrize(
    ("objective", "num_cells"),
    [
        (Objective.dpo(0.3), 2),
        (Objective.rdpo(0.3, 0.2, 0.5), 3),
        (Objective.mdpo(0.3), 3),
        (Objective.symmetric(0.3), 4),
        (Objective((Term((1, -1), link="ipo"),), nll_weight=0.2), 2),
    ],
)
def test_any_objective_equals_the_loss_of_its_sums(objective, num_cells):
    hidden_states, weight, labels, ref_logps = make_batch(num_cells)
    output, _, _ = loss_and_gradients(hidden_states, weight, labels, ref_logps, objective=objective)
    expected = preference_loss(
        output.logps, ref_logps, objective, num_tokens=lengths(labels, num_cells)
    )
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.rewards, objective.beta * (output.logps - ref_logps).detach())


def test_head_options_reach_the_head():
    hidden_states, weight, labels, ref_logps = make_batch()
    generator = seeded(0)
    bias, lora_a, lora_b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((V,), (2, D), (V, 2))
    )
    head = {
        "lm_head_bias": bias,
        "lm_head_lora": (lora_a, lora_b, 0.5),
        "logit_scale": 1.2,
        "logit_softcap": 4.0,
        "temperature": 0.8,
        "ignore_index": -1,
        "workspace_bytes": 4000,
    }
    labels[labels == -100] = -1
    actual = rdpo_loss(hidden_states, weight, labels, ref_logps, memory="tile", **head)
    expected = linear_logprob(hidden_states, weight, labels, **head).sum(1).view(3, 2)
    torch.testing.assert_close(actual.logps, expected)


def test_only_loss_and_logps_are_differentiable():
    hidden_states, weight, labels, ref_logps = make_batch()
    ref_logps.requires_grad_()
    output, _, _ = loss_and_gradients(hidden_states, weight, labels, ref_logps)
    assert [part.requires_grad for part in output] == [True, True, False, False, False, False]
    assert output.num_tokens.dtype == torch.int64
    assert ref_logps.grad is None


def test_two_runs_are_equal():
    batch = make_batch(dtype=torch.float32)
    packed, sequence_ids = pack(*batch[:3])
    first, second = (
        loss_and_gradients(*packed, batch[3], sequence_ids=sequence_ids) for _ in range(2)
    )
    assert all(map(torch.equal, first[0], second[0]))
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_autocast_rounds_the_weight():
    hidden_states, weight, labels, ref_logps = make_batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rdpo_loss(hidden_states.bfloat16(), weight, labels, ref_logps)
    expected = rdpo_loss(
        hidden_states.bfloat16().float(), weight.bfloat16().float(), labels, ref_logps
    )
    assert actual.loss.dtype == torch.float32
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("link", ["logsigmoid", "hinge", "ipo"])
def test_a_reference_of_nan_has_the_gradient_of_autograd(link):
    hidden_states, weight, labels, ref_logps = make_batch()
    ref_logps[1, 0] = torch.nan
    objective = Objective((Term((1, -1), link=link), Term((1, 0, -1), link=link)))
    output, actual, _ = loss_and_gradients(
        hidden_states, weight, labels, ref_logps, objective=objective
    )
    assert output.loss.isnan()
    states = hidden_states.clone().requires_grad_()
    logps = linear_logprob(states, weight, labels).sum(1).view(3, 2)
    num_tokens = lengths(labels).to(logps.device)
    preference_loss(logps, ref_logps, objective, num_tokens=num_tokens).loss.backward()
    torch.testing.assert_close(actual, states.grad, equal_nan=True)
