"""A layout shows a parameter as matrices of out-features by in-features, and copies nothing."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd


def step(param, **layout):
    """Return the update that one SinkGD step of lr 1 applies to ``param``, given its gradient."""
    start = param.detach().clone()
    group = {"params": [("w", param)], "algorithm": "sinkgd", **layout}
    sinkgd.SinkGD([group], lr=1.0).step()
    return start - param.detach()


def with_grad(*shape):
    param = nn.Parameter(torch.randn(shape))
    param.grad = torch.randn(shape)
    return param


def test_three_dimensions_are_a_batch():
    experts = with_grad(3, 5, 4)
    expected = torch.stack([sinkgd.sr_sinkhorn(grad) for grad in experts.grad])
    assert_close(step(experts), expected)


@pytest.mark.parametrize("layout", ["auto", "flatten"])
def test_a_convolution_is_out_by_everything_else(layout):
    kernel = with_grad(6, 4, 3, 3)
    expected = sinkgd.sr_sinkhorn(kernel.grad.flatten(1)).view_as(kernel)
    assert_close(step(kernel, layout=layout), expected)


def test_a_channels_last_convolution_is_updated_in_place():
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    kernel.grad = torch.randn(6, 4, 3, 3)  # autograd may hand over either memory format
    expected = sinkgd.sr_sinkhorn(kernel.grad.flatten(1)).view_as(kernel)
    assert_close(step(kernel), expected)


def test_transposed_takes_rows_from_the_last_dimension():
    conv1d = with_grad(4, 6)
    assert_close(step(conv1d, layout="transposed"), sinkgd.sr_sinkhorn(conv1d.grad.T).T)


@pytest.mark.parametrize("split", [2, (4, 2), (1, 2, 3)], ids=str)
def test_split_parts_are_matrices_of_their_own(split):
    fused = with_grad(6, 5)
    sizes = [3, 3] if split == 2 else list(split)
    expected = torch.cat([sinkgd.sr_sinkhorn(part) for part in fused.grad.split(sizes)])
    assert_close(step(fused, split=split), expected)


def test_split_and_transposed_compose():
    fused = with_grad(5, 6)
    expected = torch.cat([sinkgd.sr_sinkhorn(part.T).T for part in fused.grad.split(2, 1)], 1)
    assert_close(step(fused, layout="transposed", split=3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "columns"}, "layout must be one of auto, transposed, flatten; got 'columns'"),
        ({"split": 4}, r"'w' of shape \(6, 5\): split=4 does not divide 6 rows"),
        ({"split": (4, 3)}, r"split=\(4, 3\) adds up to 7, not to 6 rows"),
        ({"split": (6, 0)}, r"split=\(6, 0\) has a part below 1; each needs at least one row"),
        ({"split": (7, -1)}, r"split=\(7, -1\) has a part below 1; each needs at least one row"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        step(with_grad(6, 5), **options)


def test_a_parameter_without_a_flat_view_is_refused():
    strided = nn.Parameter(torch.randn(6, 8, 3, 3)[:, ::2])
    with pytest.raises(ValueError, match="cannot view 'w' with strides"):
        sinkgd.SinkGD([{"params": [("w", strided)], "algorithm": "sinkgd"}])
