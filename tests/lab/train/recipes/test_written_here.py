"""APOLLO and RACS against their papers in float64, and why pytorch-optimizer's are not taken."""

import math

import pytest
import pytorch_optimizer
import torch

from sinkgd.lab.train.recipes.per_matrix import Apollo, Racs, rank_one

SHAPES = [(6, 10), (10, 6), (8, 8)]
STEPS = 7


def gradients(shape, *, spike=True):
    """Of a few steps; one is much longer, so that its update is held back."""
    found = torch.randn(STEPS, *shape, generator=torch.Generator().manual_seed(1)).double()
    if spike:
        found[4] *= 50.0
    return found


def trained(optimizer_of, grads, *, dtype=torch.float64):
    weight = torch.nn.Parameter(torch.zeros(grads.shape[1:], dtype=dtype))
    optimizer = optimizer_of(weight)
    for grad in grads:
        weight.grad = grad.to(dtype)
        optimizer.step()
    return weight.detach()


def limited(norm, before):
    """Return the factor by which Fira's limiter shortens an update of length ``norm``."""
    if before is None or norm / (before + 1e-8) <= 1.01:
        return 1.0
    return 1.01 * (before + 1e-8) / norm


def apollo(grads, projections, *, scale, per_channel, lr=0.1, betas=(0.9, 0.999), eps=1e-6):
    """Algorithm 1, column by column; tall matrices turned."""
    tall = grads.shape[1] >= grads.shape[2]
    weight = torch.zeros(grads.shape[1:][::-1] if tall else grads.shape[1:], dtype=torch.float64)
    mean = square = 0.0
    before = None
    turned = grads.mT if tall else grads
    for t, (grad, projection) in enumerate(zip(turned, projections, strict=True), start=1):
        low = projection @ grad
        mean = betas[0] * mean + (1 - betas[0]) * low
        square = betas[1] * square + (1 - betas[1]) * low**2
        adam = mean / (square.sqrt() + eps)
        if per_channel:
            factors = [adam[:, j].norm() / (low[:, j].norm() + 1e-8) for j in range(low.shape[1])]
        else:
            factors = [adam.norm() / (low.norm() + 1e-8)] * low.shape[1]
        update = grad @ torch.diag(torch.stack(factors)) * math.sqrt(scale)
        factor = limited(update.norm().item(), before)
        before = update.norm().item() * factor
        correction = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        weight -= lr * correction * factor * update
    return weight.T if tall else weight


def drawn(shape, rank, every):
    """The projections as `Apollo` draws them, for the only matrix there is."""
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(1_000_003 + step // every)
        found.append(torch.randn(rank, min(shape), generator=generator).double() / math.sqrt(rank))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "scale", "per_channel"), [(3, 1.0, True), (1, 128.0, False)])
def test_apollo_is_the_papers(shape, rank, scale, per_channel):
    grads = gradients(shape)
    options = {"scale": scale, "per_channel": per_channel}
    ours = trained(
        lambda w: Apollo([w], 0.1, rank=rank, projection_every_steps=3, **options), grads
    )
    theirs = apollo(grads, drawn(shape, rank, 3), **options)
    # P is rounded to float32, as it is drawn.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_apollos_projection_is_renewed_and_has_the_variance_of_the_paper():
    large = drawn((400, 500), 100, 3)
    assert torch.equal(large[0], large[2])
    assert not torch.equal(large[2], large[3])
    assert large[0].var() == pytest.approx(1 / 100, rel=0.02)


def rank_of(update):
    values = torch.linalg.svdvals(update)
    return int((values > 1e-6 * values[0]).sum())


def test_the_librarys_apollo_takes_steps_of_low_rank_and_the_papers_does_not():
    """Why APOLLO is written here; should this fail, the library's can be used."""
    (grad,) = gradients((8, 12))[:1].float()
    projection = {"rank": 2, "update_proj_gap": 200, "scale": 1.0, "projection_type": "std"}
    groups = [{"params": [torch.nn.Parameter(torch.zeros(8, 12))], **projection}]
    library = pytorch_optimizer.APOLLO(groups, lr=0.1, scale_type="channel")
    groups[0]["params"][0].grad = grad.clone()
    library.step()
    ours = trained(lambda w: Apollo([w], 0.1, rank=2), grad[None], dtype=torch.float32)
    assert rank_of(library.param_groups[0]["params"][0].detach()) == 2
    assert rank_of(ours) == rank_of(grad) == 8


