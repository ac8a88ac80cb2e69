"""Starts compiled kernels by triton's launchers, past the dispatcher.

The dispatcher, ``JITFunction.run``, binds the arguments of every launch, finds out what they
specialize the kernel to, looks it up and calls its launcher. Here a `Variant` takes that way once;
later launches call the launcher alone, as the dispatcher does.

How it does is no public interface: triton 3.2 leaves the constants out, others pass them. So its
source is compared with `_CALLS`. Where it is none of them, `is_direct` warns once and every launch
goes through the dispatcher, as it does where a profiler has set a hook.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    "launch_metadata, {0}.launch_enter_hook, {0}.launch_exit_hook, *{1})"
)
# Whether the dispatcher passes constants, by how it calls the launcher.
_CALLS = {
    _LAUNCH.format("self.CompiledKernel", "non_constexpr_vals"): False,  # triton 3.2
    _LAUNCH.format("knobs.runtime", "bound_args.values()"): True,  # 3.6 and 3.9 at least
}
_INT32 = range(-(1 << 31), 1 << 31)


class Variant(NamedTuple):
    """A compiled kernel, ready to be launched on one device."""

    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[object, ...]  # what the launcher takes after the arguments


def is_direct() -> bool:
    """Whether launchers are called past the dispatcher; if not, a warning says so once."""
    return _passes_constants() is not None and not _is_hooked()


def specialization(kernel: Any, arguments: Sequence[object]) -> tuple[Hashable, ...]:
    """Return what a kernel is compiled for, of the arguments before its constants.

    It tells apart at least what triton does: types, pointers that are multiples of 16, and integers
    that need 64 bits or, where a kernel is specialized to them, are 1 or multiples of 16.
    """
    return tuple(
        class_of(argument, is_general=param.do_not_specialize)
        for argument, param in zip(arguments, kernel.params, strict=False)
    )


def class_of(argument: object, *, is_general: bool) -> Hashable:
    """Return what a kernel may be compiled for of one argument.

    Args:
        argument: A tensor or a number.
        is_general: Whether triton is told not to look at its value.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int) and not isinstance(argument, bool):
        width = argument in _INT32, argument < 1 << 63
        return width if is_general else (*width, argument == 1, argument % 16 == 0)
    return type(argument).__name__


def variant_of(kernel: Any, compiled: Any, constants: Mapping[str, object]) -> Variant:
    """Return a variant of ``kernel``, given what the dispatcher returned and was given by name."""
    names = [param.name for param in kernel.params if param.is_constexpr]
    assert names == [param.name for param in kernel.params][-len(names) :], "constants come last"
    tail = tuple(constants[name] for name in names) if _passes_constants() else ()
    return Variant(compiled.run, compiled.function, compiled.packed_metadata, tail)


def current_stream() -> int:
    """Return the handle of the stream on which the dispatcher would launch."""
    active = _driver().active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream


@cache
def _passes_constants() -> bool | None:
    """Whether launchers take a kernel's constants, too; None where that is not known."""
    jit = import_module("triton.runtime.jit")
    try:
        source = inspect.getsource(jit.JITFunction.run)
    except OSError:  # there is none
        source = ""
    source = re.sub(r"\s+", " ", source)
    found = [passes for call, passes in _CALLS.items() if call in source]
    if len(found) == 1:
        return found[0]
    warnings.warn(
        f"triton {import_module('triton').__version__} calls its launchers in a way that is not "
        "known here, so every launch goes through its dispatcher: results are the same, but a step "
        "takes the host longer. Use triton 3.6 or 3.9, or report the version",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _is_hooked() -> bool:
    """Whether somebody, such as triton's profiler, wants to know of launches."""
    hooks = _hooks()
    return _is_set(hooks.launch_enter_hook) or _is_set(hooks.launch_exit_hook)


@cache
def _driver() -> Any:
    return import_module("triton.runtime").driver


@cache
def _hooks() -> Any:
    if _passes_constants():
        return import_module("triton.knobs").runtime
    return import_module("triton.compiler").CompiledKernel


def _is_set(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))
