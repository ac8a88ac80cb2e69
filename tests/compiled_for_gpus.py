"""What test files share that are also programs, in which triton compiles kernels for GPUs.

Triton's interpreter, which other tests need, and its compiler cannot share a process.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest


def lines_of(path, *arguments):
    """Run a file as a program, and return the lines of JSON that it writes."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, path, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**env, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def write(found):
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(found) + "\n")


def target_of(name):
    """Return triton's target for a GPU in `cases.TARGETS`."""
    from triton.backends.compiler import GPUTarget

    from sinkgd.lab.bench.gpu.cases import TARGETS

    target = TARGETS[name]
    return GPUTarget(target.backend, target.architecture, target.warp)


def options_for(options_of, target, **options):
    """Return what a host module's ``options_of`` chooses for triton's target."""
    from sinkgd.kernels.triton.launch import GpuTarget

    return options_of(GpuTarget(target.backend, target.warp_size), **options)


def build(kernel, types, constants, target, options):
    """Compile a kernel whose pointers are all multiples of 16.

    Args:
        kernel: Compiled by triton.
        types: Of its arguments, by name.
        constants: Its constants, by name.
        target: Triton's.
        options: The compiler's.
    """
    import triton
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options=options)


def facts(built):
    """Return what the compiled code says of a kernel."""
    from sinkgd.lab.bench.gpu.variants import machine_code

    return asdict(machine_code(built))
