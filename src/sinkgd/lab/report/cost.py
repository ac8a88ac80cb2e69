"""The cost of a training run: hours, money and energy, and the devices that its memory needs.

Letters, everywhere in this file:
    N: number of parameters
    T: number of training tokens
    v: tokens per second of one GPU
    G: number of GPUs

`cost.js` has the same formulas for the browser; a test compares the results.
"""

import math
from dataclasses import dataclass

_SECONDS = 3600  # seconds in an hour
_FLOPS_PER_WEIGHT = 6  # operations per weight and token: two in forward, four in backward
_BFLOAT16 = 2  # bytes per number of weights, gradients and state, as in GaLore's benchmark
USABLE = 0.9  # fraction of a device's memory that training may use, as in `sinkgd plan`


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run.

    Raises:
        ValueError: If there is no GPU, or a figure is negative or not finite.
    """

    gpus: int
    price: float  # USD per GPU and hour
    watts: float  # per GPU

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus is {self.gpus}; give at least 1")
        for name in ("price", "watts"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; give a finite number that is not negative")


@dataclass(frozen=True)
class StateRule:
    """The size of a method's optimizer state, in numbers per parameter."""

    method: str
    inside: int  # per parameter of a hidden matrix
    outside: int  # per other parameter: embeddings, head, norms

    def memory_bytes(self, parameters: float, matrix_share: float) -> float:
        r"""Return the bytes of weights, gradients and state, without activations.

        .. math:: 2 N (2 + a s + b (1 - s))

        with a and b the numbers inside and outside, and s the share of the parameters that are in
        hidden matrices.

        Args:
            parameters: N.
            matrix_share: s, from 0 to 1.

        Raises:
            ValueError: If ``parameters`` is not positive and finite, or the share is not between 0
                and 1.

        Examples:
            >>> StateRule("AdamW", 2, 2).memory_bytes(1e9, 0.8)
            8000000000.0
        """
        _check_positive(parameters=parameters)
        if not 0 <= matrix_share <= 1:
            raise ValueError(f"matrix_share is {matrix_share}; give a number from 0 to 1")
        kept = self.inside * matrix_share + self.outside * (1 - matrix_share)
        return _BFLOAT16 * parameters * (2 + kept)


STATE_RULES = (
    StateRule("AdamW", 2, 2),
    StateRule("Muon", 1, 2),
    StateRule("SinkGD", 0, 2),
    StateRule("SinkGD, stateless", 0, 0),
)


def devices_needed(total_bytes: float, device_bytes: float) -> int:
    """Return the fewest devices that hold ``total_bytes`` in equal shards.

    Args:
        total_bytes: Bytes of weights, gradients and state.
        device_bytes: Memory of a device, of which training may use nine tenths.

    Raises:
        ValueError: If an argument is not positive and finite.

    Examples:
        >>> devices_needed(145e9, 80e9)
        3
    """
    _check_positive(total_bytes=total_bytes, device_bytes=device_bytes)
    return math.ceil(total_bytes / (USABLE * device_bytes))


@dataclass(frozen=True)
class Cost:
    """The cost of a run."""

    hours: float
    gpu_hours: float
    usd: float
    kwh: float


@dataclass(frozen=True)
class Change:
    """The change from the baseline to another method.

    Raises:
        ValueError: If a factor is not positive and finite.
    """

    token_fraction: float  # tokens to the same loss, relative to the baseline
    step_speedup: float  # tokens per second, relative to the baseline

    def __post_init__(self) -> None:
        _check_positive(token_fraction=self.token_fraction, step_speedup=self.step_speedup)


def assumed_speed(flops: float, mfu: float, parameters: float) -> float:
    r"""Return the tokens per second of a GPU at a given MFU.

    .. math:: v = \mathrm{mfu} \cdot \mathrm{flops} / (6 N)

    Args:
        flops: Peak FLOP/s of the GPU.
        mfu: Model FLOPs utilization: the fraction of the peak that a step reaches.
        parameters: N.

    Raises:
        ValueError: If an argument is not positive and finite, or ``mfu`` is above 1.

    Examples:
        >>> assumed_speed(600e12, 0.5, 1e9)
        50000.0
    """
    _check_positive(flops=flops, mfu=mfu, parameters=parameters)
    if mfu > 1:
        raise ValueError(f"mfu is {mfu}; it is a fraction of the peak: give at most 1")
    return mfu * flops / (_FLOPS_PER_WEIGHT * parameters)


def gpu_hours(tokens: float, speed: float) -> float:
    r"""Return the hours of one GPU, :math:`T / (3600 v)`.

    Args:
        tokens: T.
        speed: v, tokens per second of one GPU.

    Raises:
        ValueError: If an argument is not positive and finite.

    Examples:
        >>> gpu_hours(7.2e9, 1000.0)
        2000.0
    """
    _check_positive(tokens=tokens, speed=speed)
    return tokens / (_SECONDS * speed)


def run_cost(machine: Machine, tokens: float, speed: float) -> Cost:
    r"""Return the cost of a run.

    With :math:`h = T / (3600 v)` GPU-hours, the run lasts :math:`h / G` hours and costs
    :math:`h \cdot \mathrm{price}` USD and :math:`h \cdot \mathrm{watts} / 1000` kWh.

    Args:
        machine: G GPUs, their price and power.
        tokens: T.
        speed: v, tokens per second of one GPU.

    Raises:
        ValueError: If tokens or speed are not positive and finite.

    Examples:
        >>> run_cost(Machine(8, price=2.0, watts=700.0), 7.2e9, 1000.0)
        Cost(hours=250.0, gpu_hours=2000.0, usd=4000.0, kwh=1400.0)
    """
    hours = gpu_hours(tokens, speed)
    return Cost(hours / machine.gpus, hours, hours * machine.price, hours * machine.watts / 1000)


def changed_cost(machine: Machine, tokens: float, speed: float, change: Change) -> Cost:
    """Return the cost of the run with another method than the baseline.

    Args:
        machine: The GPUs, the same as for the baseline.
        tokens: T of the baseline.
        speed: v of the baseline.
        change: The change of tokens and speed.

    Raises:
        ValueError: If tokens or speed are not positive and finite.

    Examples:
        >>> change = Change(token_fraction=0.5, step_speedup=1.25)
        >>> changed_cost(Machine(8, price=2.0, watts=700.0), 7.2e9, 1000.0, change).usd
        1600.0
    """
    return run_cost(machine, tokens * change.token_fraction, speed * change.step_speedup)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; give a positive, finite number")
