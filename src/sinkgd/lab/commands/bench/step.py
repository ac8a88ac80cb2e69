"""`sinkgd bench step`: one optimizer step, compared with AdamW and with a lower bound."""

from dataclasses import dataclass
from pathlib import Path

from sinkgd.lab.commands.bench.shared import (
    check_at_least_one,
    check_positive,
    chosen,
    command_of,
    prepare_device,
    print_warnings,
    write_measurement,
)
from sinkgd.lab.train.config import Device


@dataclass(frozen=True)
class Step:
    """Time one optimizer step on matrices with the shapes of real models.

    SinkGD with each backend, SinkGD with deflation, SWAN, AdamW (fused, foreach), SGD, Muon, and
    SinkGD as public code writes it (a plain loop, and a compiled one) are timed in turn on the same
    parameters and gradients, in an order that rotates. Each optimizer is compared with fused AdamW
    in the same round. Most are also compared with their floor: the time that the fewest possible
    passes over memory take, at the bandwidth measured in the same rounds. At the end, SinkGD's
    times are compared with their targets. Run nothing else on the machine meanwhile.

    For example:
      sinkgd bench step --out bench
      sinkgd bench step --workloads llama-60m,llama-1b-layer --dtypes float32 --rounds 31
      sinkgd bench step --workloads llama-60m --contenders sinkgd-cpu,sgd-fused
    """

    workloads: str = "all"
    """Workloads, names separated by commas: llama-60m, llama-130m, llama-350m, llama-1b-layer,
    llama-1b, llama-60m-hybrid (the whole model), many-small; or the checks first-call, accuracy,
    scratch; or all."""

    dtypes: str = "float32,bfloat16"
    """Types of parameters and gradients, names separated by commas."""

    contenders: str = "all"
    """Optimizers besides fused AdamW, names separated by commas, e.g. sinkgd-cpu, muon; or all."""

    rounds: int = 15
    """Rounds in which each optimizer is timed on each workload; figures are medians over them."""

    seconds: float = 5.0
    """Longest time for an optimizer on a workload, seconds; slower ones are timed in fewer rounds,
    at least 3."""

    threads: int | None = None
    """Number of CPU threads; torch's choice by default, one per core."""

    device: Device = "auto"
    """Device: cpu, cuda, or auto (cuda if available)."""

    out: Path | None = None
    """Folder for step.json, with the seconds of every round, and step.html."""

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If an option is invalid.
        """
        from rich.console import Console

        from sinkgd.lab.bench.bench_step import CHECKS, StepPlan, bench_step
        from sinkgd.lab.bench.contenders import contenders
        from sinkgd.lab.bench.interleaved import Pace
        from sinkgd.lab.bench.step_report import (
            check_table,
            step_page,
            step_warnings,
            target_table,
            workload_table,
        )
        from sinkgd.lab.bench.workloads import DTYPES, WORKLOADS
        from sinkgd.lab.disk import claim_folder
        from sinkgd.lab.report.console import terminal_table

        check_at_least_one("rounds", self.rounds)
        check_positive("seconds", self.seconds)
        device = prepare_device(self.device, self.threads)
        everyone = dict.fromkeys(c.name for w in WORKLOADS.values() for c in contenders(w, device))
        plan = StepPlan(
            workloads=chosen("workloads", self.workloads, [*WORKLOADS, *CHECKS]),
            dtypes=chosen("dtypes", self.dtypes, DTYPES),
            contenders=chosen("contenders", self.contenders, everyone),
            pace=Pace(self.rounds, self.seconds),
            device=device,
            command=command_of("step", self),
        )
        if self.out is not None:
            claim_folder(self.out)
        console = Console()
        record = bench_step(plan, lambda w: console.print(terminal_table(workload_table(w)), "\n"))
        for table in (check_table(record), target_table(record)):
            if table.rows or table.absent:
                console.print(terminal_table(table), "\n")
        print_warnings(console, step_warnings(record))
        if self.out is not None:
            write_measurement(self.out, "step", record, step_page(record), console)
        return 0
