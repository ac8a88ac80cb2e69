"""Measure the memory of fine-tuning steps, to compare it with what `sinkgd plan` says.

Each line of the record is one method: the bytes of its state and the peak of the second step, both
as measured and as planned for a CPU. Weights are bfloat16 and random; blocks are recomputed. The
peak is the most that torch's allocator held at once, with weights, state and batch; the peak of the
process is its largest resident size.

    python benchmarks/finetune/memory.py record.jsonl --model llama-1b --tokens 256
"""

import argparse
import json
import resource
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import sinkgd
from sinkgd.lab.bench.bench_memory import running_sum
from sinkgd.lab.launch import in_fresh_process
from sinkgd.lab.models import Llama, add_adapters, build_model, draw_adapters
from sinkgd.lab.plan import Grid, Work, find_architecture, find_method, rank_memory
from sinkgd.lab.train.machine import describe_environment, return_freed_memory
from sinkgd.lab.train.training_step import loss_of

ADAMW_LR = 1e-5
# Names of `sinkgd plan`, and whether gradients are released.
CASES = [
    ("adamw", False),
    ("adamw-8bit", False),
    ("sinkgd", False),
    ("sinkgd-8bit", False),
    ("sinkgd", True),
    ("sinkgd-8bit", True),
    ("lora", False),
]


def optimizer_of(model: Llama, method: str) -> sinkgd.SinkGD:
    """Build the optimizer of a method, at a rate for fine-tuning."""
    options: dict[str, Any] = {"state_bits": 8} if method.endswith("8bit") else {}
    if method.startswith("adamw"):
        options["overrides"] = {".": method}
    groups = sinkgd.param_groups(model, adamw_lr=ADAMW_LR, **options)
    has_matrices = any(group["algorithm"] == "sinkgd" for group in groups)
    return sinkgd.SinkGD(groups, rounding="stochastic" if has_matrices else "nearest")


class Case(NamedTuple):
    """A step: the model, its tokens, the method, and whether gradients are released."""

    model: str
    tokens: int
    method: str
    released: bool


def measure(case: Case) -> dict[str, Any]:
    """Take two steps, and return what the second one held."""
    return_freed_memory()
    with torch.device("meta"):
        model = build_model(case.model, max_sequence_length=case.tokens)
    assert isinstance(model, Llama)
    model.to(torch.bfloat16).to_empty(device="cpu").initialize(0)
    model.recompute = True
    if rank := find_method(case.method).adapter_rank:
        add_adapters(model, rank)
        draw_adapters(model, seed=0)
    optimizer = optimizer_of(model, case.method)
    if case.released:
        sinkgd.GradientRelease(optimizer)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(model.config.vocab_size, (1, case.tokens + 1), generator=generator)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> None:
        torch.autograd.backward(loss_of(model, inputs, targets, None) / case.tokens)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    state = sum(x.nbytes for own in optimizer.state.values() for x in own.values())
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers(), inputs, targets))
    return {
        "weights": sum(x.nbytes for x in model.parameters()),
        "state": state,
        "peak": held + state + running_sum(changes).peak,
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def planned(case: Case) -> dict[str, Any]:
    """Return what the plan says of the same step."""
    work = Work(
        find_architecture(case.model),
        sequence_length=case.tokens,
        release=case.released,
        recompute=True,
    )
    memory = rank_memory(work, Grid(), find_method(case.method), device="cpu")
    return {"weights": memory.weights, "state": memory.state, "peak": memory.peak}


def main() -> None:
    """Measure every case that the record lacks, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--model", default="llama-1b")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    lines = options.record.read_text("utf-8").splitlines() if options.record.exists() else []
    runs = [json.loads(line) for line in lines]
    known = {Case(*(run[field] for field in Case._fields)) for run in runs}
    for method, released in CASES:
        case = Case(options.model, options.tokens, method, released)
        if case in known:
            continue
        run = {
            **case._asdict(),
            "planned": planned(case),
            "measured": in_fresh_process(measure, case),
            "environment": describe_environment(torch.device("cpu")),
        }
        print(json.dumps(run), flush=True)  # noqa: T201 - progress
        with options.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
