"""The cost calculator as a block of a page: its fields with their sources, and the results.

A badge at each field says whether its figure is measured on the page, published, assumed, or the
reader's own. The initial results are computed here; the browser updates them when a field changes.
"""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Literal

from sinkgd.lab.devices import DEVICES, DeviceSheet
from sinkgd.lab.report.analysis import Analysis
from sinkgd.lab.report.cost import (
    STATE_RULES,
    Change,
    Cost,
    Machine,
    StateRule,
    assumed_speed,
    changed_cost,
    devices_needed,
    run_cost,
)
from sinkgd.lab.report.cost_sources import (
    Candidate,
    Kind,
    ModelChoice,
    SpeedSource,
    candidates,
    device_of,
    measured_speed,
    model_choices,
    published_speed,
    usual_model,
)

GPUS = 8
# USD per GPU and hour. These are assumptions, round figures close to on-demand offers, not quotes.
PRICES = {
    "h100": 2.0,
    "h200": 2.5,
    "b200": 4.0,
    "a100-80gb": 1.2,
    "rtx-4090": 0.4,
    "mi300x": 2.0,
}
MFU = 0.4  # as in `sinkgd plan`

_GIB = 2**30

Unit = Literal["h", "GPU-h", "USD", "kWh"]


def amount(value: float) -> str:
    """Format a number with three significant digits and commas, as `cost.js` does.

    There are at most four decimals.

    >>> amount(0.012345), amount(123456.0), amount(2.0), amount(-1225), amount(-0.00001)
    ('0.0123', '123,000', '2', '−1,230', '0')
    """
    rounded = Context(prec=3, rounding=ROUND_HALF_UP).plus(Decimal(value))
    if abs(rounded) < 1:
        rounded = rounded.quantize(Decimal("0.0001"), ROUND_HALF_UP)
    text = f"{rounded:,f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text.replace("-", "−")


def signed(value: float) -> str:
    """Format a difference with its sign.

    >>> signed(12.0), signed(-3.5), signed(0.0)
    ('+12', '−3.5', '0')
    """
    return f"+{amount(value)}" if value > 0 else amount(value)


def plain(value: float) -> str:
    """Format a number for a field: six significant digits, without an exponent.

    >>> plain(0.4), plain(1339.08), plain(1e15)
    ('0.4', '1339.08', '1000000000000000')
    """
    return _written(f"{value:.6g}")


def short(value: float) -> str:
    """Format a ratio for a field: four significant digits.

    >>> short(100 / 2.8), short(49256.4)
    ('35.71', '49260')
    """
    return _written(f"{value:.4g}")


def _written(digits: str) -> str:
    text = f"{Decimal(digits):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def words_of(kind: Kind) -> str:
    """Return the text of a badge."""
    return {"measured": "measured here", "own": "your own"}.get(kind, kind)


@dataclass(frozen=True)
class Outcome:
    """A row of the table of costs."""

    key: str  # name of a field of `Cost`
    title: str
    unit: Unit
    baseline: float
    candidate: float

    @property
    def difference(self) -> float:
        """The candidate's value minus the baseline's."""
        return self.candidate - self.baseline


@dataclass(frozen=True)
class MemoryRow:
    """The memory that a method needs, without activations, and the number of devices for it."""

    rule: StateRule
    gib: float  # weights, gradients and state
    saved_gib: float  # difference from AdamW's memory
    saved_share: float  # this difference as a fraction of AdamW's memory
    devices: int


@dataclass(frozen=True)
class Inputs:
    """The figures that the fields show, in the units of `sinkgd.lab.report.cost`."""

    device: DeviceSheet
    machine: Machine
    model: ModelChoice
    speed: SpeedSource
    candidate: Candidate


@dataclass(frozen=True)
class CalculatorBlock:
    """The content of ``calculator.html``."""

    inputs: Inputs  # the initial figures
    baseline: str
    devices: tuple[DeviceSheet, ...]
    models: tuple[ModelChoice, ...]
    speeds: tuple[SpeedSource, ...]
    candidates: tuple[Candidate, ...]
    outcomes: tuple[Outcome, ...]
    memory: tuple[MemoryRow, ...]  # AdamW first
    caution: str  # a warning if recipes were compared but none is a candidate, else empty
    mfu: float = MFU

    # The template formats numbers with these functions, so that it needs no filters of the page.
    amount = staticmethod(amount)
    signed = staticmethod(signed)
    plain = staticmethod(plain)
    short = staticmethod(short)
    badge = staticmethod(words_of)

    @property
    def memory_sentence(self) -> str:
        """The main result: memory and devices of SinkGD against AdamW."""
        first, own = self.memory[0], next(one for one in self.memory if one.rule.method == "SinkGD")
        same = own.devices == first.devices
        other = ", as AdamW does" if same else f" instead of {first.devices:,}"
        return (
            f"{own.rule.method} holds {amount(own.gib)} GiB instead of AdamW’s {amount(first.gib)} "
            f"GiB and needs {own.devices:,} × {self.inputs.device.title}{other}."
        )

    @staticmethod
    def price_of(device: str) -> float:
        """Return the initial price, USD per GPU and hour."""
        return PRICES[device]

    @property
    def sentence(self) -> str:
        """Time and money of the candidate and of the baseline, in words."""
        time, _, money, _ = self.outcomes
        name = self.inputs.candidate.name
        return (
            f"{name} takes {amount(time.candidate)} h instead of {amount(time.baseline)} h, and "
            f"{amount(money.candidate)} USD instead of {amount(money.baseline)} USD."
        )


