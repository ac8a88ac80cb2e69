"""Launches that are prepared once and started in every step."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkgd.kernels.triton import launch, launcher
from sinkgd.kernels.triton.launcher import Variant

# A variant, the number of programs, the list of arguments that comes first, and those that follow.
_Flat = tuple[Variant, int, int, tuple[object, ...]]

# By kernel, device, constants and specialization.
_variants: dict[Hashable, Variant] = {}


class Launch(NamedTuple):
    """One launch, but for what changes from step to step."""

    kernel: Any
    programs: int
    given: int  # which of the lists of arguments that a step gives comes first
    settled: tuple[object, ...]  # arguments that follow
    constants: Mapping[str, object]  # by name, with the compiler's options


class Launches:
    """Launches in their order.

    Of a variant the first launch goes through triton's dispatcher, which compiles it. Once all
    variants are known nothing is looked up for a launch, and its arguments are integers.
    """

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self.launches, self.device = launches, device
        self._flat: dict[Hashable, list[_Flat]] = {}

    def start(self, given: Sequence[Sequence[object]]) -> None:
        """Start all launches.

        Args:
            given: Lists of arguments, tensors or numbers: those that launches refer to.
        """
        if launch.primitives().IS_INTERPRETED or not launcher.is_direct():
            for one in self.launches:
                launch.launch(
                    one.kernel, one.programs, *given[one.given], *one.settled, **one.constants
                )
            return
        kinds = tuple(launcher.class_of(x, is_general=False) for some in given for x in some)
        flat = self._flat.get(kinds)
        if flat is None:
            self._flat[kinds] = [self._first(one, given[one.given]) for one in self.launches]
            return
        stream = launcher.current_stream()
        plain = [_plain(arguments) for arguments in given]
        for (run, function, metadata, constants), programs, place, settled in flat:
            run(
                programs, 1, 1, stream, function, metadata, None, None, None,
                *plain[place], *settled, *constants,
            )  # fmt: skip

    def _first(self, one: Launch, given: Sequence[object]) -> _Flat:
        """Start a launch, and return how to start it again."""
        arguments = (*given, *one.settled)
        specialization = launcher.specialization(one.kernel, arguments)
        key = id(one.kernel), self.device, tuple(one.constants.items()), specialization
        variant = _variants.get(key)
        if variant is None:
            compiled = launch.launch(one.kernel, one.programs, *arguments, **one.constants)
            variant = _variants[key] = launcher.variant_of(one.kernel, compiled, one.constants)
        else:
            run, function, metadata, constants = variant
            run(
                one.programs, 1, 1, launcher.current_stream(), function, metadata, None, None, None,
                *_plain(arguments), *constants,
            )  # fmt: skip
        return variant, one.programs, one.given, one.settled


def _plain(arguments: Sequence[object]) -> tuple[object, ...]:
    """Return arguments with addresses in place of tensors, which the launcher would ask for."""
    return tuple([x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])
