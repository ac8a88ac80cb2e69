"""Memory of the first rank at the peak of a step, in bytes, by part.

The first rank holds the largest shards. What forward and backward hold besides weights is found by
running them on fake tensors. The state, the scratch of the update, and what FSDP holds while it
gathers and reduces follow from formulas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from sinkgd.contrib.adamw_8bit import CPU_ENTRIES
from sinkgd.lab.plan.method import Method, eight_bit_bytes, usual_rank
from sinkgd.lab.plan.rank_model import (
    Grid,
    Weight,
    largest_block,
    outside_blocks,
    trained,
    weights_of,
)
from sinkgd.lab.plan.trace import EMBEDDING, UPDATE, Live, Work, trace
from sinkgd.lab.train.machine import weight_dtype
from sinkgd.optim.methods.multi_normalized import (
    BATCH_BYTES,
    CPU_BATCH_BYTES,
    MATRICES_IN_USE,
)
from sinkgd.optim.transform import SCRATCH_BYTES, chunk_slices, vector_bytes, vector_chunks

_FLOAT32 = 4
# Tests in tests/lab/plan compare these constants with what a step allocates.
# Bytes per row or column that the sums of a sharded step use at once, nearly all float64: 43 to 50
# were measured on llama-9m over 16 ranks, and 4 more bytes per row or column are kept.
_SHARDED_SCALE = 54
# The same for row norms only: 24 to 27 were measured on llama-9m over 16 ranks.
_SHARDED_ROWS = 27
# Bytes that deflation uses at once per row or column and per direction that it follows, most of
# them float64. It follows one direction more than it lowers. On a CPU 22.8 were measured on
# llama-60m. On a GPU 20.3 were counted with triton's interpreter on a matrix of 1024 by 1024.
_DIRECTION = {"cpu": 24, "cuda": 21}
# The same on a mesh: 17.4 were measured on llama-60m over 16 ranks. The second number is what the
# loops of a CPU keep in addition if they process all matrices together: 7.7 were measured.
_MESH_DIRECTION, _KEPT_DIRECTION = 18, 8
# Bytes that bitsandbytes uses at once on a CPU for each entry that it updates: both moments, the
# gradient, the weight, the denominator and its root in float32. Measured with bfloat16 weights.
_EIGHT_BIT = 24
_TOKEN = 8  # bytes of a token id, and of a target


@dataclass(frozen=True)
class Memory:
    """Bytes on the first rank, by part, at the moment of the peak."""

    weights: int
    state: int
    gradients: int  # held at the peak
    activations: int
    loss: int  # logits, and everything computed from them
    transit: int  # unsharded weights and gradients that FSDP gathers and reduces
    scratch: int  # scratch of the update, the batch, and rotary tables
    moment: str  # the name of the moment of the peak
    # Gradients held when backward ends. If the gradients of a single micro-batch are released, this
    # is the largest gradient.
    all_gradients: int

    @property
    def peak(self) -> int:
        """All parts together."""
        parts = (self.gradients, self.activations, self.loss, self.transit, self.scratch)
        return self.weights + self.state + sum(parts)

    @property
    def weights_and_state(self) -> int:
        """The figure that the benchmark of GaLore and later papers report."""
        return self.weights + self.state

    @property
    def training(self) -> int:
        """Weights, gradients and state: the parts that do not depend on the batch."""
        return self.weights + self.state + self.all_gradients


def rank_memory(
    work: Work,
    grid: Grid,
    method: Method,
    *,
    rank: int | None = None,
    device: Literal["cpu", "cuda"] = "cuda",
) -> Memory:
    """Return the memory of the first rank at the peak of a step.

    Args:
        work: The rank's computation; gradients are released only if the method can do so.
        grid: The mesh.
        method: The optimizer.
        rank: Rank r of projections; by default as in GaLore's benchmark.
        device: Kind of device; SWAN, for example, updates more small matrices at once on a GPU.

    Raises:
        ConfigError: If the mesh cannot divide the model.
    """
    work = replace(work, adapter_rank=method.adapter_rank)
    weights = weights_of(work.architecture, grid, work.adapter_rank)
    ours = trained(weights)
    itemsize = weight_dtype(work.precision).itemsize
    released = work.release and method.can_release
    low_rank = usual_rank(work.architecture.hidden_size) if rank is None else rank
    largest = max(prod(w.shard) for w in ours) * itemsize
    whole = sum(prod(w.shard) for w in ours) * itemsize
    gradients = largest if released and work.micro_batches == 1 else whole
    base = Memory(
        weights=sum(prod(w.shard) for w in weights) * itemsize,
        state=state_bytes(ours, grid, method, itemsize, low_rank),
        gradients=0,
        activations=0,
        loss=0,
        transit=0,
        scratch=_batch_and_tables(work),
        moment="",
        all_gradients=gradients,
    )
    scratch = update_scratch(ours, grid, method, device=device, per_matrix=released)
    if grid.dp_shard > 1:
        peaks = _sharded(work, weights, base, gradients)
    else:
        peaks = _alone(replace(work, release=released), base)
    found = [
        replace(one, scratch=one.scratch + scratch)
        if moment == UPDATE or (released and _updates_in(moment, method))
        else one
        for moment, one in peaks.items()
    ]
    return max(found, key=lambda one: one.peak)


def _updates_in(moment: str, method: Method) -> bool:
    """Whether a moment has updates of released gradients that need scratch; AdamW needs none."""
    return "backward" in moment or (moment == EMBEDDING and method.eight_bit != "none")


def state_bytes(
    weights: Sequence[Weight], grid: Grid, method: Method, itemsize: int, rank: int
) -> int:
    """Return the bytes that a method keeps on the first rank.

    Args:
        weights: Weights of the model that are trained.
        grid: The mesh.
        method: The optimizer.
        itemsize: Bytes of each weight.
        rank: Rank r of projections. Their state is divided evenly among the ranks that
            shard the weights.
    """
    total = 0.0
    for weight in weights:
        # The size of the whole parameter decides whether it has 8-bit state.
        if method.is_eight_bit(is_matrix=weight.is_matrix):
            total += eight_bit_bytes(weight.count) * prod(weight.shard) / weight.count
        elif weight.is_matrix:
            low = method.low_rank is not None
            m, n = weight.shape if low else weight.shard
            ranks = grid.dp_shard * grid.tp if low else 1
            total += method.state_bytes(m, n, itemsize, min(rank, *weight.shape)) / ranks
        elif method.embedding is not None and weight.is_embedding:
            m, n = weight.shape
            kept = method.embedding_bytes(m, n, itemsize, is_head=weight.is_head)
            total += kept / (grid.dp_shard * grid.tp)
        else:
            total += method.rest * itemsize * prod(weight.shard)
        total += method.scalars * itemsize
        if method.has_step_counter(is_matrix=weight.is_matrix, is_embedding=weight.is_embedding):
            total += _FLOAT32 * method.counters
    return round(total)


def update_scratch(
    weights: Sequence[Weight],
    grid: Grid,
    method: Method,
    *,
    device: Literal["cpu", "cuda"],
    per_matrix: bool,
) -> int:
    """Return the bytes that the update allocates and gives back.

    SinkGD needs the scales of all matrices that it updates together. With deflation it also needs
    the directions of a few matrices and, on GPUs with a mesh, copies of these matrices. A method
    that creates matrices needs memory for copies of the largest matrix or, like SWAN, for copies of
    a batch of small matrices.

    Args:
        weights: Weights of the model that are trained.
        grid: The mesh.
        method: The optimizer.
        device: Kind of device.
        per_matrix: Whether each matrix is updated by itself, as it is when gradients are released.
    """
    coded = [prod(w.shard) for w in weights if method.is_eight_bit(is_matrix=w.is_matrix)]
    eight_bit = _EIGHT_BIT * min(CPU_ENTRIES, max(coded, default=0)) if device == "cpu" else 0
    matrices = [w for w in weights if w.is_matrix or (method.everywhere and w.is_embedding)]
    if not matrices:
        return eight_bit
    return max(eight_bit, _matrix_scratch(matrices, grid, method, device, per_matrix))


def _matrix_scratch(
    matrices: Sequence[Weight],
    grid: Grid,
    method: Method,
    device: Literal["cpu", "cuda"],
    per_matrix: bool,
) -> int:
    """Return the bytes that the update of these matrices allocates and gives back."""
    is_sharded = grid.dp_shard * grid.tp > 1
    lengths = [w.shard[0] + w.shard[1] for w in matrices]
    if method.exchange == "rows" and is_sharded:
        return _SHARDED_ROWS * (max(lengths) if per_matrix else sum(lengths))
    if method.exchange == "vectors" and not method.scratch:
        scales = _SHARDED_SCALE if is_sharded else _FLOAT32
        found = scales * (max(lengths) if per_matrix else sum(lengths))
        if method.directions and is_sharded:
            kept = _FLOAT32 * (max(lengths) if per_matrix else sum(lengths))
            more = _mesh_deflation_scratch(matrices, method.directions, device, per_matrix)
            return max(found, kept + more)
        if method.directions:
            room = 0 if per_matrix else SCRATCH_BYTES
            found += _deflation_scratch(matrices, method.directions, room, device)
        return found
    if method.copies:
        sizes = [_FLOAT32 * prod(w.shard) for w in matrices]
        runs = chunk_slices(sizes, 0 if per_matrix else SCRATCH_BYTES)
        if is_sharded and not per_matrix:
            runs = vector_chunks(sizes)
        held = max(sum(sizes[run]) + _FLOAT32 * sum(lengths[run]) for run in runs)
        return round(method.copies * held + method.scratch * max(sizes))
    # For all other methods whole matrices are assumed, even if a rank holds only a shard.
    largest = max(w.count for w in matrices) * _FLOAT32
    batch_bytes = CPU_BATCH_BYTES if device == "cpu" else BATCH_BYTES
    batch = batch_bytes // MATRICES_IN_USE if method.batched else 0
    one_shape = max(_same_shape(matrices).values()) * _FLOAT32
    return round(method.scratch * max(largest, min(batch, one_shape)))


def _deflation_scratch(
    matrices: Sequence[Weight], directions: int, room: int, device: Literal["cpu", "cuda"]
) -> int:
    """Return the bytes that deflation needs for the matrices that it processes together.

    A CPU processes a few matrices at a time. A GPU processes as many together as it does on a mesh,
    but copies none of them.
    """
    if device == "cuda":
        held = [vector_bytes(w.shard[0], w.shard[1], directions + 1) for w in matrices]
        runs = vector_chunks(held) if room else chunk_slices(held, 0)
    else:
        runs = chunk_slices([_FLOAT32 * prod(w.shard) for w in matrices], room)
    needs = [_DIRECTION[device] * (directions + 1) * sum(w.shard) for w in matrices]
    return max(sum(needs[run]) for run in runs)


def _mesh_deflation_scratch(
    matrices: Sequence[Weight], directions: int, device: Literal["cpu", "cuda"], per_matrix: bool
) -> int:
    """Return the bytes that deflation needs on a mesh.

    They hold the vectors of consecutive matrices and, on a GPU, copies of a few of these matrices.
    """
    held = [vector_bytes(w.shard[0], w.shard[1], directions + 1) for w in matrices]
    runs = [slice(i, i + 1) for i in range(len(held))] if per_matrix else vector_chunks(held)
    most = 0
    for run in runs:
        vectors = (directions + 1) * sum(sum(w.shard) for w in matrices[run])
        copies = [_FLOAT32 * prod(w.shard) for w in matrices[run]]
        need = _MESH_DIRECTION * vectors
        if device != "cpu":
            need += min(sum(copies), max(*copies, SCRATCH_BYTES))
        elif sum(copies) <= SCRATCH_BYTES:
            need += _KEPT_DIRECTION * vectors
        most = max(most, need)
    return most


def _same_shape(matrices: Sequence[Weight]) -> Mapping[tuple[int, ...], int]:
    sizes: dict[tuple[int, ...], int] = {}
    for weight in matrices:
        sizes[weight.shape] = sizes.get(weight.shape, 0) + weight.count
    return sizes


def _alone(work: Work, base: Memory) -> dict[str, Memory]:
    return {moment: _at(base, moment, live) for moment, live in trace(work).items()}


def _sharded(
    work: Work, weights: Sequence[Weight], base: Memory, gradients: int
) -> dict[str, Memory]:
    """Add what FSDP2 holds unsharded: embedding, head, the block in use and the next block.

    In backward the gradients of a block are unsharded, too, and are reduced from a copy. Those of
    embedding and head are reduced together at the end. The result is an upper bound.
    """
    itemsize = weight_dtype(work.precision).itemsize
    gathered = 2 if work.precision == "bf16-autocast" else itemsize
    outside, block = outside_blocks(weights), largest_block(weights)
    reduced = largest_block(trained(weights))
    head = work.architecture.vocab_size * work.architecture.hidden_size // work.tp
    if not any(w.is_trained and w.block is None for w in weights):
        head = 0
    in_use = gathered * (outside + 2 * block)
    # Unsharded gradients are reduced and freed as soon as they are complete.
    lives = trace(replace(work, release=True, micro_batches=1))
    peaks = {}
    for moment, live in lives.items():
        one = replace(_at(base, moment, live), gradients=gradients)
        if moment == EMBEDDING:
            # Weights are freed before gradients are copied; the embedding's gradient is in `live`.
            one = replace(one, transit=max(gathered, itemsize) * outside + itemsize * head)
        elif moment.startswith("backward"):
            one = replace(one, transit=in_use + itemsize * (head + 2 * reduced))
        elif moment != UPDATE:  # the first micro-batch has no gradient yet
            kept = gradients if work.micro_batches > 1 else 0
            one = replace(one, transit=in_use, gradients=kept)
        peaks[moment] = one
    return peaks


def _at(base: Memory, moment: str, live: Live) -> Memory:
    return replace(
        base,
        moment=moment,
        gradients=live.gradients,
        activations=live.activations,
        loss=live.loss,
    )


def _batch_and_tables(work: Work) -> int:
    tokens = work.batch_size * work.micro_batches * work.sequence_length
    tables = _FLOAT32 * work.sequence_length * work.architecture.head_size
    return 2 * _TOKEN * tokens + tables
