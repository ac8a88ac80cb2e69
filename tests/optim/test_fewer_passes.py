"""``tol`` and ``warm_start``: fewer iterations for the same update, and exact resume."""

import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from reference import square_root_sinkhorn


def heavy(seed=0, shape=(12, 20)):
    """A gradient whose iterations converge slowly: entries of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).pow(3)


def optimizer_of(weight, **options):
    return sinkgd.SinkGDVariant(
        [{"params": [("w", weight)], "algorithm": "sinkgd"}], lr=1.0, **options
    )


def step_along(grad, optimizer, weight):
    before = weight.detach().clone()
    weight.grad = grad
    optimizer.step()
    return before - weight.detach()


def movement(grad, k):
    """How far iteration ``k`` moves a row scale at most: rows that had length l go to √n."""
    lengths = square_root_sinkhorn(grad, k - 1).norm(dim=1) / grad.shape[1] ** 0.5
    return (1 / lengths - 1).abs().max().item()


class TestTol:
    @pytest.mark.parametrize("tol", [0.1, 0.01, 1e-3])
    def test_the_update_is_as_near_to_the_fixed_point_as_tol_asks(self, every_backend, tol):
        grad = heavy()
        weight = nn.Parameter(torch.zeros_like(grad))
        update = step_along(
            grad, optimizer_of(weight, tol=tol, sinkhorn_iterations=200), weight
        ).double()
        rows = update.norm(dim=1) / grad.shape[1] ** 0.5
        assert (rows - 1).abs().max() < tol

    @pytest.mark.parametrize("tol", [0.3, 0.01])
    def test_it_stops_after_the_first_iteration_that_moves_less(self, every_backend, tol):
        grad = heavy()
        weight = nn.Parameter(torch.zeros_like(grad))
        update = step_along(grad, optimizer_of(weight, tol=tol, sinkhorn_iterations=60), weight)
        stop = next(k for k in range(2, 60) if movement(grad, k) <= tol)
        assert stop > 2  # so that stopping too early would show
        expected = square_root_sinkhorn(grad, stop)
        assert_close(update.double(), expected, rtol=1e-5, atol=1e-6)
        other = square_root_sinkhorn(grad, stop - 1)
        assert (other - expected).abs().max() > 1e-4

    def test_no_more_iterations_are_run_than_asked_for(self, every_backend):
        grad = heavy()
        weight = nn.Parameter(torch.zeros_like(grad))
        update = step_along(grad, optimizer_of(weight, tol=0.0, sinkhorn_iterations=3), weight)
        assert_close(update.double(), square_root_sinkhorn(grad, 3), rtol=1e-5, atol=1e-6)

    def test_a_tol_below_zero_is_refused(self):
        with pytest.raises(ValueError, match=r"tol must be at least 0, got -0\.1"):
            optimizer_of(nn.Parameter(torch.zeros(3, 4)), tol=-0.1)
        with pytest.raises(ValueError, match=r"tol must be at least 0, got -0\.1"):
            sinkgd.sinkhorn_scales(torch.ones(3, 4), tol=-0.1)


class TestWarmStart:
    def test_on_a_steady_gradient_one_iteration_a_step_reaches_the_fixed_point(self, every_backend):
        grad = heavy()
        weight = nn.Parameter(torch.zeros_like(grad))
        optimizer = optimizer_of(weight, warm_start=True, sinkhorn_iterations=1)
        for _ in range(30):
            update = step_along(grad, optimizer, weight)
            weight.data.zero_()
        assert_close(update.double(), square_root_sinkhorn(grad, 30), rtol=1e-4, atol=1e-5)

    def test_two_steps_of_two_iterations_are_four(self, every_backend):
        grad = heavy(shape=(37, 53))
        weight = nn.Parameter(torch.zeros_like(grad))
        optimizer = optimizer_of(weight, warm_start=True, sinkhorn_iterations=2)
        step_along(grad, optimizer, weight)
        weight.data.zero_()
        update = step_along(grad, optimizer, weight)
        assert_close(update.double(), square_root_sinkhorn(grad, 4), rtol=1e-5, atol=1e-6)

    def test_the_first_step_is_the_plain_one(self, every_backend):
        grad = heavy()
        plain, warm = nn.Parameter(torch.zeros_like(grad)), nn.Parameter(torch.zeros_like(grad))
        expected = step_along(grad, optimizer_of(plain), plain)
        assert torch.equal(step_along(grad, optimizer_of(warm, warm_start=True), warm), expected)

    @pytest.mark.parametrize("options", [{}, {"split": 3}, {"layout": "transposed"}])
    def test_one_vector_a_matrix_is_kept(self, every_backend, options):
        weight = nn.Parameter(torch.zeros(12, 5, dtype=torch.bfloat16))
        group = {"params": [weight], "algorithm": "sinkgd", **options}
        optimizer = sinkgd.SinkGDVariant([group], warm_start=True)
        for seed in range(2):
            weight.grad = heavy(seed, (12, 5)).bfloat16()
            optimizer.step()
        state = optimizer.state[weight]
        assert set(state) == {"col_scale"}
        columns = 12 if options.get("layout") else 5
        assert state["col_scale"].shape == (columns * options.get("split", 1),)
        assert state["col_scale"].dtype == torch.float32

    def test_a_column_that_was_zero_comes_back(self, every_backend):
        grad = heavy()
        weight = nn.Parameter(torch.zeros_like(grad))
        optimizer = optimizer_of(weight, warm_start=True, sinkhorn_iterations=20)
        idle = grad.clone()
        idle[:, 3] = 0
        assert step_along(idle, optimizer, weight)[:, 3].eq(0).all()
        weight.data.zero_()
        update = step_along(grad, optimizer, weight).double()
        assert_close(update, square_root_sinkhorn(grad, 40), rtol=1e-2, atol=1e-3)

    def test_zero_and_bad_gradients_do_no_harm(self, every_backend):
        grad = heavy()
        weight = nn.Parameter(torch.zeros_like(grad))
        optimizer = optimizer_of(weight, warm_start=True, nonfinite="skip")
        step_along(grad, optimizer, weight)
        kept = optimizer.state[weight]["col_scale"].clone()
        bad = grad.clone()
        bad[2, 3] = torch.nan
        assert step_along(bad, optimizer, weight).eq(0).all()
        assert torch.equal(optimizer.state[weight]["col_scale"], kept)
        assert step_along(torch.zeros_like(grad), optimizer, weight).eq(0).all()
        assert optimizer.state[weight]["col_scale"].eq(1).all()

    def test_the_scale_of_the_gradient_does_not_matter(self, every_backend):
        updates = []
        for size in (1.0, 2.0**-80, 2.0**80):
            weight = nn.Parameter(torch.zeros(12, 20))
            optimizer = optimizer_of(weight, warm_start=True, sinkhorn_iterations=2)
            for seed in range(2):
                weight.data.zero_()
                updates.append(step_along(heavy(seed) * size, optimizer, weight))
        for update in updates[3::2]:
            assert_close(update, updates[1], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_run_that_goes_on_takes_the_steps_it_would_have_taken(self, every_backend, dtype):
        def a_run(first, steps, weight, optimizer):
            for seed in range(first, first + steps):
                weight.grad = heavy(seed).to(dtype)
                optimizer.step()

        options = {"warm_start": True, "sinkhorn_iterations": 1}
        whole = nn.Parameter(torch.zeros(12, 20, dtype=dtype))
        a_run(0, 5, whole, optimizer_of(whole, **options))

        part = nn.Parameter(torch.zeros(12, 20, dtype=dtype))
        optimizer = optimizer_of(part, **options)
        a_run(0, 2, part, optimizer)
        file = io.BytesIO()
        torch.save({"weight": part.detach(), "optimizer": optimizer.state_dict()}, file)
        saved = torch.load(io.BytesIO(file.getvalue()))
        resumed = nn.Parameter(saved["weight"])
        optimizer = optimizer_of(resumed, **options)
        optimizer.load_state_dict(saved["optimizer"])
        assert optimizer.state[resumed]["col_scale"].dtype == torch.float32
        a_run(2, 3, resumed, optimizer)
        assert torch.equal(resumed, whole)
