"""How parameters, gradients and saved state lie in memory changes no update, and no neighbor.

The oracle holds everything contiguous and runs the plain definitions: the eager backend, and
torch's AdamW without its fused kernel.
"""

from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from layouts import gapped, scattered, turned
from optimizer_cases import OPTIMIZERS, Case

YOUNG = {"reset_interval": 3, "warmup_steps": 2, "theta": 2.0, "clip_delay": 1}
EXTRA = [
    Case("SinkGD-warm", lambda p, **o: sinkgd.SinkGDVariant(p, warm_start=True, **o)),
    Case(
        "SinkGD-warm-rows", lambda p, **o: sinkgd.SinkGDVariant(p, warm_start=True, last="row", **o)
    ),
    Case("SinkGD-deflated", lambda p, **o: sinkgd.SinkGD(p, deflated_rank=2, **o)),
    Case("SPAM-young", lambda p, **o: sinkgd.SPAM(p, **YOUNG, **o)),
    Case("AdamWSPAM-young", lambda p, **o: sinkgd.AdamWSPAM(p, **YOUNG, **o)),
]
every = pytest.mark.parametrize("case", [*OPTIMIZERS, *EXTRA], ids=str)


def expanded(x):
    """Its first row for every row."""
    return x[:1].expand_as(x)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def contiguous(x):
    return x.contiguous()


MATRIX = [contiguous, turned, gapped, scattered]
KERNEL = [contiguous, channels_last]
# (shape, of the parameter, of its gradient, of the parameter that the state was saved for)
LAYOUTS = [
    *(((6, 5), param, grad, contiguous) for param in MATRIX for grad in [*MATRIX, expanded]),
    *(((6, 5), param, contiguous, saved) for param in MATRIX for saved in MATRIX[1:]),
    # One row, alone and in a batch: only gaps between its entries tell rows from columns. An odd
    # number of signs never adds up to zero, which would make the power iteration of "pinned" blind.
    *(
        (shape, param, grad, contiguous)
        for shape in [(1, 7), (3, 1, 5)]
        for param in MATRIX
        for grad in MATRIX
    ),
    *(((6, 4, 3, 3), *three) for three in product(KERNEL, repeat=3)),
    ((6, 4, 3, 3), contiguous, expanded, contiguous),
    ((6, 4, 3, 3), channels_last, expanded, contiguous),
]
every_layout = pytest.mark.parametrize(
    ("shape", "param", "grad", "saved"),
    LAYOUTS,
    ids=lambda x: x.__name__ if callable(x) else "x".join(map(str, x)),
)


def plain(optimizer):
    """Switch to the plain definitions."""
    for group in optimizer.param_groups:
        for option, value in (("backend", "eager"), ("fused", False)):
            if option in group:
                group[option] = value
    return optimizer


def random(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def memory_of(param):
    """Return all that the storage of a parameter holds."""
    storage = param.untyped_storage()
    return torch.empty(0, dtype=param.dtype).set_(storage)


def run(param, optimizer, lie, grads):
    for grad in grads:
        param.grad = lie(grad)
        optimizer.step()


@every
@every_layout
def test_updates_are_those_of_contiguous_memory(case, shape, param, grad, saved):
    grads = [grad(random(seed, shape)).contiguous() for seed in range(5)]
    start = random(9, shape)
    expected = nn.Parameter(start.clone())
    run(expected, plain(case.build([expected], lr=0.1)), contiguous, grads)

    first = nn.Parameter(saved(start))
    one = case.build([first], lr=0.1)
    run(first, one, contiguous, grads[:2])
    second = nn.Parameter(param(first.detach()))
    gaps = memory_of(second).isnan().sum()
    other = case.build([second], lr=0.1)
    other.load_state_dict(one.state_dict())
    kept = {key: x.clone() for key, x in one.state[first].items()} if one.state else {}
    run(second, other, grad, grads[2:])

    # An expanded gradient has rank one. Deflation then scales rounding errors by up to 2^6.
    atol = 1e-4 if "deflated" in case.name and grad is expanded else 1e-5
    assert_close(second.detach(), expected.detach(), rtol=1e-4, atol=atol)
    assert memory_of(second).isnan().sum() == gaps, "a neighbor was written"
    assert second.stride() == param(start).stride()
    for key, x in kept.items():
        assert torch.equal(one.state[first][key], x), f"{key} is shared with what was loaded"


@pytest.mark.parametrize("param", [contiguous, turned, gapped, scattered])
def test_the_usual_layout_is_the_fused_kernel_bit_for_bit(param):
    ours, theirs = nn.Parameter(param(random(0, (6, 5)))), nn.Parameter(random(0, (6, 5)))
    optimizer = sinkgd.SinkGD([{"params": [ours], "algorithm": "adamw"}], lr=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, fused=True)
    for seed in range(3):
        ours.grad = theirs.grad = random(seed, (6, 5))
        optimizer.step()
        reference.step()
    assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    if param is contiguous:
        assert torch.equal(ours, theirs)
