"""Every backend finds NaN and infinity wherever they are, and nothing else."""

import pytest
import torch

BAD = [torch.nan, torch.inf, -torch.inf]
# one entry, less than a vector, whole vectors, more than four, more than a thread's block
SIZES = [1, 7, 16, 64, 77, 200_003]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_numbers_are_finite_however_large_or_small(backend, dtype):
    limits = torch.finfo(dtype)
    extremes = torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0, 1.0], dtype=dtype)
    tensors = [extremes.repeat(size)[:size].clone() for size in SIZES]
    assert backend.are_finite(tensors).tolist() == [True] * len(SIZES)


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bad_entry_anywhere_is_found_and_in_that_tensor_alone(backend, bad, dtype):
    for size in SIZES:
        for place in {0, size // 2, size - 1}:
            tensors = [torch.ones(size, dtype=dtype) for _ in range(3)]
            tensors[1][place] = bad
            assert backend.are_finite(tensors).tolist() == [True, False, True]


def test_strides_do_not_hide_it(backend):
    wide = torch.ones(40, 60)
    wide[30, 50] = torch.nan
    views = [wide.t(), wide[:, :50], wide[:, 50:], wide[::2], wide[1::2], wide.view(4, 10, 60)]
    assert backend.are_finite(views).tolist() == [False, True, False, False, True, False]


def test_many_tensors_are_told_apart(backend):
    tensors = [torch.ones(16, 16) for _ in range(300)]
    for i in range(0, 300, 7):
        tensors[i][3, 4] = torch.inf
    assert backend.are_finite(tensors).tolist() == [i % 7 != 0 for i in range(300)]
