"""Every variant of a kernel that steps of models use, compiled for a GPU that is not there.

`main` is the program that compiles them, in a process of its own: triton's interpreter and its
compiler cannot share a process. `main` writes a line of JSON for each variant. `machine_code` reads
the compiled code: registers, spills, widths of loads, lengths of loops. No kernel runs; the
disassembler comes with triton.

A panel is the part of a matrix that a program holds at once.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sinkgd.lab.bench.gpu.cases import STEPS, TARGETS, distinct, environment
from sinkgd.lab.bench.workloads import Shape
from sinkgd.lab.disk import parse_json


@dataclass(frozen=True)
class Variant:
    """A kernel as compiled for one target; instructions are counted for one thread."""

    target: str
    kernel: str
    constants: str  # the constants that it was compiled for
    uses: tuple[str, ...]  # the steps that launch it, "step model shape", once for each launch
    threads: int
    entries: float  # entries of a panel per thread
    columns: int  # columns of the panel, including those beyond the matrix
    bytes: int  # bytes per entry of the gradient
    shared: int  # bytes of shared memory
    registers: int  # this and the following: see `MachineCode`
    spilled: int
    loads2: int
    loads16: int
    stores16: int
    loops: tuple[int, ...]

    @property
    def loop(self) -> int:
        """Instructions in the loop over panels; 0 if there is none.

        The loop over panels is the first one with more than three instructions per entry. A shorter
        one may be part of a division.
        """
        return next((loop for loop in self.loops if loop > 3 * self.entries), 0)

    @property
    def is_wide(self) -> bool:
        """Whether a thread loads its part of a panel 16 bytes at a time, not entry by entry."""
        is_single = self.bytes == 2 and self.loads2 >= self.entries / 2
        return not is_single and self.loads16 >= self.entries * self.bytes / 16

    @property
    def name(self) -> str:
        """The kernel and its constants."""
        return f"{self.kernel} {self.constants}"


def instructions_per_entry(
    variants: Iterable[Variant], step: str, model: str, shape: Shape
) -> float:
    """Return how many instructions of loops are issued for each entry of a matrix in a step."""
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
    """Compile the kernels that steps of models launch, in a process of its own.

    Args:
        target: A name in `cases.TARGETS`.
        models: Names in `cases.MODELS`.
        steps: Names in `cases.STEPS`.
        show: Called with the name of each variant when it is compiled.

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
        found.append(_variant_of(line))
        show(found[-1].name)
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"kernels do not compile for {target}: {errors.strip()}")
    return found


def _variant_of(line: str) -> Variant:
    """Read a line of the compiling process."""
    fields: dict[str, Any] = parse_json(line)
    return Variant(**{**fields, "uses": tuple(fields["uses"]), "loops": tuple(fields["loops"])})


def compile_all(name: str, models: Sequence[str], steps: Sequence[str]) -> Iterator[Variant]:
    """Compile each variant once, and yield it with the steps that use it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = TARGETS[name]
    device = type("Device", (), {})()
    device.get_current_device = device.get_current_stream = lambda *_: 0
    device.get_current_target = lambda: GPUTarget(target.backend, target.architecture, target.warp)
    driver.set_active(device)
    uses: dict[int, list[str]] = {}
    builds: dict[int, tuple[Any, Any]] = {}
    for use, launch in _launches(name, models, steps):
        built = launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.constants)
        builds[id(built)] = built, launch  # triton returns the same object for the same variant
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
            bytes=launch.gradient_bytes or 0,
            shared=built.metadata.shared,
            **asdict(machine_code(built)),
        )


def _tile(constants: dict[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that a program holds at once."""
    from sinkgd.kernels.triton.product_plan import ROWS

    columns = constants.get("A", 0) + constants.get("B", 0) or constants.get("BN", ROWS)
    return constants.get("BM", ROWS), columns


