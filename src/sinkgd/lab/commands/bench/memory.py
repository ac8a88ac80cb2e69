"""`sinkgd bench memory`: what optimizers keep, and what a step allocates."""

from dataclasses import dataclass
from pathlib import Path

from sinkgd.lab.commands.bench.choices import chosen, command_of, prepare_device
from sinkgd.lab.train.config import Device


@dataclass(frozen=True)
class Memory:
    """Measure what optimizers keep, and what a step allocates.

    Each optimizer has a process of its own. State is what it keeps between steps; kept is other
    memory that its first step leaves allocated; the last is the most that a later step has
    allocated at once. On a CPU they are counted from the allocator's events, on CUDA from its
    counters.

    For example:
      sinkgd bench memory --out bench
      sinkgd bench memory --workloads llama-350m --contenders sinkgd-cpu,adamw-fused
    """

    workloads: str = "llama-60m,llama-1b-layer"
    """Names with commas between: llama-60m, llama-130m, llama-350m, llama-1b-layer, llama-1b,
    llama-60m-hybrid (the whole model), many-small; or all."""

    dtypes: str = "float32,bfloat16"
    """Types of parameters and gradients, names with commas between."""

    contenders: str = "all"
    """Optimizers, names with commas between, e.g. adamw-fused, sinkgd-cpu; or all."""

    threads: int | None = None
    """CPU threads; by default torch's choice, one a core."""

    device: Device = "auto"
    """Where: cpu, cuda, or auto (cuda where there is one)."""

    out: Path | None = None
    """Folder for memory.json and memory.html."""

    def run(self) -> int:
        """Run the command; returns the exit code.

        Raises:
            ConfigError: If an option cannot be.
        """
        from rich.console import Console

        from sinkgd.lab.bench.contenders import contenders
        from sinkgd.lab.bench.memory import MemoryPlan, bench_memory
        from sinkgd.lab.bench.memory.sheets import memory_sheets
        from sinkgd.lab.bench.page import memory_page
        from sinkgd.lab.bench.sheet import terminal_table
        from sinkgd.lab.bench.workloads import DTYPES, WORKLOADS
        from sinkgd.lab.commands.bench.output import write_measurement

        device = prepare_device(self.device, self.threads)
        everyone = dict.fromkeys(c.name for w in WORKLOADS.values() for c in contenders(w, device))
        plan = MemoryPlan(
            workloads=chosen("workloads", self.workloads, WORKLOADS),
            dtypes=chosen("dtypes", self.dtypes, DTYPES),
            contenders=chosen("contenders", self.contenders, everyone),
            device=device,
            command=command_of("memory", self),
        )
        record = bench_memory(plan)
        console = Console()
        for sheet in memory_sheets(record):
            console.print(terminal_table(sheet), "\n")
        if self.out is not None:
            write_measurement(self.out, "memory", record, memory_page(record), console)
        return 0
