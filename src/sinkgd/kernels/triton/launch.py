"""Starts kernels: through triton's dispatcher, or directly if they were compiled before.

The dispatcher, ``JITFunction.run``, binds the arguments of every launch, finds out what they
specialize the kernel to, looks up the compiled kernel and calls its launcher. It is used once for
each `Variant`. Later, `launch` looks the variant up and calls the launcher itself, as the
dispatcher would; `PreparedLaunches` does not even look it up.

How the dispatcher calls a launcher is not a public interface: triton 3.2 leaves the constants out,
later versions pass them. So the dispatcher's source is compared with `_CALLS`. Unless exactly one
entry matches, `is_direct` warns once, and every launch goes through the dispatcher. Launches also
go through it if a profiler has set a hook.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The modules that need triton.
KERNEL_MODULES = (
    "primitives",
    "full_iteration",
    "square_sums",
    "update",
    "skinny_matmul",
)


@cache
def kernels(module: str) -> ModuleType:
    """Import one of `KERNEL_MODULES` at its first use: triton takes a while to import."""
    return import_module(f"sinkgd.kernels.triton.{module}")


def launch(kernel: Any, programs: int, *arguments: object, **constants: object) -> None:
    """Start ``programs`` programs of ``kernel`` on the current device.

    Args:
        kernel: A ``JITFunction``.
        programs: Number of programs.
        arguments: Tensors and numbers.
        constants: Compile-time constants and the compiler's options.
    """
    if kernels("primitives").IS_INTERPRETED or not is_direct():
        dispatch(kernel, programs, *arguments, **constants)
    else:
        start_variant(kernel, programs, arguments, constants)


def dispatch(kernel: Any, programs: int, *arguments: object, **constants: object) -> Any:
    """Start a kernel with the dispatcher, and return the compiled kernel."""
    return kernel[(programs,)](*arguments, **constants)


class GpuTarget(NamedTuple):
    """What compiler options depend on."""

    backend: str  # "cuda" or "hip"
    warp: int  # threads that run together


@cache
def target_of(device: torch.device) -> GpuTarget | None:
    """Return the target of a GPU; None for a CPU, where triton interprets kernels."""
    if device.type == "cpu":
        return None
    warp = getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    return GpuTarget("hip" if torch.version.hip else "cuda", warp)


def multiplies_tf32(target: GpuTarget | None) -> bool:
    """Whether a product of float32 matrices is computed as three products of tf32."""
    return target is None or target.backend == "cuda"


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current device, to which launches go; on a CPU, do nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class PreparedLaunch(NamedTuple):
    """One launch, without the arguments that change from step to step."""

    kernel: Any
    programs: int
    arguments: int  # index of a list passed to `start`; its content comes before `fixed`
    fixed: tuple[object, ...]  # the arguments after that list
    constants: Mapping[str, object]  # by name, with the compiler's options


class PreparedLaunches:
    """Launches that are prepared once and started, in order, in every step.

    The first launch of a variant goes through the dispatcher, which compiles it. Once all variants
    are known, nothing is looked up for a launch, and tensors are passed as addresses.
    """

    def __init__(self, launches: Sequence[PreparedLaunch]) -> None:
        self.launches = launches
        self._direct: dict[Hashable, list[_DirectLaunch]] = {}

    def start(self, arguments: Sequence[Sequence[object]]) -> None:
        """Start all launches.

        Args:
            arguments: The lists of tensors and numbers that launches refer to.
        """
        if kernels("primitives").IS_INTERPRETED or not is_direct():
            for one in self.launches:
                first = arguments[one.arguments]
                launch(one.kernel, one.programs, *first, *one.fixed, **one.constants)
            return
        key = tuple(argument_class(x, is_general=False) for some in arguments for x in some)
        direct = self._direct.get(key)
        if direct is None:
            self._direct[key] = [self._first(one, arguments) for one in self.launches]
            return
        stream = _current_stream()
        plain = [_without_tensors(some) for some in arguments]
        for (run, function, metadata, constants), programs, index, fixed in direct:
            run(
                programs, 1, 1, stream, function, metadata, None, None, None,
                *plain[index], *fixed, *constants,
            )  # fmt: skip

    def _first(self, one: PreparedLaunch, given: Sequence[Sequence[object]]) -> "_DirectLaunch":
        """Start a launch, and return how to start it again."""
        arguments = (*given[one.arguments], *one.fixed)
        variant = start_variant(one.kernel, one.programs, arguments, one.constants)
        return variant, one.programs, one.arguments, one.fixed


class Variant(NamedTuple):
    """A compiled kernel, ready to be launched on one device."""

    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[object, ...]  # what the launcher takes after the arguments


# A variant, the number of programs, the index of its list of arguments, and the fixed arguments.
_DirectLaunch = tuple[Variant, int, int, tuple[object, ...]]

_variants: dict[Hashable, Variant] = {}  # by kernel, device, constants and specialization


def start_variant(
    kernel: Any, programs: int, arguments: Sequence[object], constants: Mapping[str, object]
) -> Variant:
    """Start a kernel directly, or with the dispatcher if it must be compiled; return the variant.

    The arguments are those of `launch`.
    """
    device = _driver().active.get_current_device()
    key = id(kernel), device, tuple(constants.items()), specialization(kernel, arguments)
    variant = _variants.get(key)
    if variant is None:
        compiled = dispatch(kernel, programs, *arguments, **constants)
        variant = _variants[key] = _variant_of(kernel, compiled, constants)
    else:
        run, function, metadata, compiled_in = variant
        run(
            programs, 1, 1, _current_stream(), function, metadata, None, None, None,
            *_without_tensors(arguments), *compiled_in,
        )  # fmt: skip
    return variant


def specialization(kernel: Any, arguments: Sequence[object]) -> tuple[Hashable, ...]:
    """Return the properties of the arguments for which triton compiles a variant of a kernel.

    They distinguish at least what triton distinguishes: types, pointers that are multiples of 16,
    and integers that need 64 bits. If a kernel is specialized to an integer, they also distinguish
    1 and multiples of 16. Compile-time constants are not included.
    """
    return tuple(
        argument_class(argument, is_general=param.do_not_specialize)
        for argument, param in zip(arguments, kernel.params, strict=False)
    )


def argument_class(argument: object, *, is_general: bool) -> Hashable:
    """Return the properties of one argument for which triton may compile a variant.

    Args:
        argument: A tensor or a number.
        is_general: Whether triton is told not to specialize the kernel to the argument's value.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int) and not isinstance(argument, bool):
        width = argument in _INT32, argument < 1 << 63
        return width if is_general else (*width, argument == 1, argument % 16 == 0)
    return type(argument).__name__