def racs(grads, *, lr=0.1, beta=0.9):
    """As the paper has it: five rounds of alternating least squares, running means, a limiter."""
    _, m, n = grads.shape
    weight = torch.zeros(m, n, dtype=torch.float64)
    rows, columns, before = torch.zeros(m).double(), torch.zeros(n).double(), None
    for grad in grads:
        q = torch.ones(m).double()
        for _ in range(5):
            s = torch.stack([(grad[:, j] ** 2 * q).sum() / (q @ q) for j in range(n)])
            q = torch.stack([(grad[i] ** 2 * s).sum() / (s @ s) for i in range(m)])
        rows = beta * rows + (1 - beta) * q
        columns = beta * columns + (1 - beta) * s
        update = torch.diag(rows**-0.5) @ grad @ torch.diag(columns**-0.5)
        norm = update.norm().item()
        factor = 1.0 if before is None else min(1.0, 1.01 * before / norm)
        before = norm * factor
        weight -= lr * factor * update
    return weight


@pytest.mark.parametrize("shape", SHAPES)
def test_racs_is_the_papers(shape):
    grads = gradients(shape)
    ours = trained(lambda w: Racs([w], 0.1), grads)
    torch.testing.assert_close(ours, racs(grads), rtol=1e-4, atol=1e-5)  # float32 inside


def test_the_fixed_point_is_the_best_rank_one():
    squares = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)).double()
    q, s = rank_one(squares, 60)
    u, values, vh = torch.linalg.svd(squares)
    torch.testing.assert_close(torch.outer(q, s), values[0] * torch.outer(u[:, 0], vh[0]))


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_racs_does_not_see_the_scale_of_a_gradient_and_the_librarys_does(factor):
    """Why RACS is written here; should the last line fail, the library's can be used."""
    grads = gradients((6, 9), spike=False)
    own = [trained(lambda w: Racs([w], 0.1), f * grads, dtype=torch.float32) for f in (1.0, factor)]
    torch.testing.assert_close(own[1], own[0], rtol=1e-4, atol=1e-5)
    library = [
        trained(lambda w: pytorch_optimizer.RACS([w], 0.1), f * grads) for f in (1.0, factor)
    ]
    assert not torch.allclose(library[1], library[0], rtol=0.5)


def test_a_zero_gradient_moves_nothing():
    zeros = torch.zeros(2, 4, 6)
    for optimizer_of in (lambda w: Racs([w], 0.1), lambda w: Apollo([w], 0.1, rank=2)):
        assert torch.equal(trained(optimizer_of, zeros, dtype=torch.float32), zeros[0])


@pytest.mark.parametrize("kind", [Racs, lambda params, lr: Apollo(params, lr, rank=2)])
def test_a_zero_row_stays_and_after_zero_gradients_nothing_is_held_back(kind):
    grads = gradients((4, 6), spike=False)
    grads[:, 2] = 0.0
    grads[:3] = 0.0
    weight = trained(lambda w: kind([w], 0.1), grads)
    assert weight.isfinite().all()
    assert torch.equal(weight[2], torch.zeros(6).double())
    assert weight[0].abs().max() > 0.01


@pytest.mark.parametrize("kind", [Racs, lambda params, lr: Apollo(params, lr, rank=1)])
def test_vectors_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"'norm.weight' has shape \(5,\)\. Give it to AdamW"):
        kind([("norm.weight", torch.nn.Parameter(torch.zeros(5)))], 0.1)


@pytest.mark.parametrize("kind", [Racs, lambda params, lr, **o: Apollo(params, lr, rank=1, **o)])
def test_weights_decay_apart_from_the_gradient(kind):
    weight = torch.nn.Parameter(torch.full((3, 4), 2.0))
    weight.grad = torch.zeros(3, 4)
    kind([weight], 0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 2.0 * (1 - 0.1 * 0.5)))
