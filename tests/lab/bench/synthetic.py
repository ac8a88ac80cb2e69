"""Records that nobody measured: made-up seconds, summarized as the measurement does."""

from sinkgd.lab.bench.bench_kernels import CaseTiming, KernelsRecord, KernelTiming
from sinkgd.lab.bench.bench_memory import StepSettings
from sinkgd.lab.bench.bench_step import summarize_timing
from sinkgd.lab.bench.interleaved import quartiles, summarize_bandwidth
from sinkgd.lab.bench.memory_report import (
    MemoryRecord,
    MemoryUse,
    NotMeasured,
    TrainingMemory,
    TrainingNotMeasured,
    TrainingUse,
)
from sinkgd.lab.bench.step_record import (
    Absent,
    Accuracy,
    FirstCall,
    StepRecord,
    WorkloadTiming,
)

ENVIRONMENT = {"torch": "2.13", "threads": 2, "commit": None}
GB = 10**9

# Seconds of a step and passes of the floor; AdamW moves 7 GB in a second, so a pass takes 1/7 s.
STEPS = {
    "adamw-fused": (1.0, 7),
    "naive-loop": (44.0, None),
    "sinkgd-cpu": (1.1, 8),
    "sinkgd-cpu-L1": (0.6, 4),
    "hybrid-cpu": (0.9, 7),
}


def workload(
    name="llama-1b-layer", dtype="float32", steps=STEPS, matrices=7, reason="no compiler <b>"
):
    adamw = (1.0, 2.0, 4.0)  # the machine grows busier, and so do all
    best = summarize_bandwidth("AdamW fused", 7 * GB, adamw)
    slower = summarize_bandwidth("copy", 2 * GB, (0.5, 1.0, 2.0))
    timings = tuple(
        summarize_timing(
            key,
            key,
            tuple(seconds * slow for slow in adamw),
            adamw=adamw,
            floor_bytes=None if passes is None else passes * GB,
            best=best,
        )
        for key, (seconds, passes) in steps.items()
    )
    return WorkloadTiming(
        workload=name,
        title=f"the matrices of {name}",
        dtype=dtype,
        matrices=matrices,
        entries=10**9 // 4,
        timings=timings,
        absent=(Absent("compiled-loop", "public, compiled", reason),),
        bandwidths=(best, slower),
        bandwidth=best.name,
    )


def step_record(*workloads, **changes):
    found = {
        "command": "sinkgd bench step",
        "environment": ENVIRONMENT,
        "ours": "cpu",
        "rounds": 3,
        "workloads": workloads,
        "skipped": (Absent("llama-1b", "llama-1b, float32", "AdamW needs 18 GiB"),),
        "first_calls": (FirstCall("cpu", 11.0, (0.4, 0.5)),),
        "accuracies": (Accuracy("cpu", "llama-60m", 5, 2e-6), Accuracy("eager", "llama-60m", 5, 1)),
        "scratch": (memory_use("sinkgd-cpu"),),
        "targets": (),
    }
    return StepRecord(**{**found, **changes})


def memory_use(name, *, state=0, held=100, transient=150):
    return MemoryUse(name, name, "llama-60m", "float32", 1000, state, held, transient, 1000)


def memory_record():
    uses = (memory_use("adamw-fused", state=2000), memory_use("sinkgd-cpu"), memory_use("muon"))
    absent = (NotMeasured("compiled-loop", "llama-60m", "float32", "no compiler"),)
    return MemoryRecord("sinkgd bench memory", ENVIRONMENT, uses, absent, training_memory())


def training_memory():
    uses = (
        TrainingUse("llama-1b", "sinkgd-stateless", True, 1000, 0, 50, 9, 9, 1069, 1100),
        TrainingUse("llama-1b", "sinkgd-stateless", False, 1000, 0, 1000, 0, 9, 2003, 2100),
    )
    absent = (TrainingNotMeasured("llama-1b", "adamw, kept", "it may need 11.8 GiB"),)
    return TrainingMemory(StepSettings(), uses, absent)


def kernels_record():
    cases = tuple(
        _case(size, dtype) for size in (64, 128, 256) for dtype in ("float32", "bfloat16")
    )
    absent = (Absent("triton", "triton", "does not run on cpu"),)
    return KernelsRecord("sinkgd bench kernels", ENVIRONMENT, 2, cases, absent)


def _case(size, dtype):
    best = summarize_bandwidth("copy", GB, (1.0, 2.0))
    timings = tuple(
        KernelTiming(
            backend,
            operation,
            GB,
            (2.0, 5.0),
            quartiles([2.0, 5.0]),
            quartiles([GB / 2, GB / 5]),
            quartiles([0.5, 0.4]),
        )
        for backend in ("cpu", "eager")
        for operation in ("scales, L=1", "scales, L=5", "update")
    )
    return CaseTiming(f"{size}x{size}", dtype, ((size, size),), timings, (best,), best.name)
