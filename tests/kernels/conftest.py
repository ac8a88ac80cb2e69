"""The backend under test."""

import pytest

from sinkgd.kernels import Backend, backends
from sinkgd.kernels.triton import launch


@pytest.fixture
def backend(every_backend: str) -> Backend:
    """Each backend that runs here, in turn."""
    return next(backend for backend in backends() if backend.name == every_backend)


@pytest.fixture
def launches(backend, monkeypatch):
    """The name of every kernel that is launched."""
    names, start = [], launch.launch

    def counted(kernel, *arguments, **options):
        names.append(kernel.__name__)
        start(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "launch", counted)
    return names
