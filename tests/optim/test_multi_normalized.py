"""MNGD and SWAN take equal shapes in one batch, and each parameter moves as it would alone."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import sinkgd
from allocations import peak_bytes
from norm_cases import NORMS
from sinkgd.optim.methods import multi_normalized as batching

CASES = {
    "swan": lambda params, **options: sinkgd.SWAN(params, lr=0.1, **options),
    "mngd": lambda params, **options: sinkgd.MNGD(
        params, lr=0.1, norms=[sinkgd.RowNorm(), sinkgd.ColumnNorm()], **options
    ),
    "all-norms": lambda params, **options: sinkgd.MNGD(
        params, lr=0.1, norms=[*NORMS.values()], **options
    ),
}
every = pytest.mark.parametrize("build", CASES.values(), ids=CASES)
# of two shapes and more, in turn
SHAPES = [(6, 10), (10, 6), (6, 10), (4, 12), (6, 10), (10, 6), (3, 6, 10), (2, 10, 6)]
LAYOUTS = [
    {},
    {"layout": "transposed"},
    {"split": 2},
    {"layout": "transposed", "split": 2},
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)

# A product of a batch may be summed in another order than one alone: 1e-7 each, a dozen in turn.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        params.append(nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        params[-1].grad = torch.randn(shape, generator=generator).to(dtype)
    return params


class Recorded:
    """The row norm of a user: it keeps what it is given, and what it returns."""

    def __init__(self):
        self.given, self.copies = [], []

    def project(self, x):
        projected = x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5
        self.given += [x, projected]
        self.copies += [x.clone(), projected.clone()]
        return projected


class Identity:
    def project(self, x):
        return x


class TestEachMovesAsItWouldAlone:
    @every
    @layouts
    @pytest.mark.parametrize("shapes", [[(6, 10)] * 5, SHAPES], ids=["equal", "interleaved"])
    def test_in_one_optimizer_or_each_in_its_own(self, build, layout, shapes):
        together, alone = parameters(shapes), parameters(shapes)
        build([{"params": together, **layout}]).step()
        for param in alone:
            build([{"params": [param], **layout}]).step()
        for one, other in zip(together, alone, strict=True):
            assert_close(one, other, **TOLERANCE)

    def test_bit_for_bit_where_nothing_is_multiplied_by_a_matrix(self):
        # large enough for torch to share out a sum among threads
        shapes = [*SHAPES, (200, 250), (200, 250)]
        norms = [sinkgd.RowNorm(), sinkgd.FrobeniusNorm(), sinkgd.ColumnNorm(), sinkgd.SignNorm()]
        for last in range(1, 5):
            together, alone = parameters(shapes), parameters(shapes)
            sinkgd.MNGD(together, lr=0.1, norms=norms[:last]).step()
            for param in alone:
                sinkgd.MNGD([param], lr=0.1, norms=norms[:last]).step()
            assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))

    @every
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_in_other_dtypes_rounded_once(self, build, dtype):
        params = parameters(dtype=dtype)
        wide = [
            nn.Parameter(p.detach().to(torch.promote_types(dtype, torch.float32))) for p in params
        ]
        for param, twin in zip(params, wide, strict=True):
            twin.grad = param.grad.to(twin.dtype)
        build(params).step()
        build(wide).step()
        for param, twin in zip(params, wide, strict=True):
            assert torch.equal(param, twin.to(dtype))

    @every
    def test_among_parameters_of_other_dtypes_and_strides(self, build):
        params = parameters([(6, 10)] * 4)
        params[1] = parameters([(6, 10)], torch.bfloat16)[0]
        params[2] = nn.Parameter(params[2].detach().t().contiguous().t())
        params[2].grad = torch.randn(10, 6).t()
        params[3] = nn.Parameter(torch.randn(12, 20)[::2, ::2])
        params[3].grad = torch.randn(6, 10)
        alone = copy.deepcopy(params)
        for param, twin in zip(params, alone, strict=True):
            twin.grad = param.grad
            build([twin]).step()
        build(params).step()
        for param, twin in zip(params, alone, strict=True):
            assert_close(param, twin, **TOLERANCE)

    def test_convolutions_of_either_memory_format(self):
        params = parameters([(6, 4, 3, 3)] * 3)
        params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)
        alone = copy.deepcopy(params)
        for param, twin in zip(params, alone, strict=True):
            twin.grad = param.grad.clone()
            CASES["swan"]([twin]).step()
        CASES["swan"](params).step()
        for param, twin in zip(params, alone, strict=True):
            assert_close(param, twin, **TOLERANCE)

    @every
    def test_twice_alike_bit_for_bit(self, build):
        first, second = parameters(), parameters()
        for params in (first, second):
            optimizer = build(params)
            optimizer.step()
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @every
    def test_and_no_gradient_changes(self, build):
        params = parameters()
        before = [param.grad.clone() for param in params]
        build(params).step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))

    def test_a_loss_scale_changes_nothing(self):
        # powers of two are exact; the row norm of the user's sees the gradients without the scale
        plain, scaled = parameters(), parameters()
        for param in scaled:
            param.grad *= 8
        gradients = [param.grad.clone() for param in scaled]
        norms = [Recorded(), Recorded()]
        for params, scale, norm in zip(
            (plain, scaled), (None, torch.tensor(8.0)), norms, strict=True
        ):
            optimizer = sinkgd.MNGD(params, lr=0.1, norms=[norm], num_iters=1)
            optimizer.grad_scale = scale
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
        assert all(map(torch.equal, norms[0].copies, norms[1].copies))
        assert all(torch.equal(p.grad, g) for p, g in zip(scaled, gradients, strict=True))


class TestOneBadMatrix:
    @every
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
    def test_holds_back_its_parameter_and_touches_no_other(self, build, bad):
        params, others = parameters(), parameters()
        params[2].grad[3, 4] = bad
        optimizer = build([(f"p{i}", param) for i, param in enumerate(params)], nonfinite="skip")
        before = params[2].detach().clone()
        optimizer.step()
        build(others).step()
        assert torch.equal(params[2], before)
        assert optimizer.skipped() == {"p2": 1}
        for i in {*range(len(SHAPES))} - {2}:
            assert torch.equal(params[i], others[i])


class TestStochasticRounding:
    @layouts
    def test_draws_the_bits_that_a_parameter_draws_by_itself(self, layout, monkeypatch):
        together, one_by_one = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
        for params, limit in ((together, batching.CPU_BATCH_BYTES), (one_by_one, 0)):
            monkeypatch.setattr(batching, "CPU_BATCH_BYTES", limit)
            groups = [{"params": params, "rounding": "stochastic", **layout}]
            CASES["mngd"](groups).step()
        assert all(torch.equal(a, b) for a, b in zip(together, one_by_one, strict=True))


class TestNormsOfAUser:
    def test_see_a_batch_of_independent_matrices(self):
        norm = Recorded()
        together, expected = parameters(), parameters()
        sinkgd.MNGD(together, lr=0.1, norms=[norm], num_iters=1).step()
        sinkgd.MNGD(expected, lr=0.1, norms=[sinkgd.RowNorm()], num_iters=1).step()
        # 6 x 10: three and the three of a batch; 10 x 6: two and two; 4 x 12
        assert sorted(tuple(x.shape) for x in norm.given[::2]) == [
            (1, 4, 12),
            (4, 10, 6),
            (6, 6, 10),
        ]
        for one, other in zip(together, expected, strict=True):
            assert_close(one, other)

    def test_may_keep_what_they_are_given(self):
        norm = Recorded()
        norms = [sinkgd.ColumnNorm(), norm, sinkgd.RowNorm()]
        sinkgd.MNGD(parameters(), lr=0.1, norms=norms, num_iters=3).step()
        assert all(map(torch.equal, norm.given, norm.copies))

    @pytest.mark.parametrize("shapes", [[(6, 10)], SHAPES], ids=["alone", "batched"])
    def test_may_return_what_they_are_given(self, shapes):
        params = parameters(shapes)
        starts = [param.detach().clone() for param in params]
        gradients = [param.grad.clone() for param in params]
        sinkgd.MNGD(params, lr=0.5, norms=[Identity()]).step()
        for param, start, gradient in zip(params, starts, gradients, strict=True):
            assert torch.equal(param.grad, gradient)
            assert_close(param.detach(), start - 0.5 * gradient)


class TestBatches:
    def sizes(self, params, **options):
        slots = [batching.Slot("p", i, p, p.grad) for i, p in enumerate(params)]
        options = {"layout": "auto", "split": 1, **options}
        return [
            [len(piece.grad) for piece in batch] for batch in batching.batches(slots, **options)
        ]

    def test_hold_equal_shapes_of_all_parameters(self):
        assert self.sizes(parameters()) == [[1, 1, 1, 3], [1, 1, 2], [1]]

    def test_hold_one_dtype_and_one_order_of_memory(self):
        params = parameters([(6, 10)] * 6)
        params[1] = parameters([(6, 10)], torch.float64)[0]
        for i in (2, 3, 4):
            params[i].grad = torch.randn(10, 6).t()
        assert self.sizes(params) == [[1, 1], [1], [1, 1, 1]]

    def test_keep_the_order_of_memory(self):
        stack, _ = batching.stacked([torch.randn(2, 10, 6).mT, torch.randn(1, 10, 6).mT])
        assert stack.mT.is_contiguous()

    def test_hold_the_parts_of_a_split_parameter(self):
        assert self.sizes(parameters([(6, 10), (6, 10)]), split=(2, 2, 1, 1)) == [[1] * 4, [1] * 4]

    def test_end_where_their_scratch_would_be_too_large(self, monkeypatch):
        three = 3 * batching.MATRICES_IN_USE * 4 * 60
        monkeypatch.setattr(batching, "CPU_BATCH_BYTES", three)
        assert self.sizes(parameters([(6, 10)] * 4 + [(7, 6, 10)])) == [[1] * 3, [1], [3], [3], [1]]

    def test_a_matrix_that_is_too_large_goes_by_itself_and_is_not_copied(self, monkeypatch):
        monkeypatch.setattr(batching, "CPU_BATCH_BYTES", 0)
        params = parameters([(6, 10), (6, 10), (2, 6, 10)])
        assert self.sizes(params) == [[1], [1], [1], [1]]
        stack, is_copy = batching.stacked([params[0].grad.unsqueeze(0)])
        assert not is_copy
        assert stack.data_ptr() == params[0].grad.data_ptr()

    @every
    @pytest.mark.parametrize("shape", [(128, 128), (64, 256), (256, 64)], ids=str)
    def test_a_step_needs_no_more_scratch_than_they_may(self, build, shape, monkeypatch):
        matrix = 4 * shape[0] * shape[1]
        optimizer = build(parameters([shape] * 12))
        slack = 1.1  # scales of rows and columns, sums
        for limit in (0, 6 * matrix, 12 * matrix):
            monkeypatch.setattr(batching, "CPU_BATCH_BYTES", limit)
            assert peak_bytes(optimizer.step) <= slack * max(limit, 3 * matrix)

    def test_experts_need_no_more_scratch_than_they_may(self, monkeypatch):
        matrix = 4 * 64 * 64
        monkeypatch.setattr(batching, "CPU_BATCH_BYTES", 6 * matrix)
        optimizer = CASES["swan"](parameters([(32, 64, 64)]))
        assert peak_bytes(optimizer.step) <= 1.1 * 6 * matrix


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_class_instead_of_a_norm_is_refused_before_the_first_step(norm):
    kind, weight = type(norm), nn.Parameter(torch.ones(4, 3))
    for build in (
        lambda: sinkgd.MNGD([weight], norms=[sinkgd.RowNorm(), kind]),
        lambda: sinkgd.SinkGD([{"params": [weight], "algorithm": "mngd", "norms": (kind,)}]),
        lambda: sinkgd.multi_normalize(weight, [kind], 3),
        lambda: sinkgd.residuals(weight, [kind]),
    ):
        with pytest.raises(
            TypeError, match=rf"{kind.__name__} is a class; write {kind.__name__}\(\)"
        ):
            build()
