"""The figures of `sinkgd bench kernels` as tables."""

from sinkgd.lab.bench.kernels.records import CaseTiming
from sinkgd.lab.bench.sheet import Sheet


def case_sheet(case: CaseTiming) -> Sheet:
    """Make the table of one case."""
    best = next(b for b in case.bandwidths if b.name == case.bandwidth)
    rate = best.bytes_per_second.median / 1e9
    return Sheet(
        title=f"{case.case}, {case.dtype}",
        note=f"Share: of {rate:.1f} GB/s, the fastest that was measured here ({best.name}).",
        columns=("operation", "µs", "GB/s", "share"),
        rows=tuple(
            (
                f"{timing.backend}: {timing.operation}",
                f"{1e6 * timing.call_seconds.median:,.1f}",
                f"{timing.bytes_per_second.median / 1e9:.2f}",
                f"{timing.share.median:.0%} [{timing.share.lower:.0%}, {timing.share.upper:.0%}]",
            )
            for timing in case.timings
        ),
    )
