"""What `sinkgd bench gpu` writes, and its tables."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from sinkgd.lab.bench.gpu.variants import Variant
from sinkgd.lab.report.console import TextTable


@dataclass(frozen=True)
class Figure:
    """A row of the table of targets."""

    name: str
    value: float
    target: float | None  # the largest value that meets the target
    how: str  # how it was counted

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is no target."""
        return None if self.target is None else self.value <= self.target


@dataclass(frozen=True)
class Missed:
    """A compiled variant of a kernel that misses a target."""

    variant: str
    target: str  # the GPU, a name in cases.TARGETS
    steps: tuple[str, ...]  # the steps that use the variant
    why: str


@dataclass(frozen=True)
class GpuRecord:
    """One run of `sinkgd bench gpu`."""

    command: str
    environment: dict[str, Any]
    triton: str  # the version of triton
    figures: tuple[Figure, ...]
    missed: tuple[Missed, ...]
    variants: tuple[Variant, ...]


_NOTHING = "–"


def figure_table(record: GpuRecord) -> TextTable:
    """Return the table of targets."""
    return TextTable(
        title="A step on a GPU, counted without a GPU",
        note=f"Nothing here is a time on a GPU. L = 5, triton {record.triton}, bfloat16 except "
        "for errors and calls of torch; gpu.json says how each figure is counted.",
        columns=("counted", "now", "target", "met"),
        rows=tuple(
            (one.name, _number(one.value), _bound(one.target), _verdict(one.met))
            for one in record.figures
        ),
    )


def missed_table(record: GpuRecord) -> TextTable:
    """Return the table of kernels that miss a target, with the number of variants that do."""
    counts = Counter((one.target, _short(one.variant), one.why) for one in record.missed)
    return TextTable(
        title="Kernels that miss a target",
        note=f"There are {len(record.variants)} variants; gpu.json has the steps that use each.",
        columns=("kernel, columns of its panel", "GPU", "variants", "why"),
        rows=tuple(
            (kernel, target, str(count), why)
            for (target, kernel, why), count in sorted(counts.items())
        ),
    )


def _short(variant: str) -> str:
    kernel, *words = variant.split()
    constants = dict(word.split("=", 1) for word in words if "=" in word)
    columns = sum(int(constants.get(name, 0)) for name in ("A", "B", "BN"))
    first = ", from the unscaled gradient" if constants.get("U_FROM") == "1" else ""
    return f"{kernel}, {columns}{first}" if columns else kernel


def _bound(target: float | None) -> str:
    return _NOTHING if target is None else f"≤ {_number(target)}"


def _number(value: float) -> str:
    if value == round(value):
        return f"{value:.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _verdict(met: bool | None) -> str:
    return _NOTHING if met is None else "yes" if met else "no"
