"""`sinkgd bench memory`: what optimizers keep and allocate, and the peaks of training steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sinkgd.lab.commands.bench.shared import (
    check_at_least_one,
    chosen,
    command_of,
    prepare_device,
    write_measurement,
)
from sinkgd.lab.train.config import ConfigError, Device

if TYPE_CHECKING:
    from sinkgd.lab.bench.bench_memory import TrainingPlan

_RELEASE = {"on": True, "off": False}


@dataclass(frozen=True)
class TrainingSteps:
    """Measure complete training steps, with weights in bfloat16, on random tokens."""

    models: str = "llama-60m,llama-130m,llama-350m,llama-1b"
    """Presets to train, names separated by commas; all, or none."""

    recipes: str = "sinkgd-stateless,sinkgd,adamw,sgd"
    """Recipes of `sinkgd train`, names separated by commas; or all."""

    release: str = "on,off"
    """Whether gradients are freed inside backward: on (if the recipe can), off, or on,off."""

    batch_size: int = 1
    """Sequences in one forward pass."""

    sequence_length: int = 256
    """Length of a sequence, tokens."""

    recompute: bool = True
    """Keep only the input of each block, and run the block again in backward."""

    loss_chunk_tokens: int = 256
    """Number of target tokens whose logits are in memory at once. If a step has more than one such
    chunk, gradients of the head are summed, and three of them are in memory at once."""

    def plan(self, device: torch.device) -> "TrainingPlan | None":
        """Return the training steps to measure, or None if there is no model to train.

        Raises:
            ConfigError: If an option is invalid.
        """
        from sinkgd.lab.bench.bench_memory import TrainingPlan
        from sinkgd.lab.bench.memory_report import StepSettings
        from sinkgd.lab.models import PRESETS
        from sinkgd.lab.train.recipes import RECIPES

        for name in ("batch_size", "sequence_length", "loss_chunk_tokens"):
            check_at_least_one(f"training.{name}", getattr(self, name))
        models = chosen("training.models", self.models, PRESETS, none=True)
        plan = TrainingPlan(
            models=models,
            recipes=chosen("training.recipes", self.recipes, RECIPES),
            releases=tuple(_RELEASE[n] for n in chosen("training.release", self.release, _RELEASE)),
            settings=StepSettings(
                self.batch_size, self.sequence_length, self.recompute, self.loss_chunk_tokens
            ),
            device=device,
        )
        return plan if models else None


@dataclass(frozen=True)
class Memory:
    """Measure what optimizers keep and allocate, and the peaks of whole training steps.

    The first part measures optimizers on matrices without a model: the state kept between steps,
    other memory that the first step leaves allocated, and the most that a later step has allocated
    at once.

    The second part measures forward, backward and step of whole models, with each optimizer and
    with gradients released or kept: the peak, and its parts (state, gradients, activations). A
    model that does not fit into free memory is listed with the memory that it needs.

    Each measurement runs in a process of its own. Bytes are counted from the allocator's events; on
    CUDA the first part reads the allocator's counters instead. The peak of training is measured
    again without the profiler: as resident memory, or on CUDA by the allocator's counter.

    For example:
      sinkgd bench memory --out bench
      sinkgd bench memory --training.models none --workloads llama-350m --contenders adamw-fused
      sinkgd bench memory --workloads none --training.models llama-1b --training.release on
    """

    workloads: str = "llama-60m,llama-1b-layer"
    """Names separated by commas: llama-60m, llama-130m, llama-350m, llama-1b-layer, llama-1b,
    llama-60m-hybrid (the whole model), many-small; all, or none."""

    dtypes: str = "float32,bfloat16"
    """Types of parameters and gradients, names separated by commas."""

    contenders: str = "all"
    """Optimizers, names separated by commas, e.g. adamw-fused, sinkgd-cpu; or all."""

    training: TrainingSteps = TrainingSteps()

    threads: int | None = None
    """Number of CPU threads; torch's choice by default, one per core."""

    device: Device = "auto"
    """Device: cpu, cuda, or auto (cuda if available)."""

    out: Path | None = None
    """Folder for memory.json and memory.html."""

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If an option is invalid.
        """
        from rich.console import Console

        from sinkgd.lab.bench.bench_memory import MemoryPlan, bench_memory
        from sinkgd.lab.bench.contenders import contenders
        from sinkgd.lab.bench.memory_report import memory_page, memory_tables
        from sinkgd.lab.bench.workloads import DTYPES, WORKLOADS
        from sinkgd.lab.disk import claim_folder
        from sinkgd.lab.report.console import terminal_table

        device = prepare_device(self.device, self.threads)
        everyone = dict.fromkeys(c.name for w in WORKLOADS.values() for c in contenders(w, device))
        plan = MemoryPlan(
            workloads=chosen("workloads", self.workloads, WORKLOADS, none=True),
            dtypes=chosen("dtypes", self.dtypes, DTYPES),
            contenders=chosen("contenders", self.contenders, everyone),
            device=device,
            command=command_of("memory", self),
            training=self.training.plan(device),
        )
        if not plan.workloads and plan.training is None:
            raise ConfigError("workloads and training.models are both none; choose one of them")
        if self.out is not None:
            claim_folder(self.out)
        record = bench_memory(plan)
        console = Console()
        for table in memory_tables(record):
            console.print(terminal_table(table), "\n")
        if self.out is not None:
            write_measurement(self.out, "memory", record, memory_page(record), console)
        return 0
