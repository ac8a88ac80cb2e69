"""Why a ratio of `sinkgd bench step` is doubtful: rounds that spread, or a loaded machine."""

from sinkgd.lab.bench.step.records import StepRecord, Timing

LOAD = "load_per_core"  # of the environment: the load average before the first turn, per core
_WIDE = 0.2  # of the median: a wider range between the quartiles is no result
_LOADED = 0.5  # runnable processes a core


def spreads_widely(timing: Timing) -> bool:
    """Whether the ratios to AdamW differ so much between rounds that their median says little."""
    ratio = timing.of_adamw
    return ratio.upper - ratio.lower > _WIDE * ratio.median


def is_loaded(record: StepRecord) -> bool:
    """Whether other processes kept the machine busy when the measurement began."""
    load = record.environment.get(LOAD)
    return load is not None and load > _LOADED


def warnings_of(record: StepRecord) -> tuple[str, ...]:
    """Say what makes the ratios doubtful; empty where nothing does."""
    found = []
    if is_loaded(record):
        found.append(
            f"The machine was busy before the first turn: a load of {record.environment[LOAD]:.2f} "
            "a core. Measure again when nothing else runs."
        )
    for workload in record.workloads:
        wide = [one.title for one in workload.timings if spreads_widely(one)]
        if wide:
            found.append(
                f"Rounds spread widely on {workload.title}, {workload.dtype}: {', '.join(wide)}. "
                "Use more --rounds, or a quieter machine."
            )
    return tuple(found)
