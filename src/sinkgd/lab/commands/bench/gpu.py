"""`sinkgd bench gpu`: count what a step would do on a GPU, and compare it with targets."""

from dataclasses import dataclass
from pathlib import Path

from sinkgd.lab.commands.bench.shared import chosen, command_of, write_record
from sinkgd.lab.train.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Count what a step would do on a GPU; a GPU is neither needed nor used.

    The table has a row for each figure: what was counted, its present value, and, if it has a
    target, the target and whether it is met. No figure is a time on a GPU.

    There are four parts. `interpreter` runs the kernels on a CPU, counts how often they read a
    gradient, and measures their errors. `host` counts calls of torch and launches of kernels, and
    times the host's work. `schedule` counts bytes and scratch for an H100. `code` compiles, for
    each GPU, the kernels of the models' plain, deflated and stochastically rounded steps, and reads
    the machine code. The command needs triton, and takes two minutes on two cores.

    For example:
      sinkgd bench gpu --out bench
      sinkgd bench gpu --parts interpreter,host,schedule
      sinkgd bench gpu --parts code --gpus sm_90 --models llama-1b
    """

    parts: str = "all"
    """Names separated by commas: interpreter, host, schedule, code; or all."""

    gpus: str = "all"
    """Kinds of GPU that kernels are compiled for, names separated by commas: sm_80, sm_90, sm_100,
    gfx942; or all. Instructions are counted for sm_90."""

    models: str = "all"
    """Models whose kernels are compiled, names separated by commas: llama-60m, llama-1b, llama-7b,
    mixtral-8x7b, moe-64-experts; or all."""

    out: Path | None = None
    """Folder for gpu.json, with registers, spills, loads and loops of every kernel."""

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If an option is invalid, or triton is not installed.
        """
        from importlib.util import find_spec

        from rich.console import Console

        if find_spec("triton") is None:
            raise ConfigError("triton is not installed; pip install triton")

        from sinkgd.lab.bench.gpu import PARTS, Plan, bench_gpu
        from sinkgd.lab.bench.gpu.cases import MODELS, TARGETS
        from sinkgd.lab.bench.gpu.tables import figure_table, missed_table
        from sinkgd.lab.disk import claim_folder
        from sinkgd.lab.report.console import terminal_table

        plan = Plan(
            parts=chosen("parts", self.parts, PARTS),
            targets=chosen("gpus", self.gpus, TARGETS),
            models=chosen("models", self.models, MODELS),
            command=command_of("gpu", self),
        )
        if self.out is not None:
            claim_folder(self.out)
        record = bench_gpu(plan)
        console = Console()
        for table in (figure_table(record), missed_table(record)):
            if table.rows:
                console.print(terminal_table(table), "\n")
        if self.out is not None:
            path = self.out / "gpu.json"
            write_record(path, record)
            console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
        return 0
