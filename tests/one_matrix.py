"""One matrix, its optimizer, and the update of a step."""

import torch

import sinkgd


def heavy(seed=0, shape=(9, 14)):
    """A gradient with rows and entries of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[-2], 1, generator=generator).exp()
    return torch.randn(shape, generator=generator).pow(3) * rows


def optimizer_of(weight, **options):
    group = {"params": [("w", weight)], "algorithm": "sinkgd", **options}
    return sinkgd.SinkGD([group], lr=group.pop("lr", 1.0))


def update_along(grad, optimizer, weight):
    """Return what a step of lr 1 takes off the weight, which is put back to zero."""
    weight.data.zero_()
    weight.grad = grad.clone()
    optimizer.step()
    return -weight.detach().clone()


def same(x):
    return x


def direction(x):
    return x / x.norm()
