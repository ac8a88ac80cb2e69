"""Bytes are those of the tensors, and the peak is this process's own."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from sinkgd.lab.results import Memory
from sinkgd.lab.train.machine import peak_bytes
from sinkgd.lab.train.state import measure_memory, state_tensors

CPU = torch.device("cpu")


def test_parts_are_counted_from_the_tensors():
    model = nn.Linear(10, 6, bias=False).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    before = measure_memory(model, optimizer, CPU)
    assert (before.weights_bytes, before.gradients_bytes, before.state_bytes) == (120, 0, 0)
    model(torch.ones(1, 10, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    after = measure_memory(model, optimizer, CPU)
    step_counter = 4
    assert (after.gradients_bytes, after.state_bytes) == (120, 2 * 120 + step_counter)


def test_tensors_in_lists_of_the_state_are_counted():
    matrix = nn.Parameter(torch.ones(3, 5))
    optimizer = torch.optim.SGD([matrix])
    optimizer.state[matrix] = {"bases": [torch.ones(3, 3), [], torch.ones(5, 5)], "number": 1}
    assert sum(tensor.nbytes for tensor in state_tensors(optimizer)) == 4 * (9 + 25)


def test_the_largest_is_taken_part_by_part():
    assert Memory.largest([Memory(1, 5, 2, 9), Memory(4, 3, 2, 10)]) == Memory(4, 5, 2, 10)


def test_the_peak_covers_a_large_tensor():
    size = peak_bytes(CPU) + 2**26
    torch.ones(size, dtype=torch.uint8)
    assert peak_bytes(CPU) > size


def test_a_child_does_not_report_its_parents_peak():
    held = torch.ones(2**29, dtype=torch.uint8)
    code = (
        "import torch; from sinkgd.lab.train.machine import peak_bytes;"
        "print(peak_bytes(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < held.numel()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps freed blocks")
def test_freed_blocks_of_2_mib_go_back_to_the_system():
    """Blocks between them, as the inputs of a model's blocks are, do not hold them."""
    code = """
import re, torch
from pathlib import Path
from sinkgd.lab.train.machine import return_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

return_freed_memory()
passing, kept = [], []
for _ in range(50):
    passing.append(torch.ones(2 << 20, dtype=torch.uint8))
    kept.append(torch.ones(64 << 10, dtype=torch.uint8))
before = resident()
passing.clear()
print(before - resident())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) > 45 * (2 << 20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps freed blocks")
def test_a_kept_block_is_not_asked_of_the_system_again():
    """Steps have no page faults once a few have laid out the blocks that are kept."""
    code = """
import resource, torch
from sinkgd.lab.train.machine import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    before = faults()
    logits = torch.ones(128 << 20, dtype=torch.uint8)
    gradient = torch.ones(128 << 20, dtype=torch.uint8)
    del logits, gradient
    return faults() - before

keep_freed_memory()
print(*(step() for _ in range(20)))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *others = map(int, child.stdout.split())
    assert sum(others[9:]) < first / 100
