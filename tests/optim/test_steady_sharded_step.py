"""A steady step on a mesh copies nothing to the device and waits for nothing.

The device is torch's ``meta``: it runs every call without values, refuses to read one, and a copy
from the host to it is a call that can be counted.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from sinkgd.contrib.tempered import SumGroups, _temper_shard
from sinkgd.deflation import LowRank
from sinkgd.distributed import scales
from sinkgd.distributed.all_reduce import all_ranks_agree
from sinkgd.distributed.scales import solve_sharded
from sinkgd.distributed.shards import ParamMatrix, Sharding
from sinkgd.exchange import computation, run
from sinkgd.kernels import Matrices, Scales
from sinkgd.kernels.backend import take_steps
from sinkgd.kernels.eager import EagerBackend
from sinkgd.optim.transforms.deflate import _deflate_stacks
from sinkgd.optim.transforms.half_step import starts_after_half_step
from sinkgd.optim.transforms.low_rank_momentum import remembered
from sinkgd.optim.transforms.operator_norm import pin
from sinkgd.optim.transforms.tiny_rows import mask_tiny_rows

ROWS = Sharding(16, 6, (), ("shard",), ())  # a rank holds 8 rows
COLS = Sharding(8, 12, ("tp",), (), ())
BOTH = Sharding(16, 12, ("tp",), ("shard",), ("experts",))
SHARDINGS = [ROWS, COLS, BOTH, ROWS, BOTH]
BACKEND = EagerBackend()


class Traffic(TorchDispatchMode):
    """Counts copies from the host to the device, and all calls."""

    def __init__(self):
        super().__init__()
        self.copies, self.calls = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        given = [x for x in [*args, *(kwargs or {}).values()] if isinstance(x, torch.Tensor)]
        found = func(*args, **(kwargs or {}))
        copies = func in {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
        if copies and found.is_meta and any(not x.is_meta for x in given):
            self.copies[str(func)] += 1
        return found


def matrices():
    """As many gradients and parameters as there are shardings."""
    grads = [torch.empty(8, 6, dtype=torch.bfloat16, device="meta") for _ in SHARDINGS]
    return Matrices([torch.empty_like(x) for x in grads], grads, [range(2), range(2, 5)])


def sharded_matrices():
    own = matrices()
    return [
        ParamMatrix(w, g, 0, at) for w, g, at in zip(own.params, own.grads, SHARDINGS, strict=True)
    ]


def ones(shape):
    return torch.ones(shape, device="meta")


def found_scales():
    return [Scales(ones((8, 1)), ones((1, 6))) for _ in SHARDINGS]


@computation
def plain():
    found = yield solve_sharded(BACKEND, SHARDINGS, matrices(), 3)
    take_steps(BACKEND, matrices(), found.finite, found.scales, keep=1.0, step=-0.1)


@computation
def with_lr_on_the_device():
    lr = ones(())
    found = yield solve_sharded(BACKEND, SHARDINGS, matrices(), 3)
    given = BACKEND, matrices(), found.finite, found.scales
    take_steps(*given, keep=1 - lr, step=-lr, overflow=lr != 1)


def deflated():
    blocks = [ones((6, 3)).double() for _ in SHARDINGS]
    return _deflate_stacks(sharded_matrices(), found_scales(), blocks, BACKEND)


def deflated_and_kept():
    blocks = [ones((6, 3)).double() for _ in SHARDINGS]
    return _deflate_stacks(sharded_matrices(), found_scales(), blocks, BACKEND, blocks)


def low_rank_momentum():
    memories = [LowRank(ones((8, 2)), ones((6, 2))) for _ in SHARDINGS]
    return remembered(sharded_matrices(), memories, [ones((6, 2)).double() for _ in SHARDINGS])


def pinned():
    group = {"last": "column", "operator_norm": "muon", "weight_projection": True}
    return pin(sharded_matrices(), found_scales(), [ones((1, 6)) for _ in SHARDINGS], group)


def tempered():
    grad = torch.empty(8, 6, dtype=torch.bfloat16, device="meta")
    groups = SumGroups(*BOTH.sum_groups, (*BOTH.groups_over_cols, *BOTH.groups_over_rows))
    return _temper_shard(grad, groups, 0.1, 3, eps=1e-8)


STEPS = {
    "plain": plain,
    "with_lr_on_the_device": with_lr_on_the_device,
    "half_step": lambda: starts_after_half_step(sharded_matrices(), BACKEND),
    "tiny_rows": lambda: mask_tiny_rows(sharded_matrices(), 0.1, BACKEND, in_place=False),
    "deflated": deflated,
    "deflated_and_kept": deflated_and_kept,
    "low_rank_momentum": low_rank_momentum,
    "pinned": pinned,
    "tempered": tempered,
    "flags": lambda: all_ranks_agree(ones(3) == 1, [("a",), (), ("a", "b")]),
}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda message, group: None)
    for cache in (scales._owners, scales._repeated):
        cache.cache_clear()


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_copied_to_the_device_or_waited_for(name):
    run(STEPS[name]())
    with Traffic() as traffic:
        run(STEPS[name]())
    assert not traffic.copies


def test_the_first_step_alone_copies_what_is_kept():
    with Traffic() as traffic:
        run(plain())
    assert traffic.copies.total() == 9  # whose rows and columns are whose, and how many; shared


def test_a_tolerance_is_waited_for():
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        run(solve_sharded(BACKEND, SHARDINGS, matrices(), 3, tol=0.1))
