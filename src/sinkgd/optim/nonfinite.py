"""What happens to a gradient that holds NaN or infinity: it never reaches a weight.

On a CPU the flags are read at once, before anything is written: ``"raise"`` leaves every parameter
as it was. On an accelerator nothing waits: the flags stay on the device, where they keep the
parameter as it is; a copy travels to the host, and the error comes with the next step. So it is in
a step that ``torch.compile`` has compiled, which cannot stop half-way; and in one that a CUDA graph
replays, but there nobody reads the flags, so only the parameters are kept from harm.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

POLICIES = ("raise", "skip")


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or infinity; its parameter was left as it was."""


class NonFiniteGuard:
    """Follows the flags of one optimizer, and counts what it skipped."""

    def __init__(self) -> None:
        self._skipped: Counter[str] = Counter()
        self._in_flight: list[_Flags] = []

    def all_finite(self, names: Sequence[str], flags: Tensor, policy: str) -> bool:
        """Take the flags of some parameters on one device; return whether all are known to be True.

        Raises:
            NonFiniteGradientError: At once, if the policy is ``"raise"`` and the flags of a
                non-finite gradient are on a CPU.
        """
        if torch.compiler.is_compiling():
            self._in_flight.append(_Flags(names, flags, policy))
        elif flags.device.type == "cpu":
            self._settle(names, flags, policy)
            return bool(flags.all())
        elif not (flags.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._in_flight.append(_FlagsUnderWay(names, flags, policy))
        return False

    @_disable_dynamo  # as torch.compiler.disable, which would import the compiler at once
    def settle(self) -> None:
        """Read the flags of the step before, which a device has long since computed.

        Raises:
            NonFiniteGradientError: If the policy is ``"raise"`` and a gradient was non-finite.
        """
        in_flight, self._in_flight = self._in_flight, []
        for flags in in_flight:
            self._settle(flags.names, flags.on_host(), flags.policy)

    def skipped(self) -> dict[str, int]:
        """Return how many updates of each parameter were skipped so far."""
        self.settle()
        return dict(self._skipped)

    def _settle(self, names: Sequence[str], flags: Tensor, policy: str) -> None:
        if bool(flags.all()):
            return
        bad = [name for name, finite in zip(names, flags.tolist(), strict=True) if not finite]
        if policy == "raise":
            raise NonFiniteGradientError(
                f"the gradient of {', '.join(bad)} holds NaN or infinity; the parameter was left "
                "as it was. Lower the learning rate or find the operation, or pass "
                'nonfinite="skip" to leave out such updates and count them in skipped()'
            )
        self._skipped.update(bad)


class _Flags:
    """Flags of a step that nobody has looked at."""

    def __init__(self, names: Sequence[str], flags: Tensor, policy: str) -> None:
        self.names, self.flags, self.policy = names, flags, policy

    def on_host(self) -> Tensor:
        return self.flags


class _FlagsUnderWay(_Flags):
    """Flags on their way from a device to the host."""

    def __init__(self, names: Sequence[str], flags: Tensor, policy: str) -> None:
        host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
        super().__init__(names, host.copy_(flags, non_blocking=True), policy)
        self._copied = torch.Event(flags.device.type)
        self._copied.record()

    def on_host(self) -> Tensor:
        self._copied.synchronize()
        return self.flags
