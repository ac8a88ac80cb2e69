"""Bytes are those of the tensors, and the peak is this process's own."""

import subprocess
import sys

import torch
from torch import nn

from sinkgd.lab.results import Memory
from sinkgd.lab.train.memory import measure_memory, peak_bytes

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


def test_the_largest_is_taken_part_by_part():
    assert Memory.largest([Memory(1, 5, 2, 9), Memory(4, 3, 2, 10)]) == Memory(4, 5, 2, 10)


def test_the_peak_covers_a_large_tensor():
    size = peak_bytes(CPU) + 2**26
    torch.ones(size, dtype=torch.uint8)
    assert peak_bytes(CPU) > size


def test_a_child_does_not_report_its_parents_peak():
    held = torch.ones(2**30, dtype=torch.uint8)
    code = (
        "import torch; from sinkgd.lab.train.memory import peak_bytes;"
        "print(peak_bytes(torch.device('cpu')))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < held.numel()
