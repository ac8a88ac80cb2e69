"""What a record of `sinkgd bench step` or `kernels` warns of."""

from sinkgd.lab.bench.doubts import doubts, is_wide
from sinkgd.lab.bench.kernels import KernelsRecord
from sinkgd.lab.bench.step.records import StepRecord, Timing


def spreads_widely(timing: Timing) -> bool:
    """Whether the ratios to AdamW differ so much between rounds that their median says little."""
    return is_wide(timing.of_adamw)


def warnings_of(record: StepRecord | KernelsRecord) -> tuple[str, ...]:
    """Say what makes the ratios doubtful; empty where nothing does."""
    if isinstance(record, StepRecord):
        wide = {
            f"{workload.title}, {workload.dtype}": [
                one.title for one in workload.timings if spreads_widely(one)
            ]
            for workload in record.workloads
        }
    else:
        wide = {
            f"{case.case}, {case.dtype}": [
                f"{one.backend}: {one.operation}" for one in case.timings if is_wide(one.share)
            ]
            for case in record.cases
        }
    return doubts(record.environment, wide)
