"""`sinkgd bench kernels`: every backend over shapes and types, in bytes per second."""

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
class Kernels:
    """Time the two halves of a step, scales and update, of each backend over shapes and types.

    Backends and streaming operations, such as a copy, are timed in turn on the same matrices, in an
    order that rotates. Figures are bytes per second, absolute and as a share of the fastest
    streaming operation in the same round. Run nothing else on the machine meanwhile.

    For example:
      sinkgd bench kernels --out bench
      sinkgd bench kernels --cases 1024x1024,2048x5461 --dtypes bfloat16
    """

    cases: str = "all"
    """Shapes, names separated by commas: 64x64 … 4096x4096, 5461x2048, 2048x5461, 32000x256,
    256x32000, 1009x997, 2000 of 64x64, 16 of 512x512; or all."""

    dtypes: str = "float32,bfloat16"
    """Types of parameters and gradients, names separated by commas."""

    rounds: int = 15
    """Rounds in which each operation is timed on each case; figures are medians over them."""

    seconds: float = 1.0
    """Longest time for an operation on a case, seconds; slower ones are timed in fewer rounds, at
    least 3."""

    threads: int | None = None
    """Number of CPU threads; torch's choice by default, one per core."""

    device: Device = "auto"
    """Device: cpu, cuda, or auto (cuda if available)."""

    out: Path | None = None
    """Folder for kernels.json, with the seconds of every round, and kernels.html."""

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If an option is invalid.
        """
        from rich.console import Console

        from sinkgd.lab.bench.bench_kernels import (
            CASES,
            KernelsPlan,
            bench_kernels,
            case_table,
            kernels_page,
            kernels_warnings,
        )
        from sinkgd.lab.bench.interleaved import Pace
        from sinkgd.lab.bench.workloads import DTYPES
        from sinkgd.lab.disk import claim_folder
        from sinkgd.lab.report.console import terminal_table

        check_at_least_one("rounds", self.rounds)
        check_positive("seconds", self.seconds)
        plan = KernelsPlan(
            cases=chosen("cases", self.cases, CASES),
            dtypes=chosen("dtypes", self.dtypes, DTYPES),
            pace=Pace(self.rounds, self.seconds, min_turn_seconds=1e-3),
            device=prepare_device(self.device, self.threads),
            command=command_of("kernels", self),
        )
        if self.out is not None:
            claim_folder(self.out)
        console = Console()
        record = bench_kernels(plan, lambda c: console.print(terminal_table(case_table(c)), "\n"))
        print_warnings(console, kernels_warnings(record))
        if self.out is not None:
            write_measurement(self.out, "kernels", record, kernels_page(record), console)
        return 0
