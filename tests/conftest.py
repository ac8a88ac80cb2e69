"""What tests of every layer share: the backends, each in its turn."""

import gc
import importlib
import math
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from sinkgd.kernels import backends, registry
from sinkgd.kernels.cpu import CpuBackend
from sinkgd.kernels.cpu import launch as cpu_launch
from sinkgd.kernels.triton import launch

LARGE = 1 << 15  # entries: many programs
# Hundreds of iterations, or a dozen matrices twice.
LONG = (
    "test_both_norms_hold_at_the_fixed_point",
    "test_the_fixed_point_stays",
    "test_it_is_the_scales_and_the_update",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the CPU loops once: other workers, and ranks that they start, then read them.

    Now, for the search for doctests imports their modules, and each worker would compile its own.
    """
    starts_workers = session.config.getoption("numprocesses", None) and not hasattr(
        session.config, "workerinput"
    )
    if not starts_workers and CpuBackend().missing() is None:
        with FileLock(cpu_launch.cache_folder() / "tests.lock"):
            cpu_launch.compile_loops()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out repetitions in triton's interpreter, and slow tests where ``-m`` names none."""
    repeated = {item for item in items if isinstance(item, pytest.Function) and _repeats(item)}
    if repeated:
        config.hook.pytest_deselected(items=list(repeated))
        items[:] = [item for item in items if item not in repeated]
    if "slow" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; `make test-slow` runs it"))


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from twenty thousand collected tests, which never go."""
    gc.collect()
    gc.freeze()


def _repeats(item: pytest.Function) -> bool:
    """Whether a large matrix or a long run is tried with more than the first of its variations.

    The interpreter is slow; every claim is tested there, once.
    """
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return False
    if "triton" not in (callspec.params.get("backend"), callspec.params.get("every_backend")):
        return False
    variations = dict(callspec.indices)
    long = item.originalname in LONG
    for name in ("backend", "every_backend", "threads", *(() if long else ("shape",))):
        variations.pop(name, None)
    layout = variations.pop("layout", 0)  # contiguous, turned, ..., and one that is copied
    others = any(variations.values())
    if long or math.prod(callspec.params.get("shape", ())) > LARGE:
        return others or layout > 1
    return others and layout > 3


def _patches_once(patch: Callable[[Any], Any], runtime: ModuleType) -> Callable[[Any], Any]:
    """Return ``patch``, which prepares triton's language for a function, without repetitions.

    A launch patches the language for its kernel. Triton would do so again wherever the kernel calls
    a function, which takes 40% of the time.
    """
    language = runtime.tl

    def patch_if_needed(function: Any) -> Any:
        names = function.__globals__.values()
        modules = [value for value in names if value is language or value is language.core]
        if any(language.core.is_builtin(module.load) for module in modules):
            return patch(function)
        return runtime._LangPatchScope()  # restores nothing

    return patch_if_needed


@pytest.fixture(scope="session")
def interpreter() -> Iterator[None]:
    """Run the kernels of the backend ``triton`` on CPU tensors, in triton's interpreter.

    They are imported anew, as triton decides then; in this process they are no longer compiled.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in launch.KERNEL_MODULES:
            sys.modules.pop(f"sinkgd.kernels.triton.{module}", None)
        launch.kernels.cache_clear()
        for module in launch.KERNEL_MODULES:
            launch.kernels(module)
        importlib.import_module("triton.experimental.gluon")  # at the first launch it is too late
    started = launch.launch

    def start(*args: object, **options: object) -> None:
        with np.errstate(all="ignore"):  # the interpreter's numbers are numpy's, which warns of NaN
            started(*args, **options)

    runtime = importlib.import_module("triton.runtime.interpreter")
    with pytest.MonkeyPatch.context() as patch:
        # A third of its time goes into looking for sums that overflow; a test of the result knows.
        options = runtime.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(runtime.interpreter_builder, "options", options)
        patch.setattr(runtime, "_patch_lang", _patches_once(runtime._patch_lang, runtime))
        patch.setattr(launch, "launch", start)
        yield


@pytest.fixture(scope="module", params=[backend.name for backend in backends()])
def every_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make each backend that runs here the one that ``"auto"`` takes, in its turn."""
    first = next(backend for backend in backends() if backend.name == request.param)
    if (reason := first.missing()) is not None:
        pytest.skip(f"backend {first.name!r}: {reason}")
    if first.name == "triton":
        request.getfixturevalue("interpreter")
    others = tuple(backend for backend in backends() if backend is not first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "backends", lambda: (first, *others))
        patch.setattr(registry, "ONLY_BY_NAME", frozenset())
        yield first.name


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill whatever is allocated with NaN, so that nothing unwritten is read or returned."""
    monkeypatch.setattr(cpu_launch, "_local", threading.local())
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
