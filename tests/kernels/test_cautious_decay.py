"""A cautious factor applies to entries that move toward zero, whatever the backend and the type."""

import pytest
import torch

from layouts import scattered, turned
from sinkgd.deflation import LowRank
from sinkgd.kernels import Cautious, CorrectedScales, Matrices, Scales
from sinkgd.kernels.rounding import keys_of_step

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

KEEP = 0.875
SHAPES = [(37, 53), (1, 19), (3, 8, 16), (140, 133)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = {"rows": torch.clone, "turned": turned, "scattered": scattered}

steps = pytest.mark.parametrize("step", [-0.25, 0.25], ids=["descent", "ascent"])


def normal(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_zeros(x):
    """Make a row, a column and a few more entries zero."""
    x[..., 1:2, :], x[..., :, -1] = 0, 0
    x.view(-1)[::7] = 0
    return x


def scales_of(shape, dtype=torch.float32):
    *batch, m, n = shape
    wide = torch.promote_types(dtype, torch.float32)
    return Scales(
        normal((*batch, m, 1), 50).exp().to(wide), normal((*batch, 1, n), 60).exp().to(wide)
    )


def moves_toward_zero(param, update, step):
    """Decide in float64, entry by entry: by signs alone, no product."""
    signs = zip(param.double().flatten().tolist(), update.flatten().tolist(), strict=True)
    ahead = 1 if step > 0 else -1
    found = [(w > 0 > ahead * x) or (w < 0 < ahead * x) for w, x in signs]
    return torch.tensor(found).view(param.shape)


def updated(backend, keep, param, grad, scales, step, **options):
    """Return a copy of a parameter after its update."""
    copy = param.clone()  # keeps the strides of dense tensors
    backend.update_([copy], [grad], [scales], keep=keep, step=step, **options)
    return copy


def check(backend, param, grad, scales, update, step, **options):
    """Compare with the updates whose factor is the same for all entries, and with float64."""
    given = (param, grad, scales, step)
    found = updated(backend, Cautious(KEEP), *given, **options)
    decayed, plain = (updated(backend, keep, *given, **options) for keep in (KEEP, 1.0))
    toward = moves_toward_zero(param, update, step)
    assert 0 < toward.sum() < toward.numel()
    assert torch.equal(found, torch.where(toward, decayed, plain))
    kept, moved = torch.where(toward, KEEP, 1.0) * param.double(), step * update
    units = 2 if "keys" in options else 1  # stochastic rounding goes up to a whole unit away
    eps, tiny = units * torch.finfo(param.dtype).eps / 2, torch.finfo(param.dtype).tiny
    error = (found.double() - (kept + moved)).abs()
    rounding = eps * (kept + moved).abs().clamp(min=tiny)
    assert (error <= 1e-6 * (kept.abs() + moved.abs()) + rounding).all()


@steps
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param_dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entries_that_move_toward_zero_decay_alone(
    backend, shape, param_dtype, dtype, layout, step
):
    param = layout(with_zeros(normal(shape, 1, param_dtype)))
    grad, scales = with_zeros(normal(shape, dtype=dtype)), scales_of(shape)
    update = grad.double() * scales.row.double() * scales.col.double()
    check(backend, param, grad, scales, update, step)


@steps
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_bits_do_not_depend_on_it(backend, shape, layout, step):
    param = layout(with_zeros(normal(shape, 1, torch.bfloat16)))
    grad, scales = with_zeros(normal(shape, dtype=torch.bfloat16)), scales_of(shape)
    update = grad.double() * scales.row.double() * scales.col.double()
    keys = list(keys_of_step(7, torch.tensor(3), 1))
    check(backend, param, grad, scales, update, step, keys=keys)


@steps
@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, turned], ids=["rows", "turned"])
@pytest.mark.parametrize("shape", [(37, 53), (2, 40, 24), (263, 257)], ids=str)
def test_the_direction_of_a_deflated_update_decides(
    backend, shape, layout, param_dtype, factor, step
):
    *batch, m, n = shape
    taken = LowRank(normal((*batch, m, 3), 30), normal((*batch, n, 3), 40))
    param, grad = layout(normal(shape, 1, param_dtype)), layout(normal(shape))
    scales = scales_of(shape)
    update = grad.double() * scales.row.double() * scales.col.double() * (factor or 1)
    update -= taken.left.double() @ taken.right.double().mT
    # Where both terms nearly cancel, the sign is that of rounding errors.
    unsure = update.abs() < 1e-4
    assert unsure.double().mean() < 1e-3
    param[unsure] = 0
    given = None if factor is None else torch.full((*batch, 1, 1), factor)
    corrected = CorrectedScales(*scales, taken, given)
    plain = updated(backend, 1.0, param, grad, corrected, step)
    found = updated(backend, Cautious(KEEP), param, grad, corrected, step)
    decayed = updated(backend, KEEP, param, grad, corrected, step)
    assert torch.equal(found, torch.where(moves_toward_zero(param, update, step), decayed, plain))


