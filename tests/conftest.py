"""What tests of every layer share: the backends, each in its turn."""

from collections.abc import Iterator

import pytest

from sinkgd.kernels import BACKENDS, registry


@pytest.fixture(scope="module", params=[backend.name for backend in BACKENDS])
def every_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make each backend that runs here the one that ``"auto"`` takes, in its turn."""
    first = next(backend for backend in BACKENDS if backend.name == request.param)
    if (reason := first.missing()) is not None:
        pytest.skip(f"backend {first.name!r}: {reason}")
    others = tuple(backend for backend in BACKENDS if backend is not first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "BACKENDS", (first, *others))
        yield first.name
