"""What a rank sends in a step, and how long the step takes.

Bytes are those of the whole tensor that a collective gathers, reduces or sums. In a ring of p ranks
a rank sends (p − 1)/p of them for an all-gather or a reduce-scatter, and twice that for an
all-reduce. Matrix products run at an assumed fraction of the device's peak. Compute and the
messages of data parallelism overlap; a rank waits for the messages of tensor parallelism and of the
optimizer. Latency is left out, so times are estimates for large messages.

Letters:
    m, n: rows and columns of a matrix
    L: iterations of SR-Sinkhorn
    k: number of directions that deflation follows, one more than it lowers
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from sinkgd.lab.devices import DeviceSheet
from sinkgd.lab.plan.method import Method, Sides, usual_rank
from sinkgd.lab.plan.rank_model import Grid, Weight, trained, weights_of
from sinkgd.lab.plan.trace import Work
from sinkgd.lab.train.machine import weight_dtype
from sinkgd.optim.transform import (
    MESH_SCRATCH_BYTES,
    chunk_slices,
    vector_bytes,
    vector_chunks,
)

_FLOAT32, _FLOAT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Messages:
    """Collectives of one kind over one group, in a step."""

    what: str
    group: str  # dp_replicate, dp_shard or tp
    kind: str  # all-gather, reduce-scatter or all-reduce
    count: int
    bytes: int  # of all these collectives together
    ranks: int  # number of ranks in the group
    optimizer: bool = False  # whether the optimizer sends them, not forward or backward

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a ring."""
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.ranks - 1) / self.ranks


def training_communication(work: Work, grid: Grid) -> list[Messages]:
    """List the collectives of forward and backward, for all micro-batches."""
    weights = weights_of(work.architecture, grid, work.adapter_rank)
    found: list[Messages] = []
    if grid.dp_shard > 1:
        found += _fsdp(work, grid, weights)
    if grid.dp_replicate > 1:
        size = sum(prod(w.shard) for w in trained(weights)) * weight_dtype(work.precision).itemsize
        units = work.architecture.num_layers + 1
        n = grid.dp_replicate
        found.append(Messages("gradients", "dp_replicate", "all-reduce", units, size, n))
    if grid.tp > 1:
        found += _tensor_parallel(work, grid)
    return found


def optimizer_communication(work: Work, grid: Grid, method: Method) -> list[Messages]:
    """List the collectives of the optimizer's step on hidden matrices."""
    weights = [w for w in weights_of(work.architecture, grid, work.adapter_rank) if w.is_matrix]
    sharded = [(g, k) for g, k in (("tp", grid.tp), ("dp_shard", grid.dp_shard)) if k > 1]
    if method.exchange == "nothing" or not sharded:
        return []
    if method.exchange in ("vectors", "rows"):
        what = "sums of rows" if method.exchange == "rows" else "sums of rows and columns"
        return [
            Messages(
                what,
                group,
                "all-reduce",
                *_of_vectors(weights, grid, method, group),
                ranks,
                optimizer=True,
            )
            for group, ranks in sharded
        ]
    itemsize = weight_dtype(work.precision).itemsize
    gathers = method.exchange == "matrices"
    rank = usual_rank(work.architecture.hidden_size) if method.name == "apollo" else 1
    what, kind = ("matrices", "all-gather") if gathers else ("projections", "all-reduce")
    # Shards of rows are gathered first, over the slower links, then the parts of the tp group.
    found = []
    for group, ranks in sharded:
        size = sum(_sent_whole(w, group, gathers, rank) for w in weights)
        found.append(
            Messages(what, group, kind, len(weights), itemsize * size, ranks, optimizer=True)
        )
    return found