@steps
@pytest.mark.parametrize("keyed", [False, True])
def test_a_descent_is_the_scales_and_the_update(backend, keyed, step):
    grads = [normal((37, 53)), turned(normal((263, 257), 1)), normal((3, 8, 16), 2)]
    grads += [normal((40, 24), 3, torch.bfloat16), normal((12, 7), 4, torch.float64)]
    grads += [scattered(normal((64, 48), 5)), torch.zeros(5, 4), normal((128, 640), 6)]
    params = [normal(grad.shape, 100 + i, grad.dtype) for i, grad in enumerate(grads)]
    params[::3] = [param.bfloat16() for param in params[::3]]
    params[1::2] = [turned(param) for param in params[1::2]]
    keys = list(keys_of_step(3, torch.tensor(5), len(grads))) if keyed else None
    scales = backend.scales(grads, 3)
    expected = [param.clone() for param in params]
    backend.update_(expected, grads, scales, keep=Cautious(KEEP), step=step, keys=keys)
    matrices = Matrices(params, grads, [range(i, i + 1) for i in range(len(grads))], keys=keys)
    backend.descend_(matrices, 3, keep=Cautious(KEEP), step=step)
    assert all(torch.equal(*pair) for pair in zip(params, expected, strict=True))


@pytest.mark.parametrize("overflow", [None, torch.tensor(False), torch.tensor(True)], ids=str)
def test_what_must_not_be_written_is_not(backend, overflow):
    grads, params = [normal((9, 7), i) for i in range(2)], [normal((9, 7), 5 + i) for i in range(2)]
    before = [param.clone() for param in params]
    grads[1][3, 4] = torch.nan
    options = {} if overflow is None else {"overflow": overflow}
    matrices = Matrices(params, grads, [range(1), range(1, 2)])
    backend.descend_(matrices, 2, keep=Cautious(KEEP), step=-0.1, **options)
    assert torch.equal(params[1], before[1])
    assert torch.equal(params[0], before[0]) == (overflow is not None and bool(overflow))


def test_the_factor_may_be_a_tensor(backend):
    param, grad, scales = normal((37, 53), 1), normal((37, 53)), scales_of((37, 53))
    numbers = updated(backend, Cautious(0.5), param, grad, scales, -0.25)
    tensors = Cautious(torch.tensor(0.5)), param, grad, scales, torch.tensor(-0.25)
    assert torch.equal(updated(backend, *tensors), numbers)


def test_numbers_whose_product_vanishes_have_signs_all_the_same(backend):
    param, ones = (
        torch.tensor([[1e-30, -1e-30], [1e-30, -1e-30]]),
        Scales(torch.ones(2, 1), torch.ones(1, 2)),
    )
    grad = torch.tensor([[1e-30, 1e-30], [-1e-30, -1e-30]])
    found = updated(backend, Cautious(0.5), param, grad, ones, -(2.0**-10))
    assert (found.abs() > 0.6e-30).tolist() == [[False, True], [True, False]]


def test_a_factor_of_one_changes_no_bit(backend):
    param, grad, scales = normal((37, 53), 1), normal((37, 53)), scales_of((37, 53))
    one, other = (
        updated(backend, keep, param, grad, scales, -0.1) for keep in (1.0, Cautious(1.0))
    )
    assert torch.equal(one, other)
