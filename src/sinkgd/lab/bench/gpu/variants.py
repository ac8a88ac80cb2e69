"""Every variant of a kernel that steps of models use, compiled for a GPU that is not there.

`main` is the program that compiles them, in a process of its own: triton's interpreter and its
compiler do not share one. It writes a line of JSON a variant.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sinkgd.lab.bench.gpu.machine_code import machine_code
from sinkgd.lab.bench.gpu.own_process import environment
from sinkgd.lab.bench.workloads import Shape
from sinkgd.lab.disk import parse_json

RANK = 15  # directions that the recommended recipe lowers

# The options of SinkGD, and how gradients lie: what steps are compiled for.
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deflated": {"deflated_rank": RANK},
    "stochastic": {"rounding": "stochastic"},
    "transposed": {"transposed": True},
    "transposed deflated": {"transposed": True, "deflated_rank": RANK},
    "tolerance": {"tol": 1e-3},
    "transposed tolerance": {"transposed": True, "tol": 1e-3},
    "warm start": {"warm_start": True},
    "transposed warm start": {"transposed": True, "warm_start": True},
    "rate on the device": {"on_device": True},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "float32 weights": {"param_dtype": "float32"},
    "half iterations": {"whole_rows": False},
}
USUAL = ("plain", "deflated", "stochastic")


@dataclass(frozen=True)
class Variant:
    """A kernel as one target has it; counts of instructions are those of a thread."""

    target: str
    kernel: str
    constants: str  # that it was compiled for
    uses: tuple[str, ...]  # the steps that launch it, "step model shape", once for each launch
    threads: int
    entries: float  # of a panel, a thread
    columns: int  # of the panel, those beyond the matrix included
    bytes: int  # of an entry of the gradient
    shared: int  # bytes of shared memory
    registers: int
    spilled: int
    loads2: int
    loads16: int
    stores16: int
    loops: tuple[int, ...]

    @property
    def loop(self) -> int:
        """Instructions of the loop over panels: it comes first; shorter ones divide."""
        return next((loop for loop in self.loops if loop > 3 * self.entries), 0)

    @property
    def is_wide(self) -> bool:
        """Whether a thread's part of a panel is loaded by 16 bytes, and not entry by entry."""
        is_single = self.bytes == 2 and self.loads2 >= self.entries / 2
        return not is_single and self.loads16 >= self.entries * self.bytes / 16

    @property
    def name(self) -> str:
        """The kernel and what tells it apart."""
        return f"{self.kernel} {self.constants}"


def instructions_an_entry(
    variants: Iterable[Variant], step: str, model: str, shape: Shape
) -> float:
    """Return the instructions that are issued an entry of a matrix in a step, loops alone."""
    use = " ".join((step, model, "×".join(map(str, shape))))
    return sum(
        variant.uses.count(use) * variant.loop * variant.columns / variant.entries / shape[-1]
        for variant in variants
    )


def compiled(
    target: str,
    models: Sequence[str],
    steps: Sequence[str] = ("plain",),
    show: Callable[[str], None] = lambda _: None,
) -> list[Variant]:
    """Compile what steps of models launch, in a process of its own.

    Args:
        target: A name in `launches.TARGETS`.
        models: Names in `models.MODELS`.
        steps: Names in `STEPS`.
        show: Told the name of each variant when it is compiled.

    Raises:
        RuntimeError: If a kernel cannot be compiled.
    """
    run = f"import sys; from {__name__} import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", run, target, ",".join(models), ",".join(steps)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(interprets=False),
    )
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(variant_of(line))
        show(found[-1].name)
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"kernels do not compile for {target}: {errors.strip()}")
    return found


def variant_of(line: str) -> Variant:
    """Read a line of the compiling process."""
    fields: dict[str, Any] = parse_json(line)
    return Variant(**{**fields, "uses": tuple(fields["uses"]), "loops": tuple(fields["loops"])})


# In the compiling process -------------------------------------------------------------------------


def compile_all(name: str, models: Sequence[str], steps: Sequence[str]) -> Iterator[Variant]:
    """Compile each variant once, and say which steps use it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from sinkgd.lab.bench.gpu.launches import TARGETS, of_gradient

    target = TARGETS[name]
    device = type("Device", (), {})()
    device.get_current_device = device.get_current_stream = lambda *_: 0
    device.get_current_target = lambda: GPUTarget(target.backend, target.architecture, target.warp)
    driver.set_active(device)
    uses: dict[int, list[str]] = {}
    builds: dict[int, tuple[Any, Any]] = {}
    for use, launch in _launches(name, models, steps):
        built = launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.constants)
        builds[id(built)] = built, launch  # the same object again where it was compiled before
        uses.setdefault(id(built), []).append(use)
    for key, (built, launch) in builds.items():
        constants = launch.constants
        rows, columns = _tile(constants)
        threads = constants.get("num_warps", 4) * target.warp
        yield Variant(
            target=name,
            kernel=launch.kernel.__name__,
            constants=" ".join(f"{k}={v}" for k, v in constants.items()),
            uses=tuple(uses[key]),
            threads=threads,
            entries=rows * columns / threads,
            columns=columns,
            bytes=of_gradient(launch) or 0,
            shared=built.metadata.shared,
            **asdict(machine_code(built)),
        )


def _tile(constants: dict[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that a program holds at once."""
    from sinkgd.kernels.triton.skinny_plan import ROWS

    columns = constants.get("A", 0) + constants.get("B", 0) or constants.get("BN", ROWS)
    return constants.get("BM", ROWS), columns


def _launches(name: str, models: Sequence[str], steps: Sequence[str]) -> Iterator[Any]:
    from sinkgd.lab.bench.gpu.launches import TARGETS, step_of, taken_down
    from sinkgd.lab.bench.gpu.models import distinct

    for model in models:
        for step in steps:
            for shape in distinct(model):
                with taken_down(TARGETS[name]) as launches:
                    step_of([shape], **STEPS[step])
                for launch in launches:
                    yield f"{step} {model} {'×'.join(map(str, shape))}", launch


def main(target: str, models: str, steps: str) -> None:
    """Compile, and write a line a variant."""
    for variant in compile_all(target, models.split(","), steps.split(",")):
        sys.stdout.write(json.dumps(asdict(variant)) + "\n")
        sys.stdout.flush()