def _of_vectors(
    weights: Sequence[Weight], grid: Grid, method: Method, group: str
) -> tuple[int, int]:
    """Return the number of messages of a group for sums of rows and columns, and their bytes."""
    if method.exchange == "rows":
        return _of_rows(weights, group)
    parts = [slice(len(weights))]
    if method.in_parts:
        parts = chunk_slices([_FLOAT32 * prod(w.shard) for w in weights], MESH_SCRATCH_BYTES)
    count = method.iterations * len(parts)
    numbers = method.iterations * sum(vector_length(w, grid, group) for w in weights)
    if method.directions:
        vectors = (method.directions + 1) * (2 if method.keeps_directions else 1)
        held = [vector_bytes(w.shard[0], w.shard[1], vectors) for w in weights]
        for some in map(weights.__getitem__, vector_chunks(held)):
            ways = {_is_cut_by_columns(w, group) for w in some}
            count += 2 * (False in ways) + 4 * (True in ways)
            numbers += sum(_deflation_length(w, group, method.directions) for w in some)
    if method.copies:
        parts = vector_chunks([_FLOAT32 * method.copies * prod(w.shard) for w in weights])
    for some in map(weights.__getitem__, parts):
        own_count, own_numbers = _of_sums(some, method, group)
        count, numbers = count + own_count, numbers + own_numbers
    return count, _FLOAT64 * numbers


def _of_sums(weights: Sequence[Weight], method: Method, group: str) -> tuple[int, int]:
    """Return the messages of a group for `Method.sums` and `Method.flags`, and their numbers."""
    lengths = []
    for sums in method.sums:
        ways = {"columns": (True,), "rows": (False,), "sides": (True, False)}[sums.over]
        cut = [w for w in weights if _is_cut_by_columns(w, group) in ways]
        sides = [Sides(w.shard[0], w.divided[1], min(method.memory_rank, *w.shape)) for w in cut]
        lengths.append(sum(map(sums.numbers, sides)))
    count, numbers = len([length for length in lengths if length]), sum(lengths)
    if method.flags != "none":
        count, numbers = count + (method.flags == "alone"), numbers + len(weights)
    return count, numbers


def _of_rows(weights: Sequence[Weight], group: str) -> tuple[int, int]:
    """Return the number of messages for one sum of rows, and their bytes.

    A first message says whether the shards are finite.
    """
    cut_rows = [w.shard[0] for w in weights if _is_cut_by_columns(w, group)]
    return 1 + bool(cut_rows), _FLOAT64 * (len(weights) + sum(cut_rows))


def _deflation_length(weight: Weight, group: str, directions: int) -> int:
    """Return how many numbers `sinkgd.deflation.find_leading` adds up over ranks for a matrix.

    Messages over columns have mk, kk + 1, mk and k numbers; messages over rows have nk + 1 and
    nk + kk.
    """
    k = min(directions + 1, *weight.shape)
    if _is_cut_by_columns(weight, group):
        return 1 + 2 * k * weight.shard[0] + k * k + k
    return 1 + 2 * k * weight.divided[1] + k * k


def _is_cut_by_columns(weight: Weight, group: str) -> bool:
    return group == "tp" and weight.divided[1] < weight.shape[1]  # o_proj and down_proj


def vector_length(weight: Weight, grid: Grid, group: str) -> int:
    """Return how many numbers a group adds up for a matrix in one iteration.

    The message with the sums of n columns also has the number of nonzero rows and of rows that
    still change. The message with the sums of m rows also has the number of nonzero columns. See
    `sinkgd.distributed.scales`.

    Args:
        weight: A matrix.
        grid: The mesh; FSDP divides rows, tensor parallelism rows or columns.
        group: ``tp`` or ``dp_shard``.
    """
    if _is_cut_by_columns(weight, group):
        return weight.shard[0] + 1
    if group == "tp" and grid.tp == 1:
        return 0
    return weight.divided[1] + 2


def _sent_whole(weight: Weight, group: str, gathers: bool, rank: int) -> int:
    if gathers:
        shape = weight.divided if group == "dp_shard" else weight.shape
        return prod(shape)
    return min(rank, *weight.shape) * max(weight.shape)


