"""Tensor parallelism: two processes over gloo against the whole vocabulary in one.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from realign_kernels import linear_logprob, linear_logprob_stats, rdpo_loss
from realign_kernels.backends import dispatch
from realign_kernels.testing import make_head_inputs
from tests.realign_kernels.backends.triton.interpreter import quicken

WORLD_SIZE = 2
V = 37
# Uneven on purpose; the second shard of "lone" is one token wide.
SPLITS = {"uneven": 20, "lone": 36}
OPTIONS = {"logit_softcap": 4.0, "temperature": 0.9}


def make_case():
    inputs = make_head_inputs(24, V, 5, bias=True, rank=2, ignored=0.2, **OPTIONS)
    inputs.options["lm_head_bias"][30] = -torch.inf
    inputs.labels[inputs.labels == 30] = 31
    # The label in either shard, at the edges, and a tie across shards.
    inputs.labels[:6] = torch.tensor([0, 19, 20, 35, 36, 7])
    inputs.lm_head_weight[25] = inputs.lm_head_weight[2]
    inputs.options["lm_head_bias"][25] = inputs.options["lm_head_bias"][2] = 9.0
    inputs.options["lm_head_lora"][1][25] = inputs.options["lm_head_lora"][1][2]
    return inputs


def shard(inputs, columns):
    """Return the call that one rank makes."""
    hidden_states, weight, bias, lora_a, lora_b = inputs.tensors
    return inputs.replace_tensors(
        [hidden_states, weight[columns], bias[columns], lora_a, lora_b[columns]]
    )


def stats_and_gradients(inputs, group=None):
    leaves = inputs.as_leaves()
    stats = leaves.call(linear_logprob_stats, group=group, workspace_bytes=3000)
    weights = torch.linspace(-1, 1, 24, dtype=torch.float64)
    total = weights @ stats.token_logps + weights.flip(0) @ stats.top_non_label_logps
    (total + weights @ stats.entropy + 0.3 * stats.lse.sum()).backward()
    return [part.detach() for part in stats], [tensor.grad for tensor in leaves.tensors]


def loss_and_gradients(inputs, group=None):
    leaves = inputs.as_leaves()
    output = rdpo_loss(
        *leaves.tensors[:2],
        leaves.labels,
        torch.zeros(3, 2, dtype=torch.float64),
        sequence_ids=torch.arange(24) % 6,
        rejected_scoring="top_non_label",
        group=group,
        **leaves.options,
    )
    output.loss.backward()
    return [output.loss.detach()], [tensor.grad for tensor in leaves.tensors]


def check_rank(rank, group, splits):
    inputs = make_case()
    for split in splits:
        columns = slice(0, split) if rank == 0 else slice(split, V)
        for compute in (stats_and_gradients, loss_and_gradients):
            values, grads = compute(shard(inputs, columns), group)
            expected_values, whole = compute(inputs)
            torch.testing.assert_close(values, expected_values)
            expected = [whole[0], whole[1][columns], whole[2][columns], whole[3], whole[4][columns]]
            torch.testing.assert_close(grads, expected)


def check_edges(rank, group):
    columns = slice(0, 20) if rank == 0 else slice(20, V)
    nothing = make_case()
    nothing.labels[:] = -100
    values, grads = stats_and_gradients(shard(nothing, columns), group)
    assert not values[0].any()
    assert not any(grad.any() for grad in grads)
    wrong = make_case()
    wrong.labels[4] = V
    with pytest.raises(ValueError, match=r"got 37 at index \(4,\) with V = 37"):
        shard(wrong, columns).call(linear_logprob_stats, group=group)


def check_data_parallel(rank):
    """A DTensor is gathered; its gradient is the mean over ranks, each of which has other rows."""
    inputs = make_case()
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    weight = torch.nn.Parameter(distribute_tensor(inputs.lm_head_weight, mesh, [Shard(0)]))
    hidden_states = inputs.hidden_states.clone().requires_grad_()
    own = slice(0, 10) if rank == 0 else slice(10, 24)
    linear_logprob(
        hidden_states[own], weight, inputs.labels[own], **inputs.options
    ).sum().backward()
    whole = inputs.as_leaves()
    (whole.call(linear_logprob).sum() / WORLD_SIZE).backward()
    torch.testing.assert_close(weight.grad.full_tensor(), whole.lm_head_weight.grad)
    torch.testing.assert_close(hidden_states.grad[own], whole.hidden_states.grad[own] * WORLD_SIZE)


def main(rank, init_file, backend):
    torch.set_num_threads(1)
    if backend == "triton":
        quicken(pytest.MonkeyPatch())
    dispatch.auto_backend = lambda device_type: backend
    dist.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=WORLD_SIZE
    )
    # The interpreter is slow, and the kernels have no part in what ranks share.
    check_rank(rank, dist.group.WORLD, list(SPLITS.values())[: 1 if backend == "triton" else 2])
    if backend != "triton":
        check_edges(rank, dist.group.WORLD)
        check_data_parallel(rank)
    dist.barrier()  # a rank whose partner is gone while it still sends is aborted
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "backend",
    ["cpu", *(pytest.param(name, marks=pytest.mark.full) for name in ("eager", "triton"))],
)
def test_two_tensor_parallel_ranks_equal_one_process(run_two_ranks, backend):
    # Triton's interpreter computes with infinities by NumPy, which warns.
    warnings = "ignore" if backend == "triton" else "error"
    run_two_ranks(__file__, backend, warnings=warnings)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
