"""Projections that reuse memory: they need little of it, and nobody else's is written to."""

import pytest
import torch
from torch.testing import assert_close

from allocations import peak_bytes
from norm_cases import NORMS
from sinkgd import (
    ColumnNorm,
    DeflatedNorm,
    RowNorm,
    SpectralNorm,
    multi_normalize,
    residuals,
)

LISTS = {
    **{name: [norm] for name, norm in NORMS.items()},
    "row-column": [RowNorm(), ColumnNorm()],
    "row-spectral": [RowNorm(), SpectralNorm()],
    "all": list(NORMS.values()),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
every_list = pytest.mark.parametrize("norms", LISTS.values(), ids=LISTS)
# from square to oblong; the spectral norm takes another way where one side is twice the other
shapes = pytest.mark.parametrize("shape", [(2, 96, 96), (64, 100), (160, 64), (32, 320)], ids=str)
transposed = pytest.mark.parametrize("transposed", [False, True])


def normal(shape, transposed=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.mT.contiguous().mT if transposed else x


def allowance(x, norms):
    """One matrix beside the result, two with a spectral norm, and a few vectors, in bytes."""
    matrices = 3 if any(isinstance(norm, SpectralNorm | DeflatedNorm) for norm in norms) else 2
    directions = sum(norm.rank for norm in norms if isinstance(norm, DeflatedNorm))
    vectors = (6 + 8 * directions) * x.numel() // min(x.shape[-2:])
    return 4 * (matrices * x.numel() + vectors)


class Unchanged:
    """A user's norm that returns its argument, in another order of memory every other time."""

    def __init__(self):
        self.given, self.copies = [], []

    def project(self, x):
        self.given.append(x)
        self.copies.append(x.clone())
        return x.mT.contiguous().mT if len(self.given) % 2 else x


class HalfRowNorm(RowNorm):
    """Rows of half the length."""

    def project(self, x):
        return super().project(x) / 2


class TestScratch:
    @every_norm
    @shapes
    @transposed
    def test_of_a_projection_is_one_matrix_and_of_the_spectral_norm_two(
        self, norm, shape, transposed
    ):
        x = normal(shape, transposed)
        assert peak_bytes(lambda: norm.project(x)) <= allowance(x, [norm])

    @every_list
    @shapes
    @transposed
    def test_of_many_projections_is_that_of_one(self, norms, shape, transposed):
        x = normal(shape, transposed)
        assert peak_bytes(lambda: multi_normalize(x, norms, 2)) <= allowance(x, norms)

    @every_list
    @shapes
    def test_of_narrow_types_is_that_of_float32(self, norms, shape):
        x = normal(shape).bfloat16()
        bound = allowance(x, norms) + x.nbytes  # the result, rounded
        assert peak_bytes(lambda: multi_normalize(x, norms, 2)) <= bound


class TestOthersMemory:
    def test_what_a_norm_of_the_user_was_given_is_not_written_to(self):
        norm = Unchanged()
        multi_normalize(normal((7, 7)), [RowNorm(), norm, ColumnNorm(), norm, SpectralNorm()], 3)
        assert len(norm.given) == 6
        assert all(map(torch.equal, norm.given, norm.copies))

    @shapes
    @transposed
    def test_norms_of_the_user_may_stand_anywhere(self, shape, transposed):
        grad = normal(shape, transposed)
        norms = [RowNorm(), Unchanged(), Unchanged(), ColumnNorm(), SpectralNorm(), HalfRowNorm()]
        expected = grad
        for _ in range(3):
            for norm in norms:
                expected = norm.project(expected)
        # the orders of memory differ, and so the order of sums
        assert_close(multi_normalize(grad, norms, 3), expected, rtol=1e-4, atol=1e-5)

    def test_a_subclass_is_projected_on_by_its_own_method(self):
        grad = normal((7, 11))
        assert torch.equal(multi_normalize(grad, [HalfRowNorm()], 1), HalfRowNorm().project(grad))

    @every_list
    @transposed
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_the_gradient_is_only_read(self, norms, transposed, dtype):
        grad = normal((2, 6, 14), transposed).to(dtype)
        before = grad.clone()
        multi_normalize(grad, norms, 3)
        assert torch.equal(grad, before)


@every_list
@shapes
def test_what_lay_in_new_memory_does_not_matter(norms, shape):
    expected = multi_normalize(normal(shape), norms, 2)
    torch.use_deterministic_algorithms(True)  # new memory then holds NaN
    try:
        assert torch.equal(multi_normalize(normal(shape), norms, 2), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@every_list
def test_a_parameter_is_normalized_without_its_history(norms):
    weight = torch.nn.Parameter(normal((5, 7)))
    assert torch.equal(multi_normalize(weight, norms), multi_normalize(weight.detach(), norms))
    assert not multi_normalize(weight, norms).requires_grad
    assert not any(norm.project(weight).requires_grad for norm in norms)
    assert not any(residual.requires_grad for residual in residuals(weight, norms))


@every_list
@shapes
@transposed
def test_the_update_has_the_order_of_memory_of_the_gradient(norms, shape, transposed):
    update = multi_normalize(normal(shape, transposed), norms, 2)
    assert (update.mT if transposed else update).is_contiguous()


@every_list
@transposed
def test_a_batch_in_any_order_of_memory_is_a_batch(norms, transposed):
    x = normal((3, 4, 6, 14), transposed).transpose(0, 1)  # no flat view of the batch
    expected = torch.stack([multi_normalize(matrix, norms) for matrix in x.flatten(0, 1)])
    assert_close(multi_normalize(x, norms), expected.view_as(x), rtol=1e-4, atol=1e-5)
