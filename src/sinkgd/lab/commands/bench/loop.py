"""`sinkgd bench loop`: compare the training loop with a bare one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import tyro

from sinkgd.lab.commands.bench.shared import (
    check_at_least_one,
    chosen,
    print_warnings,
    write_record,
)
from sinkgd.lab.train.config import RunConfig, SharedConfig, load_defaults

if TYPE_CHECKING:
    from sinkgd.lab.bench.bench_loop import LoopBenchmark


@dataclass(frozen=True)
class Loop:
    """Measure the tokens per second of the training loop.

    It is compared with a bare loop that trains the same model with fused AdamW. Run nothing else on
    the machine meanwhile.

    For example:
      sinkgd bench loop
      sinkgd bench loop --optimizers sinkgd,swan --rounds 11 --out loop.json
    """

    optimizers: str = "adamw-one-lr,sinkgd"
    """Recipes to run in the training loop, names separated by commas."""

    rounds: int = 7
    """Number of blocks of steps that each loop runs; figures are medians over blocks."""

    steps_per_block: int = 5
    """Length of a block, in optimizer steps."""

    out: Path | None = None
    """JSON file to write, in addition to the table on the terminal."""

    config: Path | None = None
    """TOML file with defaults for the options below, one table for each group."""

    shared: Annotated[SharedConfig, tyro.conf.arg(name="")] = field(default_factory=SharedConfig)

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> Self:
        """Return the defaults of the options, from the file of ``--config`` if it is given."""
        return cls(shared=load_defaults(arguments, SharedConfig))

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If an option is invalid.
        """
        from sinkgd.lab.bench.bench_loop import bench_loop
        from sinkgd.lab.disk import claim_file
        from sinkgd.lab.train.recipes import RECIPES
        from sinkgd.lab.train.run import print_to_stderr

        for name in ("rounds", "steps_per_block"):
            check_at_least_one(name, getattr(self, name))
        if self.out is not None:
            claim_file(self.out)
        result = bench_loop(
            replace(RunConfig(), **vars(self.shared)),
            list(chosen("optimizers", self.optimizers, RECIPES)),
            rounds=self.rounds,
            steps_per_block=self.steps_per_block,
            echo=print_to_stderr,
        )
        _print(result)
        if self.out is not None:
            write_record(self.out, result)
        return 0


def _print(result: "LoopBenchmark") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for title in ("tokens/s", "slowest", "fastest", "of bare"):
        table.add_column(title, justify="right")
    for row in result.contenders:
        speeds = (row.tokens_per_second, row.slowest, row.fastest)
        table.add_row(row.name, *(f"{speed:,.0f}" for speed in speeds), f"{row.of_bare:.1%}")
    console = Console()
    console.print(table)
    print_warnings(console, result.doubts)
