"""How long a step takes, at an assumed part of the device's peak.

Compute and FSDP's messages go on at the same time; tensor parallelism's and the optimizer's are
waited for. Latency is left out: an estimate for large messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from sinkgd.lab.devices import DeviceSheet
from sinkgd.lab.plan.methods import Method
from sinkgd.lab.plan.trace import Work
from sinkgd.lab.plan.traffic import Messages
from sinkgd.lab.plan.weights import Grid, weights_of
from sinkgd.lab.train.machine import weight_dtype

_ADAMW_PASSES, _SGD_PASSES = 7, 3  # over an entry, as in sinkgd.lab.bench.contenders


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what takes them."""

    compute: float
    sharding: float  # FSDP's messages, in the shadow of compute
    tensor_parallel: float
    update: float  # reading and writing weights, gradients and state; products
    optimizer_messages: float

    @property
    def step(self) -> float:
        """All that one waits for."""
        waited = self.tensor_parallel + self.update + self.optimizer_messages
        return max(self.compute, self.sharding) + waited


def flops_of(work: Work) -> float:
    """Return the floating-point operations of a step's sequences, those that run again included.

    Two a weight and token in forward, four in backward; attention over the tokens before. The
    embedding multiplies nothing.
    """
    a = work.architecture
    weights = weights_of(a)
    tokens = work.micro_batches * work.batch_size * work.sequence_length
    matrices = sum(w.count for w in weights if w.is_matrix)
    head = a.vocab_size * a.hidden_size
    attention = a.num_layers * work.sequence_length * a.num_heads * a.head_size
    blocks = 2.0 * matrices + 2.0 * attention
    chunked = work.loss_chunk_tokens is not None
    runs = 3 * blocks + 3 * 2.0 * head
    return tokens * (runs + blocks * work.recompute + 2.0 * head * chunked)


def step_time(
    work: Work,
    grid: Grid,
    method: Method,
    device: DeviceSheet,
    messages: Sequence[Messages],
    *,
    mfu: float,
) -> StepTime:
    """Estimate the time of a step.

    Args:
        work: Of a rank.
        grid: The mesh.
        method: The optimizer.
        device: Of every rank.
        messages: All that are sent.
        mfu: The part of the device's peak that products reach, assumed.
    """
    # Of every device in the table TF32 has half the rate of bfloat16.
    rate = mfu * device.flops * (0.5 if work.precision == "float32" else 1.0)

    def seconds(chosen: Sequence[Messages]) -> float:
        return sum(
            one.sent
            / (device.node_rate if grid.span(one.group) <= device.node else device.network_rate)
            for one in chosen
        )

    ours = [one for one in messages if one.optimizer]
    others = [one for one in messages if not one.optimizer]
    return StepTime(
        compute=flops_of(work) / grid.tp / rate,
        sharding=seconds([one for one in others if one.group != "tp"]),
        tensor_parallel=seconds([one for one in others if one.group == "tp"]),
        update=_update_seconds(work, grid, method, device, rate),
        optimizer_messages=seconds(ours),
    )


def _update_seconds(
    work: Work, grid: Grid, method: Method, device: DeviceSheet, rate: float
) -> float:
    weights = weights_of(work.architecture, grid)
    itemsize = weight_dtype(work.precision).itemsize
    rest = _ADAMW_PASSES if method.rest else _SGD_PASSES
    moved = sum(
        itemsize * prod(w.piece) * (method.passes if w.is_matrix else rest) for w in weights
    )
    flops = sum(method.flops(min(w.shape), max(w.shape)) for w in weights if w.is_matrix)
    return moved / device.memory_rate + flops / (grid.dp_shard * grid.tp) / rate
