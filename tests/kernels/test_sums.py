"""Every backend sums weighted squares as float64 does, for shards of any size and shape."""

import pytest
import torch
from torch.testing import assert_close

from layouts import scattered, turned
from sinkgd.kernels import backends
from sinkgd.kernels.triton import launch

# Up to 1,100 terms, none negative, in 16 lanes or more: 70 roundings of 2^-24.
FLOAT32 = {"rtol": 4.2e-6, "atol": 0}


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


HOLES = normal((9, 20), 7)
HOLES[3] = 0
HOLES[:, 11] = 0
GRADS = [
    normal((37, 53), 0),
    turned(normal((1100, 40), 1)),
    normal((1100, 40), 2),
    normal((1, 19), 3),
    normal((19, 1), 4),
    normal((3, 8, 16), 5),
    turned(normal((3, 8, 16), 5)),
    scattered(normal((64, 48), 6)),
    HOLES,
    normal((40, 24), 8, torch.bfloat16),
    normal((40, 24), 9, torch.float16),
    normal((12, 7), 10, torch.float64),
    1e-30 * normal((67, 31), 11),
    1e30 * normal((67, 31), 12),
    normal((30, 20), 13) * torch.logspace(-18, 12, 30)[:, None],
    torch.zeros(5, 4),
    torch.empty(0, 7),
    torch.empty(7, 0),
    torch.empty(2, 0, 7),
]


def weights(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    flat = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return torch.cat([x.flatten() for x in flat]), flat


def of_rows(grads, seed=0):
    return weights([(*grad.shape[:-2], 1, grad.shape[-1]) for grad in grads], seed)


def of_cols(grads, seed=0):
    return weights([(*grad.shape[:-1], 1) for grad in grads], seed)


def flat(parts):
    return torch.cat([part.flatten() for part in parts])


def test_rows_and_columns_are_added_up(backend):
    sums = backend.sums(GRADS)
    for seed in range(3):  # again and again
        given, parts = of_rows(GRADS, seed)
        expected = [(grad.double() ** 2 * w).sum(-1) for grad, w in zip(GRADS, parts, strict=True)]
        assert_close(sums.of_rows(given), flat(expected), **FLOAT32)
        given, parts = of_cols(GRADS, seed)
        expected = [(grad.double() ** 2 * w).sum(-2) for grad, w in zip(GRADS, parts, strict=True)]
        assert_close(sums.of_cols(given), flat(expected), **FLOAT32)


@pytest.mark.parametrize("size", [1e-60, 1e-30, 1e30, 1e60])
def test_weights_may_be_of_any_size(backend, size):
    grads = GRADS[:9]
    given, parts = of_rows(grads)
    expected = [(g.double() ** 2 * size * w).sum(-1) for g, w in zip(grads, parts, strict=True)]
    assert_close(backend.sums(grads).of_rows(size * given), flat(expected), **FLOAT32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("order", [torch.clone, turned])
def test_what_is_not_finite_shows_in_its_row_and_column_alone(backend, bad, order):
    grads = [normal((40, 24), seed) for seed in range(3)]
    grads[1][17, 5] = bad
    grads[1] = order(grads[1])
    sums = backend.sums(grads)
    rows = sums.of_rows(of_rows(grads)[0]).view(3, 40)
    cols = sums.of_cols(of_cols(grads)[0]).view(3, 24)
    assert not rows[1, 17].isfinite()
    assert not cols[1, 5].isfinite()
    assert rows[[0, 2]].isfinite().all()
    assert cols[[0, 2]].isfinite().all()


def test_bits_do_not_depend_on_company_or_threads(backend, request):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    grads = GRADS[:9]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(backend.sums(grads).of_cols(of_cols(grads)[0]))
    parts = torch.split(of_cols(grads)[0], [grad.shape[:-1].numel() for grad in grads])
    alone = [backend.sums([g]).of_cols(own) for g, own in zip(grads, parts, strict=True)]
    if backend.name == "cpu":  # the others' sums are torch's
        assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], torch.cat(alone))


def test_a_call_is_a_launch_for_each_kind(interpreter, monkeypatch):
    """However many gradients there are; zeros, tiny and huge entries are no kind of their own."""
    launches = []
    started = launch.launch

    def count(kernel, *arguments, **constants):
        launches.append(kernel.__name__)
        started(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "launch", count)
    (triton,) = (backend for backend in backends() if backend.name == "triton")
    grads = [normal((8, 16), i) * 10.0 ** (10 * i - 30) for i in range(7)] + [torch.zeros(4, 8)]
    sums = triton.sums(grads)
    sums.of_rows(of_rows(grads)[0])
    sums.of_cols(of_cols(grads)[0])
    assert launches == ["weighted_square_sums"] * 2