def calculator_block(analysis: Analysis | None = None) -> CalculatorBlock:
    """Fill in the calculator with measured figures, or else with published and assumed ones.

    The candidate is the measured method whose tokens and speed give the shortest time to the
    baseline's loss; if there is none, it is SinkGD as published at 1.3B. Measured speeds
    are used only if the baseline ran on a device in `sinkgd.lab.devices`. Otherwise the baseline's
    speed follows from an assumed fraction of the GPU's peak.

    Args:
        analysis: The comparison of the page's runs; None if there are no runs.

    Examples:
        >>> block = calculator_block()
        >>> block.baseline, block.inputs.candidate.title
        ('Adam', 'SinkGD, published at 1.3B')
    """
    device = device_of(analysis) or DEVICES["h100"]
    models = model_choices(analysis)
    model = usual_model(models, analysis)
    assumed = SpeedSource(
        "assumed",
        "a share of the peak",
        assumed_speed(device.flops, MFU, model.parameters),
        "assumed",
        "share of the peak × FLOP/s ÷ 6N",
    )
    measured = measured_speed(analysis)
    speeds = tuple(one for one in (measured, assumed, published_speed()) if one is not None)
    found = candidates(analysis)
    inputs = Inputs(
        device=device,
        machine=Machine(GPUS, PRICES[device.name], device.watts),
        model=model,
        speed=measured or assumed,
        candidate=found[0],
    )
    baseline = analysis.baseline.name if analysis and analysis.baseline else "Adam"
    return CalculatorBlock(
        inputs=inputs,
        baseline=baseline,
        devices=tuple(DEVICES.values()),
        models=models,
        speeds=speeds,
        candidates=found,
        outcomes=outcomes(inputs),
        memory=memory_rows(inputs),
        caution=_caution(analysis, found),
    )


def _caution(analysis: Analysis | None, found: tuple[Candidate, ...]) -> str:
    compared = analysis is not None and analysis.baseline is not None and analysis.candidates
    if compared and not any(one.tokens_kind == "measured" for one in found):
        return (
            "No recipe on this page is offered as a candidate, because none reached the baseline’s "
            "loss at a measured speed. The candidate below is published and was not measured here."
        )
    return ""


def memory_rows(inputs: Inputs) -> tuple[MemoryRow, ...]:
    """Compute memory and devices of every method from the figures that the fields show.

    Args:
        inputs: The figures of the fields.
    """
    parameters = 1e6 * float(plain(inputs.model.parameters / 1e6))
    share = float(short(100 * inputs.model.matrix_share)) / 100
    whole = STATE_RULES[0].memory_bytes(parameters, share)
    rows = []
    for rule in STATE_RULES:
        held = rule.memory_bytes(parameters, share)
        devices = devices_needed(held, inputs.device.memory_bytes)
        rows.append(MemoryRow(rule, held / _GIB, (whole - held) / _GIB, 1 - held / whole, devices))
    return tuple(rows)


def outcomes(inputs: Inputs) -> tuple[Outcome, ...]:
    """Compute the cost of both methods from the figures that the fields show.

    Args:
        inputs: The figures of the fields.
    """
    tokens = 1e9 * float(plain(inputs.model.tokens / 1e9))
    speed = float(short(inputs.speed.value))
    fraction = float(short(100 * inputs.candidate.token_fraction)) / 100
    change = Change(fraction, float(short(inputs.candidate.step_speedup)))
    one = run_cost(inputs.machine, tokens, speed)
    other = changed_cost(inputs.machine, tokens, speed, change)

    def line(key: str, title: str, unit: Unit) -> Outcome:
        return Outcome(key, title, unit, _of(one, key), _of(other, key))

    return (
        line("hours", "Time", "h"),
        line("gpu_hours", "GPU time", "GPU-h"),
        line("usd", "Money", "USD"),
        line("kwh", "Energy of the GPUs", "kWh"),
    )


def _of(cost: Cost, key: str) -> float:
    return float(getattr(cost, key))
