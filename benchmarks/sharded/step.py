"""Compare a sharded step with a chain of DTensor operations per matrix, for llama-60m's matrices.

torchrun --nproc-per-node 2 benchmarks/sharded/step.py OUT.json
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import sinkgd
from sinkgd.lab.models.presets import PRESETS
from sinkgd.lab.train.machine import describe_environment

ROUNDS, LR, ITERATIONS = 9, 1e-4, 5


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives and the bytes that are given to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in {"c10d", "_c10d_functional"} and "wait" not in str(func):
            self.collectives += 1
            given = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.bytes += sum(x.nbytes for x in given if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def shapes(preset: str) -> list[tuple[int, int]]:
    """Return the shapes of the matrices inside a preset's blocks."""
    c = PRESETS[preset]
    h, inner = c.hidden_size, c.intermediate_size
    return ([(h, h)] * 4 + [(inner, h)] * 2 + [(h, inner)]) * c.num_layers


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradient of each parameter; all have one."""
    return [param.grad for param in params if param.grad is not None]


@torch.no_grad()
def chain(params: list[nn.Parameter]) -> None:
    """Normalize rows and columns as most public code does, and let DTensor find the messages."""
    for param, grad in zip(params, gradients(params), strict=True):
        x, (m, n) = grad, grad.shape
        for _ in range(ITERATIONS):
            x = x * (n**0.5 / torch.linalg.vector_norm(x, dim=1, keepdim=True))
            x = x * (m**0.5 / torch.linalg.vector_norm(x, dim=0, keepdim=True))
        param.add_(x, alpha=-LR)


def measure(function: Callable[[], object]) -> dict[str, int]:
    """Count the collectives of a step, and the bytes given to the library's own collectives."""
    with CommDebugMode() as seen, Sent() as sent:  # type: ignore[no-untyped-call]
        function()
    return {"collectives": seen.get_total_counts() or sent.collectives, "bytes": sent.bytes}


def main() -> None:
    """Time the two steps in turns; rank 0 writes the record."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = []
    for shape in shapes("llama-60m"):
        param = nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
        params.append(param)
    optimizer = sinkgd.SinkGD(params, lr=LR, sinkhorn_iterations=ITERATIONS)
    contenders: dict[str, Callable[[], object]] = {
        "sinkgd": optimizer.step,
        "chain": lambda: chain(params),
    }
    sent = {name: measure(step) for name, step in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, step in contenders.items():
            dist.barrier()
            started = time.perf_counter()
            step()
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        record = {
            "command": "torchrun --nproc-per-node 2 benchmarks/sharded/step.py OUT.json",
            "environment": describe_environment(torch.device("cpu")),
            "ranks": dist.get_world_size(),
            "matrices": len(params),
            "gradient_bytes": sum(grad.nbytes for grad in gradients(params)),
            "sent": sent,
            "seconds": seconds,
            "times_faster": medians["chain"] / medians["sinkgd"],
        }
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


main()
