"""`sinkgd plan`: an estimate of what training would need."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from sinkgd.lab.train.config import ConfigError, MeshConfig, Precision

if TYPE_CHECKING:
    from sinkgd.lab.plan import Architecture, Question


@dataclass(frozen=True)
class Plan:
    """Estimate, without training, what it takes to train a model: memory, messages, time and cost.

    Nothing is trained or sent. Weights are counted on the real module, which is built on the meta
    device. Activations are counted by tracing a step with fake tensors. Methods, which are
    optimizers and LoRA, are shown side by side. Times are estimates at an assumed fraction of the
    device's peak.

    For example:
      sinkgd plan --model llama-7b --optimizer adamw
      sinkgd plan --model llama-7b --device rtx-4090 --release-gradients --recompute-activations
      sinkgd plan --model llama-3-405b --mesh.dp-shard 2048 --mesh.tp 8 --recompute-activations
      sinkgd plan --model path/to/config.json --optimizer muon --out plans/mine
      sinkgd plan --model llama-60m --optimizer sinkgd --json
    """

    model: str = "llama-7b"
    """A preset, such as llama-7b or llama-10b; a published model: llama-3-8b, llama-3-70b or
    llama-3-405b; or the path of a Hugging Face config.json."""

    optimizer: str = "sinkgd"
    """Method that the answer is about, such as sinkgd, sinkgd-paper, sinkgd-8bit, sinkgd-stateless,
    swan, adamw, adamw-8bit, lora, muon, galore, apollo, apollo-mini, sgd."""

    device: str = "h100"
    """Device of every rank: h100, h200, b200, a100-80gb, rtx-4090, mi300x."""

    mesh: MeshConfig = field(default_factory=MeshConfig)

    batch_size: int = 1
    """Sequences in one forward pass of a rank or tp group."""

    micro_batches: int = 1
    """Number of forward passes in a step, whose gradients are accumulated."""

    sequence_length: int = 2048
    """Length of a sequence, tokens."""

    precision: Precision = "bf16"
    """Arithmetic: float32, bf16-autocast (weights stay float32) or bf16 (weights too)."""

    release_gradients: bool = False
    """Apply and free each gradient inside backward. Only some methods can, among them sinkgd."""

    recompute_activations: bool = False
    """Keep only the input of each block, and run the block again in backward."""

    loss_chunk_tokens: int | None = None
    """Number of target tokens whose logits are in memory at once; by default all of a batch."""

    memory_fraction: float = 0.9
    """Fraction of a device's memory that training may use, 0 to 1. The default is an assumption:
    the rest is for the driver, libraries and gaps in the allocator's memory."""

    mfu: float = 0.4
    """Fraction of the device's peak that matrix products reach, 0 to 1. The default is an
    assumption."""

    tokens: float | None = None
    """Number of training tokens, from which days and cost follow; by default 20 per parameter
    (Hoffmann et al. 2022)."""

    price_per_gpu_hour: float | None = None
    """Price of a device per hour, in any currency; without it no cost is shown."""

    json: bool = False
    """Print one JSON object instead of tables."""

    all: bool = False
    """Show all methods that --micro-batches allows; by default six, and that of --optimizer."""

    out: Path | None = None
    """Folder for plan.json and plan.html."""

    def run(self) -> int:
        """Run the command; return the exit code.

        Raises:
            ConfigError: If an option is invalid, or the mesh cannot divide the model.
            ModelError: If there is no such model, or its config.json has unknown parts.
        """
        import json
        import sys

        from rich.console import Console

        from sinkgd.lab.disk import claim_folder, write_whole
        from sinkgd.lab.plan import make_plan
        from sinkgd.lab.plan.plan_report import answer_lines, headline, plan_page, plan_tables
        from sinkgd.lab.plan.planner import USUAL_METHODS, as_json
        from sinkgd.lab.report.console import fitting_tables

        question = self._question()
        if self.out is not None:
            claim_folder(self.out)
        progress = Console(stderr=True)
        answer = make_plan(
            question,
            methods=self._methods() if self.all else USUAL_METHODS,
            echo=lambda line: progress.print(line, markup=False, highlight=False, soft_wrap=True),
        )
        record = as_json(question, answer, self._command())
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        written = []
        if self.out is not None:
            page = plan_page(question, answer, self._command())
            for name, content in (("plan.json", text), ("plan.html", page)):
                write_whole(self.out / name, content)
                written.append(self.out / name)
        if self.json:
            sys.stdout.write(text)
            return 0
        console = Console()
        for line in answer_lines(question, answer):
            console.print(line, markup=False, highlight=False)
        console.print()
        for table in plan_tables(question, answer):
            for part in fitting_tables(table, console.width):
                console.print(part, "\n")
        for line in (headline(question, answer), *(f"written: {path}" for path in written)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return 0

    def _question(self) -> "Question":
        from sinkgd.lab.plan import (
            Grid,
            Question,
            Work,
            find_architecture,
            find_device,
            find_method,
        )

        self._check()
        architecture, method = find_architecture(self.model), find_method(self.optimizer)
        if self.micro_batches < method.least_micro_batches:
            raise ConfigError(
                f"micro_batches is {self.micro_batches}, and a step of {method.name} needs at "
                f"least {method.least_micro_batches}"
            )
        return Question(
            work=Work(
                architecture=architecture,
                batch_size=self.batch_size,
                micro_batches=self.micro_batches,
                sequence_length=self.sequence_length,
                precision=self.precision,
                release=self.release_gradients,
                recompute=self.recompute_activations,
                loss_chunk_tokens=self.loss_chunk_tokens,
                tp=self.mesh.tp,
            ),
            grid=Grid.of(self.mesh),
            device=find_device(self.device),
            method=method,
            usable=self.memory_fraction,
            mfu=self.mfu,
            tokens=self._tokens(architecture),
            price=self.price_per_gpu_hour,
        )

    def _methods(self) -> tuple[str, ...]:
        """Return the methods whose steps do not need more micro-batches."""
        from sinkgd.lab.plan import METHODS

        possible = [
            own for own in METHODS.values() if own.least_micro_batches <= self.micro_batches
        ]
        return tuple(own.name for own in possible)

    def _tokens(self, architecture: "Architecture") -> float:
        from sinkgd.lab.plan.rank_model import weights_of

        if self.tokens is not None:
            return self.tokens
        return 20.0 * sum(weight.count for weight in weights_of(architecture))

    def _check(self) -> None:
        for name in ("batch_size", "micro_batches", "sequence_length", "loss_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in ("memory_fraction", "mfu"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}; it must be above 0 and at most 1")
        for name in ("tokens", "price_per_gpu_hour"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")

    def _command(self) -> str:
        words = ["sinkgd", "plan"]
        for option, value, default in self._options():
            if value == default:
                continue
            flag = f"--{option.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
        return shlex.join(words)

    def _options(self) -> list[tuple[str, object, object]]:
        """List the options with their values and defaults; those of the mesh have dotted names."""
        plain = Plan()
        return [
            (f"{f.name}.{own.name}", getattr(self.mesh, own.name), getattr(plain.mesh, own.name))
            if f.name == "mesh"
            else (f.name, getattr(self, f.name), getattr(plain, f.name))
            for f in fields(self)
            for own in (fields(self.mesh) if f.name == "mesh" else [f])
        ]