def _fsdp(work: Work, grid: Grid, weights: Sequence[Weight]) -> list[Messages]:
    """List FSDP's collectives: blocks are gathered in forward and backward, other weights once."""
    itemsize = weight_dtype(work.precision).itemsize
    gathered = 2 if work.precision == "bf16-autocast" else itemsize
    layers, micro, k = work.architecture.num_layers, work.micro_batches, grid.dp_shard
    # Shards are padded to equal size, as in FSDP2.
    blocks = k * sum(prod(w.shard) for w in weights if w.block is not None)
    outside = k * sum(prod(w.shard) for w in weights if w.block is None)
    reduced = k * sum(prod(w.shard) for w in trained(weights))
    return [
        Messages(
            "weights",
            "dp_shard",
            "all-gather",
            micro * (2 * layers + 1),
            micro * gathered * (2 * blocks + outside),
            k,
        ),
        Messages(
            "gradients",
            "dp_shard",
            "reduce-scatter",
            micro * (layers + 1),
            micro * itemsize * reduced,
            k,
        ),
    ]


def _tensor_parallel(work: Work, grid: Grid) -> list[Messages]:
    """List the collectives of tensor parallelism.

    In forward, attention and MLP each gather the tokens and scatter their sums; the embedding adds
    a scatter, and the last norm a gather. Backward does the opposite, and recomputed blocks repeat
    the collectives of forward. The logits of the whole vocabulary are gathered on every rank,
    and again in backward if the loss is computed in chunks.
    """
    a, k, micro = work.architecture, grid.tp, work.micro_batches
    itemsize = 4 if work.precision == "float32" else 2
    tokens = work.batch_size * work.sequence_length
    forward = 2 * a.num_layers
    gathers = micro * (forward * (3 if work.recompute else 2) + 2)
    hidden = itemsize * tokens * a.hidden_size
    chunks = 1
    if work.loss_chunk_tokens is not None:
        chunks = -(-tokens // work.loss_chunk_tokens)
    logits = (1 if work.loss_chunk_tokens is None else 2) * itemsize * tokens * a.vocab_size
    times = micro * chunks * (1 if work.loss_chunk_tokens is None else 2)
    return [
        Messages("hidden states", "tp", "all-gather", gathers, gathers * hidden, k),
        Messages("hidden states", "tp", "reduce-scatter", gathers, gathers * hidden, k),
        Messages("logits", "tp", "all-gather", times, micro * logits, k),
    ]


# Reads and writes per entry, as in sinkgd.lab.bench.contenders.
_ADAMW_PASSES, _SGD_PASSES = 7, 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by cause."""

    compute: float
    sharding: float  # messages of dp_shard and dp_replicate, which overlap with compute
    tensor_parallel: float
    update: float  # memory traffic of weights, gradients and state, and matrix products
    optimizer_messages: float

    @property
    def step(self) -> float:
        """The time of the whole step."""
        waited = self.tensor_parallel + self.update + self.optimizer_messages
        return max(self.compute, self.sharding) + waited


def flops_of(work: Work) -> float:
    """Return the floating-point operations of a tp group in a step, including recomputed ones.

    Each weight takes two operations per token in forward, and four in backward, or two if it is
    frozen. Attention is over previous tokens. The embedding takes no operations.
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
    if work.adapter_rank:
        adapters = sum(w.count for w in trained(weights_of(a, adapter_rank=work.adapter_rank)))
        runs += 3 * 2.0 * adapters - 2.0 * (matrices + head)
        blocks += 2.0 * adapters
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
        work: The computation of one rank.
        grid: The mesh.
        method: The optimizer.
        device: Device of every rank.
        messages: All messages of the step.
        mfu: Assumed fraction of the device's peak that matrix products reach.
    """
    # On every device in `sinkgd.lab.devices`, TF32 has half the rate of bfloat16.
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
    weights = trained(weights_of(work.architecture, grid, work.adapter_rank))
    itemsize = weight_dtype(work.precision).itemsize
    rest = _ADAMW_PASSES if method.rest else _SGD_PASSES
    moved = 0
    for w in weights:
        is_alike = w.is_matrix or (method.everywhere and w.is_embedding)
        moved += itemsize * prod(w.shard) * (method.passes if is_alike else rest)
    flops = sum(method.flops(min(w.shape), max(w.shape)) for w in weights if w.is_matrix)
    return moved / device.memory_rate + flops / (grid.dp_shard * grid.tp) / rate
