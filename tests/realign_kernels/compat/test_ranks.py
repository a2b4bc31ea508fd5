"""Entries in two processes over gloo: a shared vocabulary, and a weight of FSDP2.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from realign_kernels.compat import cce, liger
from realign_kernels.compat import torch as compat_torch

WORLD_SIZE = 2
B, T, V, D = 3, 7, 61, 16
F64 = torch.float64


def make_case():
    """Return the same tensors and targets on every rank."""
    torch.manual_seed(0)
    tensors = [torch.randn(B, T, D), torch.randn(V, D) / 2, torch.randn(V)]
    targets = torch.randint(0, V, (B, T))
    targets.view(-1)[::4] = -100
    return [tensor.to(F64) for tensor in tensors], targets


def score(e, c, bias, targets, **options):
    """Return loss and lse of Cut Cross-Entropy's signature, and the gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in (e, c, bias)]
    loss, lse = cce.linear_cross_entropy(
        *leaves[:2], targets, bias=leaves[2], shift=1, softcap=3.0, return_lse=True, **options
    )
    grads = torch.autograd.grad(loss + lse.square().sum(), leaves)
    return [loss.detach(), lse.detach()], list(grads)


def check_group(rank):
    (e, c, bias), targets = make_case()
    columns = slice(0, 20) if rank == 0 else slice(20, V)
    values, grads = score(e, c[columns], bias[columns], targets, group=dist.group.WORLD)
    whole_values, whole = score(e, c, bias, targets)
    torch.testing.assert_close(values, whole_values)
    torch.testing.assert_close(grads, [whole[0], whole[1][columns], whole[2][columns]])


def check_gathered_weight(rank):
    """Compare the gradient, which is the mean over ranks with different rows."""
    (e, c, _), targets = make_case()
    e, targets = e.flatten(0, 1), targets.flatten()
    own = slice(0, 8) if rank == 0 else slice(8, None)
    factors = torch.linspace(0.5, 1.5, V, dtype=F64)
    entries = {
        cce.linear_cross_entropy: {},
        compat_torch.linear_cross_entropy: {"weight": factors},
    }
    for entry, options in entries.items():
        weight = torch.nn.Parameter(distribute_tensor(c, init_device_mesh("cpu", (2,)), [Shard(0)]))
        entry(e[own], weight, targets[own], reduction="sum", **options).backward()
        whole = c.clone().requires_grad_()
        (entry(e, whole, targets, reduction="sum", **options) / WORLD_SIZE).backward()
        torch.testing.assert_close(weight.grad.full_tensor(), whole.grad)


def check_mean_logits():
    """Check that means equal those of the whole weight, with ranks of equal and unequal parts."""
    (e, c, bias), targets = make_case()
    mesh = init_device_mesh("cpu", (2,))
    for size in (V - 1, V):
        whole = [c[:size], bias[:size]]
        sharded = [torch.nn.Parameter(distribute_tensor(part, mesh, [Shard(0)])) for part in whole]
        labels = targets[:2].clamp(max=size - 1)
        expected, actual = (
            liger.liger_fused_linear_dpo(e[:2], weight, labels, offset, use_ref_model=False)[1]
            for weight, offset in (whole, sharded)
        )
        torch.testing.assert_close(actual, expected)


def main(rank, init_file):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=WORLD_SIZE
    )
    check_group(rank)
    check_gathered_weight(rank)
    check_mean_logits()
    dist.barrier()  # a rank whose partner is gone while it still sends is aborted
    dist.destroy_process_group()


def test_entries_on_two_ranks_equal_one_process(run_two_ranks):
    run_two_ranks(__file__)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
