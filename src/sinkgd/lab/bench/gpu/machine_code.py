"""What compiled code says of a kernel: registers, spills, width of loads, lengths of its loops.

Nothing is run. The disassembler comes with triton.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LABEL = re.compile(r"\s*(\.L_x_\d+|\.L_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"BRA\S*\s.*?`\((\.L_x_\d+|\.L_\d+)\)")
_LOAD = re.compile(r"\bLDG(?:STS)?\.(\S+)")  # into registers, or shared memory
_SIZES = {"U8", "S8", "U16", "S16", "64", "128"}  # otherwise it is 4 bytes
_AMD_SPILLS = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")


@dataclass(frozen=True)
class MachineCode:
    """Facts on one kernel."""

    registers: int  # of a thread
    spilled: int  # instructions that use local memory; on AMD registers, and bytes of scratch
    loads2: int  # instructions that load 2 bytes from global memory
    loads16: int
    stores16: int
    loops: tuple[int, ...]  # instructions of each loop, in order; none on AMD


def machine_code(compiled: Any) -> MachineCode:
    """Read what `triton.compile` returned."""
    if "cubin" in compiled.asm:
        return of_sass(disassembled(compiled.asm["cubin"]))
    return of_amdgcn(compiled.asm["amdgcn"])


def disassembled(cubin: bytes) -> str:
    """Return the instructions of a CUDA binary as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def of_sass(text: str) -> MachineCode:
    """Read NVIDIA's instructions.

    Examples:
        >>> code = of_sass('''
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


def of_amdgcn(text: str) -> MachineCode:
    """Read AMD's assembly and the numbers that its compiler wrote below it."""
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
