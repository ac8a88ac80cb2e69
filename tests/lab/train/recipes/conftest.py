"""One thread: the matrices are tiny."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_same_threads):
    torch.set_num_threads(1)
