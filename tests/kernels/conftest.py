"""The backend under test."""

import pytest

from sinkgd.kernels import BACKENDS, Backend


@pytest.fixture
def backend(every_backend: str) -> Backend:
    """Each backend that runs here, in turn."""
    return next(backend for backend in BACKENDS if backend.name == every_backend)
