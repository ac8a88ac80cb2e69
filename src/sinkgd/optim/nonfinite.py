"""What happens to a gradient that contains NaN or infinity: it never reaches a weight.

Under every policy its parameter is left unchanged, and others are updated; a group of AdamW is left
unchanged as a whole, since one fused kernel writes all of it. A step returns a flag for each
gradient: whether it is finite. On a CPU the flags are read at the end of the step, and ``"raise"``
raises there. On an accelerator the host does not wait: the flags are copied to it, and the next
step raises. A step that ``torch.compile`` has compiled does the same. When a CUDA graph replays a
step, the flags are not read: the parameter is left unchanged, and no error is raised.

This file reads the flags and acts on them. They come from the scales of SR-Sinkhorn, which a
non-finite entry makes non-finite (``finite_of`` in ``kernels/backend.py``), and in other methods
from ``are_finite`` in ``optim/method.py``. The functions that write a weight or a state get a flag
as ``allowed`` and write nothing without it (``take_steps`` in ``kernels/backend.py``,
``UpdateWriter`` in ``optim/apply.py``).
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from sinkgd.optim.arguments import list_names

POLICIES = ("raise", "skip")


class NonFiniteGradientError(RuntimeError):
    """A gradient contains NaN or infinity; its parameter was left unchanged."""


class NonFiniteGuard:
    """Reads the flags of one optimizer's gradients; raises, or counts the updates skipped."""

    def __init__(self) -> None:
        self._skipped: Counter[str] = Counter()
        self._in_flight: list[_Flags] = []  # flags of this step
        self._earlier: list[_Flags] = []  # flags of earlier steps that have not been read

    def take(self, names: Sequence[str], flags: Tensor, policy: str) -> None:
        """Take the flags of parameters on one device: False if a gradient is not finite."""
        if flags.device.type == "cpu" or torch.compiler.is_compiling():
            self._in_flight.append(_Flags(names, flags, policy))
        elif not _capturing(flags.device):
            self._in_flight.append(_FlagsUnderWay(names, flags, policy))

    @_disable_dynamo  # torch.compiler.disable would import the compiler now
    def read_flags(self) -> None:
        """Read the flags of the previous step.

        Raises:
            NonFiniteGradientError: If the policy is ``"raise"`` and a gradient was non-finite.
        """
        # Waiting for a device while a CUDA graph captures its work would end the capture.
        later = [own for own in self._earlier if _capturing(own.device)]
        ready = [own for own in self._earlier if own not in later]
        self._earlier = later
        self._act_on(ready)

    def end_step(self) -> None:
        """Read flags on a CPU; leave those of an accelerator or a compiled step to the next step.

        Raises:
            NonFiniteGradientError: If the policy is ``"raise"`` and a gradient was non-finite.
        """
        flags, self._in_flight = self._in_flight, []
        if torch.compiler.is_compiling():
            self._earlier = self._earlier + flags
            return
        here = [own for own in flags if not isinstance(own, _FlagsUnderWay)]
        self._earlier += (own for own in flags if isinstance(own, _FlagsUnderWay))
        self._act_on(here)

    def skipped(self) -> dict[str, int]:
        """Return how often each parameter had a non-finite gradient under the policy ``"skip"``.

        Raises:
            NonFiniteGradientError: If flags that had not been read show such a gradient in a group
                with the policy ``"raise"``.
        """
        self.read_flags()
        return dict(self._skipped)

    def _act_on(self, arrived: Sequence["_Flags"]) -> None:
        fatal: list[str] = []
        for flags in arrived:
            bad = flags.bad()
            if flags.policy == "raise":
                fatal += bad
            else:
                self._skipped.update(bad)
        if fatal:
            raise NonFiniteGradientError(_message(fatal))


def _message(names: Sequence[str]) -> str:
    said = f"the gradients of {list_names(names)} hold NaN or infinity; these parameters were left"
    said += " unchanged"
    if len(names) == 1:
        said = f"the gradient of {names[0]} holds NaN or infinity; the parameter was left unchanged"
    return (
        f"{said}. Lower the learning rate, find the operation that causes it, or pass "
        'nonfinite="skip" to skip such updates and count them in skipped()'
    )


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Flags:
    """Flags of a step that have not been read."""

    def __init__(self, names: Sequence[str], flags: Tensor, policy: str) -> None:
        self.names, self.flags, self.policy = names, flags, policy
        self.device = flags.device

    def bad(self) -> list[str]:
        """Name the parameters whose gradient is not finite."""
        if bool(self.flags.all()):
            return []
        pairs = zip(self.names, self.flags.tolist(), strict=True)
        return [name for name, finite in pairs if not finite]


class _FlagsUnderWay(_Flags):
    """Flags that are being copied from a device to the host."""

    def __init__(self, names: Sequence[str], flags: Tensor, policy: str) -> None:
        host = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
        super().__init__(names, host.copy_(flags, non_blocking=True), policy)
        self.device = flags.device
        self._copied = torch.Event(flags.device)
        self._copied.record(torch.accelerator.current_stream(flags.device))

    def bad(self) -> list[str]:
        self._copied.synchronize()
        return super().bad()