def _launches(name: str, models: Sequence[str], steps: Sequence[str]) -> Iterator[Any]:
    from sinkgd.lab.bench.gpu.recorded import recorded_launches, take_step

    for model in models:
        for step in steps:
            for shape in distinct(model):
                with recorded_launches(TARGETS[name]) as launches:
                    take_step([shape], **STEPS[step])
                for launch in launches:
                    yield f"{step} {model} {'×'.join(map(str, shape))}", launch


def main(target: str, models: str, steps: str) -> None:
    """Compile, and write a line for each variant."""
    for variant in compile_all(target, models.split(","), steps.split(",")):
        sys.stdout.write(json.dumps(asdict(variant)) + "\n")
        sys.stdout.flush()


_LABEL = re.compile(r"\s*(\.L_x_\d+|\.L_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"BRA\S*\s.*?`\((\.L_x_\d+|\.L_\d+)\)")
_LOAD = re.compile(r"\bLDG(?:STS)?\.(\S+)")  # loads into registers (LDG) or shared memory (LDGSTS)
_SIZES = {"U8", "S8", "U16", "S16", "64", "128"}  # a load without one of these has 4 bytes
_AMD_SPILLS = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")


@dataclass(frozen=True)
class MachineCode:
    """Counts from the compiled code of one kernel."""

    registers: int  # per thread
    # Instructions that use local memory; on AMD, the sum of spilled registers and scratch bytes.
    spilled: int
    loads2: int  # instructions that load 2 bytes from global memory
    loads16: int  # instructions that load 16 bytes from global memory
    stores16: int  # instructions that store 16 bytes to global memory
    loops: tuple[int, ...]  # instructions of each loop, in order; none on AMD


def machine_code(compiled: Any) -> MachineCode:
    """Read what `triton.compile` returned."""
    if "cubin" in compiled.asm:
        return _of_sass(disassembled(compiled.asm["cubin"]))
    return _of_amdgcn(compiled.asm["amdgcn"])


def disassembled(cubin: bytes) -> str:
    """Return the instructions of a CUDA binary as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _of_sass(text: str) -> MachineCode:
    """Read NVIDIA's instructions.

    Examples:
        >>> code = _of_sass('''
        ... .L_x_0:
        ...         /*0010*/    @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        ...         /*0018*/    LDG.E.U16.CONSTANT R9, desc[UR4][R2.64] ;
        ...         /*001c*/    LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        ...         /*001e*/    LDG.E R9, desc[UR4][R2.64] ;
        ...         /*0020*/    STL [R1], R4 ;
        ...         /*0030*/    @P1 BRA `(.L_x_0) ;
        ... ''')
        >>> code.registers, code.spilled, code.loops
        (10, 1, (6,))
        >>> code.loads2, code.loads16
        (1, 2)
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
    loops = []
    for i, instruction in enumerate(instructions):
        branch = _BRANCH.search(instruction)
        if branch and labels.get(branch[1], i + 1) < i:
            loops.append(i + 1 - labels[branch[1]])
    loads = [load[1].split(".") for one in instructions if (load := _LOAD.search(one))]
    sizes = [next((word for word in words if word in _SIZES), "") for words in loads]
    return MachineCode(
        registers=max(map(int, re.findall(r"\bR(\d+)\b", text)), default=0) + 1,
        spilled=sum("LDL" in one or "STL" in one for one in instructions),
        loads2=sizes.count("U16"),
        loads16=sizes.count("128"),
        stores16=sum("STG.E.128" in one for one in instructions),
        loops=tuple(loops),
    )


def _of_amdgcn(text: str) -> MachineCode:
    """Read AMD's assembly, and the numbers that its compiler adds to it."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    assert registers is not None
    spills = (re.search(rf"\.{name}:\s*(\d+)", text) for name in _AMD_SPILLS)
    return MachineCode(
        registers=int(registers[1]),
        spilled=sum(int(found[1]) for found in spills if found),
        loads2=len(re.findall(r"(?:global|buffer)_load_(?:ushort|sshort|short_d16)", text)),
        loads16=len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        stores16=len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
        loops=(),
    )
