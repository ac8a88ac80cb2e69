"""What FSDP2 holds on a rank of eight is at most what the plan says, and not much less.

The ranks are one process and seven that are not there: collectives send nothing, and allocate what
they do among real ones.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from sinkgd.lab.bench.bench_memory import running_sum
from sinkgd.lab.models import build_model
from sinkgd.lab.plan import Grid, Work, find_architecture, find_method, rank_memory
from sinkgd.lab.train.training_step import loss_of

RANKS, SEQUENCES, TOKENS = 8, 2, 128


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def measured(mesh, preset, vocab_size, dtype, recompute, chunk):
    model = build_model(preset, vocab_size=vocab_size, max_sequence_length=TOKENS).to(dtype)
    model.model.recompute = recompute
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, vocab_size, (SEQUENCES, TOKENS))

    def step():
        torch.autograd.backward(loss_of(model, tokens, tokens, chunk) / tokens.numel())
        optimizer.step()

    step()
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(p.to_local().nbytes for p in model.parameters()) + running_sum(changes).peak


@pytest.mark.parametrize(
    ("preset", "vocab_size", "precision", "recompute", "chunk"),
    [
        ("llama-20m", 512, "float32", False, None),
        ("llama-60m", 512, "bf16", True, None),
        ("llama-60m", 32_000, "bf16", True, 128),
    ],
)
def test_the_plan_of_a_sharded_step_is_no_less_than_it_takes(
    mesh, preset, vocab_size, precision, recompute, chunk
):
    work = Work(
        replace(find_architecture(preset), vocab_size=vocab_size),
        batch_size=SEQUENCES,
        sequence_length=TOKENS,
        precision=precision,
        recompute=recompute,
        loss_chunk_tokens=chunk,
    )
    planned = rank_memory(work, Grid(dp_shard=RANKS), find_method("sgd")).peak
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    peak = measured(mesh, preset, vocab_size, dtype, recompute, chunk)
    assert peak <= planned <= 1.25 * peak
