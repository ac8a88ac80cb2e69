"""Every backend multiplies updates with a few vectors, and takes some away, as float64 does."""

import pytest
import torch

from layouts import gapped, scattered, turned
from sinkgd.deflation import LowRank
from sinkgd.kernels import CorrectedScales, Scales, Stack
from sinkgd.kernels.cpu import CpuBackend
from sinkgd.kernels.rounding import keys_of_step, round_to_bfloat16

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

# (stack, batch, m, n): odd, one row, one column, whole vectors of 16, shared by the threads
SHAPES = [
    (1, (), 37, 53),
    (3, (), 1, 19),
    (2, (), 19, 1),
    (2, (3,), 8, 16),
    (1, (2, 2), 5, 33),
    (1, (), 263, 257),
    (2, (), 300, 401),
]
shapes = pytest.mark.parametrize("sizes", SHAPES, ids=str)
ranks = pytest.mark.parametrize("k", [1, 8, 11])


def normal(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


LAYOUTS = {"rows": torch.clone, "turned": turned, "gapped": gapped, "scattered": scattered}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def stack_of(shape, layout=torch.clone, dtype=torch.float32, seed=0):
    """Return a stack and its updates in float64."""
    count, batch, m, n = shape
    grads = [layout(normal((*batch, m, n), seed + i, dtype)) for i in range(count)]
    scales = [
        Scales(normal((*batch, m, 1), 50 + i).exp(), normal((*batch, 1, n), 60 + i).exp())
        for i in range(count)
    ]
    updates = [
        own.row.double() * grad.double() * own.col.double()
        for grad, own in zip(grads, scales, strict=True)
    ]
    return Stack(grads, scales), torch.stack(updates)


def near(found, expected):
    """Within 40 roundings of 2^-24 of the size of the terms: sums of up to 401 in 16 lanes."""
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    assert error < 2.5e-6, error


class TestProducts:
    @shapes
    @layouts
    @ranks
    def test_they_are_those_of_float64(self, backend, sizes, layout, k):
        stack, x = stack_of(sizes, layout)
        v, y = normal((*x.mT.shape[:-1], k), 1).double(), normal((*x.shape[:-1], k), 2).double()
        products = backend.products([stack])
        near(products.of_rows([v])[0], x @ v)
        near(products.of_cols([y])[0], x.mT @ y)
        near(products.squares()[0], x.square().sum((-2, -1), keepdim=True))
        by_rows, by_cols = backend.products([stack]).of_both([v])
        near(by_rows[0], x @ v)
        near(by_cols[0], x.mT @ (x @ v))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @layouts
    def test_they_take_any_dtype(self, backend, dtype, layout):
        stack, x = stack_of((2, (), 37, 53), layout, dtype)
        v = normal((2, 53, 3), 1).double()
        near(backend.products([stack]).of_both([v])[1][0], x.mT @ (x @ v))

    def test_gradients_of_a_stack_may_have_gaps_in_all_directions(self, backend):
        """One whose columns lie beside each other, and one that is copied before it is read."""
        stack, x = stack_of((2, (), 37, 53))
        stack.grads[0], stack.grads[1] = turned(stack.grads[0]), scattered(stack.grads[1].mT).mT
        assert all(grad.stride(0) < grad.stride(1) for grad in stack.grads)
        v = normal((2, 53, 3), 1).double()
        near(backend.products([stack]).of_both([v])[1][0], x.mT @ (x @ v))

    def test_stacks_do_not_know_of_each_other(self, backend):
        few = SHAPES[:5:2] if backend.name == "triton" else SHAPES  # the interpreter is slow
        stacks = [
            stack_of(shape, layout, dtype, seed=9 * i)[0]
            for i, shape in enumerate(few)
            for layout in LAYOUTS.values()
            for dtype in (torch.float32, torch.float64)
        ]
        sizes = [(len(own.grads), *own.grads[0].mT.shape[:-1], 5) for own in stacks]
        blocks = [normal(size, i).double() for i, size in enumerate(sizes)]
        together = backend.products(stacks)
        rows, cols = together.of_both(blocks)
        squares = together.squares()
        for i, stack in enumerate(stacks):
            alone = backend.products([stack])
            (own_rows,), (own_cols,) = alone.of_both([blocks[i]])
            assert torch.equal(rows[i], own_rows)
            assert torch.equal(cols[i], own_cols)
            assert torch.equal(squares[i], alone.squares()[0])

    def test_of_an_empty_piece_they_are_zero(self, backend):
        scales = Scales(torch.ones(0, 1), torch.ones(1, 7))
        products = backend.products([Stack([torch.empty(0, 7)], [scales])])
        rows, cols = products.of_both([torch.ones(1, 7, 2, dtype=torch.float64)])
        assert rows[0].shape == (1, 0, 2)
        assert torch.equal(cols[0], torch.zeros(1, 7, 2, dtype=torch.float64))
        assert products.squares()[0].flatten().tolist() == [0.0]

    def test_what_is_not_finite_stays_in_its_matrix(self, backend):
        stack, _ = stack_of((3, (), 40, 24))
        stack.grads[1][3, 5] = torch.inf
        v = torch.ones(3, 24, 2, dtype=torch.float64)
        _, (found,) = backend.products([stack]).of_both([v])
        assert not found[1].isfinite().all()
        assert found[0].isfinite().all()
        assert found[2].isfinite().all()

    def test_scales_at_the_end_of_the_range_overflow_nothing(self, backend):
        """A gradient whose rows and columns differ by 1e60 has an update of ordinary size."""
        stack, _ = stack_of((1, (), 24, 40))
        down, across = torch.logspace(-18, 18, 24)[:, None], torch.logspace(18, -18, 40)
        grads = [grad * down * across for grad in stack.grads]
        scales = [Scales(1 / down, 1 / across[None])]
        x = torch.stack([1 / down * grad * (1 / across) for grad in grads]).double()
        v = normal((1, 40, 3), 1).double()
        near(backend.products([Stack(grads, scales)]).of_both([v])[1][0], x.mT @ (x @ v))


class TestLoweredUpdates:
    @staticmethod
    def taken(stack, k):
        return [
            LowRank(normal((*g.shape[:-1], k), 30 + i), normal((*g.mT.shape[:-1], k), 40 + i))
            for i, g in enumerate(stack.grads)
        ]

    @shapes
    @layouts
    @ranks
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_taken_is_subtracted(self, backend, sizes, layout, k, dtype):
        stack, x = stack_of(sizes, layout, dtype)
        taken = self.taken(stack, k)
        params = [layout(normal(grad.shape, 70)) for grad in stack.grads]
        less = torch.stack([own.left.double() @ own.right.double().mT for own in taken])
        expected = 0.875 * torch.stack(params).double() - 0.25 * (x - less)
        lowered = [
            CorrectedScales(*own, away) for own, away in zip(stack.scales, taken, strict=True)
        ]
        backend.update_(params, stack.grads, lowered, keep=0.875, step=-0.25)
        near(torch.stack(params).double(), expected)

    @pytest.mark.parametrize("param_layout", [torch.clone, turned], ids=["rows", "turned"])
    @pytest.mark.parametrize("grad_layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_the_gradient_may_lie_another_way(self, backend, param_layout, grad_layout):
        stack, x = stack_of((1, (), 40, 24), grad_layout)
        (taken,) = self.taken(stack, 3)
        param = param_layout(normal((40, 24), 70))
        expected = param.double() - 0.5 * (x[0] - taken.left.double() @ taken.right.double().mT)
        lowered = [CorrectedScales(*stack.scales[0], taken)]
        backend.update_([param], stack.grads, lowered, keep=1.0, step=-0.5)
        near(param.double(), expected)

    @pytest.mark.parametrize("batch", [(), (3,)])
    @layouts
    def test_a_factor_multiplies_the_scaled_gradient_alone(self, backend, layout, batch):
        stack, x = stack_of((1, batch, 40, 24), layout)
        (taken,) = self.taken(stack, 3)
        factor = normal((*batch, 1, 1), 50).abs() + 0.5
        param = normal((*batch, 40, 24), 70)
        less = taken.left.double() @ taken.right.double().mT
        expected = param.double() - 0.5 * (factor.double() * x[0] - less)
        lowered = [CorrectedScales(*stack.scales[0], taken, factor)]
        backend.update_([param], stack.grads, lowered, keep=1.0, step=-0.5)
        near(param.double(), expected)

    @pytest.mark.parametrize("keyed", [False, True])
    def test_bfloat16_is_rounded_once(self, backend, keyed):
        stack, _ = stack_of((1, (), 263, 257), dtype=torch.bfloat16)
        lowered = [CorrectedScales(*stack.scales[0], self.taken(stack, 8)[0])]
        narrow = normal((263, 257), 1, torch.bfloat16)
        wide = narrow.float()
        keys = keys_of_step(7, torch.tensor(3), 1) if keyed else None
        backend.update_([narrow], stack.grads, lowered, keep=0.9, step=-0.1, keys=keys)
        backend.update_([wide], stack.grads, lowered, keep=0.9, step=-0.1)
        assert torch.equal(narrow, round_to_bfloat16(wide, keys[0]) if keyed else wide.bfloat16())

    def test_only_what_is_allowed_changes(self, backend):
        stack, _ = stack_of((3, (), 40, 24))
        lowered = [
            CorrectedScales(*own, away)
            for own, away in zip(stack.scales, self.taken(stack, 2), strict=True)
        ]
        params = [normal((40, 24), 70 + i) for i in range(3)]
        before = [param.clone() for param in params]
        allowed = [torch.tensor(i != 1) for i in range(3)]
        backend.update_(params, stack.grads, lowered, keep=0.9, step=-0.1, allowed=allowed)
        changed = [not torch.equal(*pair) for pair in zip(params, before, strict=True)]
        assert changed == [True, False, True]

    def test_scales_with_and_without_stand_beside_each_other(self, backend):
        stack, _ = stack_of((2, (), 40, 24))
        both = [stack.scales[0], CorrectedScales(*stack.scales[1], self.taken(stack, 2)[1])]
        together = [normal((40, 24), 70 + i) for i in range(2)]
        alone = [param.clone() for param in together]
        backend.update_(together, stack.grads, both, keep=0.9, step=-0.1)
        for i in range(2):
            backend.update_([alone[i]], [stack.grads[i]], [both[i]], keep=0.9, step=-0.1)
            assert torch.equal(alone[i], together[i])


@pytest.mark.parametrize("shape", [(40, 24), (300, 401), (1000, 100)])
def test_the_loops_share_large_matrices_and_agree_on_how_many_threads(shape):
    """Sums differ by what they are made of, and rows, which are each one thread's, do not."""
    stack, _ = stack_of((1, (), *shape))
    v = normal((1, shape[1], 8), 1).double()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        (rows,), (cols,) = CpuBackend().products([stack]).of_both([v])
        found.append((rows, cols))
    torch.set_num_threads(before)
    for rows, cols in found[1:]:
        assert torch.equal(rows, found[0][0])
        near(cols, found[0][1])