_INT32 = range(-(1 << 31), 1 << 31)


def _without_tensors(arguments: Sequence[object]) -> tuple[object, ...]:
    """Replace tensors by their addresses, so that the launcher need not ask for them."""
    return tuple([x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def _variant_of(kernel: Any, compiled: Any, constants: Mapping[str, object]) -> Variant:
    """Return a variant of ``kernel``.

    Args:
        kernel: The kernel as written, a ``JITFunction``.
        compiled: The compiled kernel, which the dispatcher returned.
        constants: The keyword arguments of the launch that returned it.
    """
    names = [param.name for param in kernel.params if param.is_constexpr]
    others = [param.name for param in kernel.params if not param.is_constexpr]
    assert [*others, *names] == [param.name for param in kernel.params], "constants come last"
    tail = tuple(constants[name] for name in names) if _passes_constants() else ()
    return Variant(compiled.run, compiled.function, compiled.packed_metadata, tail)


def _current_stream() -> int:
    """Return the handle of the stream on which the dispatcher would launch."""
    active = _driver().active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream


@cache
def _driver() -> Any:
    return import_module("triton.runtime").driver


def is_direct() -> bool:
    """Whether launchers are called directly. If it is not known how, a warning says so once."""
    return _passes_constants() is not None and not _is_hooked()


_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    "launch_metadata, {0}.launch_enter_hook, {0}.launch_exit_hook, *{1})"
)
# How the dispatcher calls the launcher: whether it passes the kernel's constants.
_CALLS = {
    _LAUNCH.format("self.CompiledKernel", "non_constexpr_vals"): False,  # triton 3.2
    _LAUNCH.format("knobs.runtime", "bound_args.values()"): True,  # 3.6, 3.7 and 3.9
}


@cache
def _passes_constants() -> bool | None:
    """Whether launchers take a kernel's constants, too; None if that is not known."""
    jit = import_module("triton.runtime.jit")
    try:
        source = inspect.getsource(jit.JITFunction.run)
    except OSError:  # the source is not available
        source = ""
    source = re.sub(r"\s+", " ", source)
    found = [passes for call, passes in _CALLS.items() if call in source]
    if len(found) == 1:
        return found[0]
    warnings.warn(
        f"triton {import_module('triton').__version__} calls its launchers in a way that is not "
        "known here, so every launch goes through its dispatcher: results are the same, but a step "
        "takes the host longer. Use triton 3.6, 3.7 or 3.9, or report the version",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _is_hooked() -> bool:
    """Whether somebody, such as triton's profiler, listens to launches."""
    hooks = _hooks()
    return _is_set(hooks.launch_enter_hook) or _is_set(hooks.launch_exit_hook)


@cache
def _hooks() -> Any:
    if _passes_constants():
        return import_module("triton.knobs").runtime
    return import_module("triton.compiler").CompiledKernel


def _is_set(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))
