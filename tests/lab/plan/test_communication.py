"""What a plan says is sent is what the library sends, and what its documents say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import sinkgd
from sinkgd.kernels.triton import launch
from sinkgd.lab.bench.bench_memory import allocations
from sinkgd.lab.plan import (
    Grid,
    Work,
    find_architecture,
    find_method,
    peak_memory,
    step_time,
)
from sinkgd.lab.plan.methods import FAMILY
from sinkgd.lab.plan.peak_memory import update_scratch
from sinkgd.lab.plan.rank_model import weights_of
from sinkgd.lab.plan.step_time import Messages, optimizer_communication, training_communication
from sinkgd.optim import transform
from spawn import on_ranks

ROOT = Path(__file__).parents[3]
SINKGD = find_method("sinkgd-paper")


def vectors(architecture, grid, method=SINKGD):
    return optimizer_communication(Work(architecture), grid, method)


def test_two_ranks_send_what_was_measured():
    record = json.loads((ROOT / "benchmarks/sharded/2026-11-25.json").read_text(encoding="utf-8"))
    (found,) = vectors(find_architecture("llama-60m"), Grid(dp_shard=record["ranks"]))
    assert found.count == record["sent"]["sinkgd"]["collectives"]
    assert found.bytes == record["sent"]["sinkgd"]["bytes"]


@pytest.mark.parametrize(
    ("model", "printed"),
    [
        ("llama-60m", "1.4 MiB"),
        ("llama-130m", "3.1 MiB"),
        ("llama-350m", "8.1 MiB"),
        ("llama-1b", "16 MiB"),
        ("llama-7b", "43 MiB"),
        ("llama-3-70b", "238 MiB"),
    ],
)
def test_the_table_of_how_it_works_is_the_plans(model, printed):
    (found,) = vectors(find_architecture(model), Grid(dp_shard=2))
    number = float(printed.split()[0])
    assert found.bytes / 2**20 == pytest.approx(number, abs=0.5 if number > 10 else 0.05)
    name = "70B" if "70b" in model else model
    rows = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8").splitlines()
    assert any(row.startswith(f"| {name}") and f"| {printed} |" in row for row in rows)


class Sent(TorchDispatchMode):
    """Counts the collectives of each group size and their bytes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allreduce" in str(func):
            self.calls += [x.nbytes for x in args[0]]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def sixteen_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    yield
    dist.destroy_process_group()


def step_on_a_mesh(architecture, shape, make):
    """Return an optimizer of a model's matrices, which lie on a mesh with gradients, unstepped."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    params = []
    for weight in weights_of(architecture, Grid(*shape)):
        if weight.is_matrix:
            columns = weight.divided[1] < weight.shape[1]
            places = [Replicate(), Shard(0), Shard(1 if columns else 0)]
            pieces = [_on(mesh, weight, places) for _ in range(2)]
            param = nn.Parameter(pieces[0])
            param.grad = pieces[1]
            params.append(param)
    return make(params)


def variant(**options):
    return lambda params: sinkgd.SinkGDVariant(params, lr=1e-3, **options)


# Every method of the family whose messages the plan counts.
MADE_BY = {
    "sinkgd-paper": lambda params: sinkgd.SinkGD(params, lr=1e-3),
    "sinkgd-stateless": lambda params: sinkgd.SinkGD(params, lr=1e-3),
    "sinkgd": lambda params: sinkgd.SinkGD(params, lr=1e-3, deflated_rank=15),
    "sinkgd-8bit": lambda params: sinkgd.SinkGD(params, lr=1e-3, deflated_rank=15),
    "sinkgd-table": lambda params: sinkgd.SinkGD(params, lr=1e-3),
    "sinkgd-momentum": lambda params: sinkgd.SinkGD(params, lr=1e-3, momentum=0.9),
    "sinkgd-momentum-8bit": variant(momentum=0.9, momentum_place="after", momentum_bits=8),
    "sinkgd-low-rank": variant(momentum_rank=16),
    "sinkgd-cross-fit": variant(cross_fit=True),
    "sinkgd-averaged-scales": variant(averaged_scales=0.9),
    "sinkgd-kept": variant(deflated_rank=15, deflated_start="kept"),
    "sinkgd-pinned": variant(operator_norm="unit"),
    "sinkgd-projected": variant(weight_projection=True),
    "sinkgd-constant-norm": variant(constant_norm=True),
    "sron": lambda params: sinkgd.SRON(params, lr=1e-3),
    "scale": lambda params: sinkgd.SCALE(params, lr=1e-3),
}


def test_the_messages_of_every_method_of_the_family_are_compared():
    exchanging = {own.name for own in FAMILY if own.exchange not in ("nothing", "matrices")}
    assert set(MADE_BY) == exchanging


@pytest.mark.usefixtures("sixteen_ranks")
@pytest.mark.parametrize("shape", [(2, 8, 1), (2, 2, 4), (1, 4, 4), (1, 1, 16)], ids=str)
@pytest.mark.parametrize("name", MADE_BY)
def test_a_step_on_a_mesh_sends_what_the_plan_says(shape, name, monkeypatch):
    monkeypatch.setattr(transform, "MESH_VECTOR_BYTES", 300_000)  # several runs
    for module in (transform, step_time):
        monkeypatch.setattr(module, "MESH_SCRATCH_BYTES", 50_000)
    nine = replace(find_architecture("llama-9m"), num_heads=16, num_kv_heads=16, head_size=8)
    grid, method = Grid(*shape), find_method(name)
    optimizer = step_on_a_mesh(nine, shape, MADE_BY[name])
    with Sent() as sent:
        if name == "sinkgd-cross-fit":
            (group,) = optimizer.param_groups
            grads = [param.grad for param in group["params"]]
            optimizer.hold_out()
            for param, grad in zip(group["params"], grads, strict=True):
                param.grad = grad
        optimizer.step()
    planned = vectors(nine, grid, method)
    assert len(sent.calls) == sum(one.count for one in planned)
    assert sum(sent.calls) == sum(one.bytes for one in planned)
    if method.directions:
        assert len(sent.calls) > 5 * len(planned) + 6
    if method.in_parts:
        assert len(sent.calls) > 10 * len(planned)
    if name not in ("sinkgd-paper", "sron"):
        return
    scratch = update_scratch(weights_of(nine, grid), grid, method, device="cpu", per_matrix=False)
    used = allocations(optimizer.step, torch.device("cpu")).peak
    assert 0.8 * scratch < used <= scratch


@pytest.mark.usefixtures("sixteen_ranks")
@pytest.mark.parametrize(("backend", "device"), [("cpu", "cpu"), ("eager", "cuda")])
@pytest.mark.parametrize("copied", [1 << 18, 1 << 26], ids=["copied by runs", "copied at once"])
def test_the_scratch_of_a_deflated_step_on_a_mesh_is_planned(backend, device, copied, monkeypatch):
    for module in (transform, peak_memory):
        monkeypatch.setattr(module, "SCRATCH_BYTES", copied)
    sixty = replace(find_architecture("llama-60m"), num_heads=16, num_kv_heads=16, head_size=32)
    grid = Grid(dp_shard=16)
    optimizer = step_on_a_mesh(
        sixty,
        (1, 16, 1),
        lambda params: sinkgd.SinkGD(params, lr=1e-3, deflated_rank=15, backend=backend),
    )
    optimizer.step()
    scratch = update_scratch(
        weights_of(sixty, grid), grid, find_method("sinkgd"), device=device, per_matrix=False
    )
    used = allocations(optimizer.step, torch.device("cpu")).peak
    assert 0.8 * scratch < used <= scratch


def sent_by_a_deflated_step():
    """Return what two ranks send in a step of the default recipe, and what the plan counts."""
    nine = replace(find_architecture("llama-9m"), num_layers=3)
    grid = Grid(dp_shard=2)
    rest = [weight for weight in weights_of(nine, grid) if not weight.is_matrix]
    mesh = init_device_mesh("cpu", (2,))
    params = []
    for weight in rest:
        params.append(nn.Parameter(_on(mesh, weight, [Shard(0)])))
        params[-1].grad = _on(mesh, weight, [Shard(0)])

    def make(matrices):
        groups = [{"params": matrices}, {"params": params, "algorithm": "adamw", "lr": 1e-3}]
        return sinkgd.SinkGD(groups, lr=1e-3, deflated_rank=15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transform, "MESH_VECTOR_BYTES", 1_500_000)
        optimizer = step_on_a_mesh(nine, (1, 2, 1), make)
        with Sent() as sent:
            optimizer.step()
        (planned,) = vectors(nine, grid, find_method("sinkgd"))
    return len(sent.calls), planned.count, sum(sent.calls), planned.bytes + 8 * len(rest)


def test_two_ranks_that_deflate_send_what_the_plan_says():
    for count, planned, size, planned_size in on_ranks(2, sent_by_a_deflated_step):
        assert count == planned > 5 + 2
        assert size == planned_size


def test_a_deflated_step_of_llama_3_70b_takes_tens_of_messages():
    (found,) = vectors(find_architecture("llama-3-70b"), Grid(dp_shard=8), find_method("sinkgd"))
    assert found.count == 37


def planned_and_used(backend, device):
    """Return what the plan says of a deflated step of llama-60m, and what is allocated."""
    weights = weights_of(find_architecture("llama-60m"), Grid())
    params = [nn.Parameter(torch.randn(weight.shape)) for weight in weights if weight.is_matrix]
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer = sinkgd.SinkGD(params, lr=1e-3, deflated_rank=15, backend=backend, nonfinite="skip")
    optimizer.step()
    deflated = find_method("sinkgd")
    scratch = update_scratch(weights, Grid(), deflated, device=device, per_matrix=False)
    return scratch, allocations(optimizer.step, torch.device("cpu")).peak


def test_the_scratch_of_a_deflated_step_is_planned():
    scratch, used = planned_and_used("cpu", "cpu")
    assert 0.8 * scratch < used <= scratch


def test_the_scratch_of_a_deflated_step_on_a_gpu_is_planned(interpreter, monkeypatch):
    """Its kernels are launched by nobody; what they would fill is allocated."""
    monkeypatch.setattr(launch, "launch", lambda *arguments, **options: None)
    scratch, used = planned_and_used("triton", "cuda")
    assert 0.8 * scratch < used <= scratch


def _on(mesh, weight, places):
    return DTensor.from_local(torch.randn(weight.shard), mesh, places, run_check=False)


def test_a_ring_sends_a_sum_twice():
    gather = Messages("weights", "dp_shard", "all-gather", 1, 800, 8)
    assert gather.sent == 700
    assert replace(gather, kind="all-reduce").sent == 1400


def test_muon_gathers_matrices_and_adamw_sends_nothing():
    seven, grid = find_architecture("llama-7b"), Grid(dp_shard=8)
    (gathered,) = optimizer_communication(Work(seven), grid, find_method("muon"))
    assert gathered.bytes == 2 * 6_476_005_376
    assert optimizer_communication(Work(seven), grid, find_method("adamw")) == []
    assert optimizer_communication(Work(seven), Grid(dp_replicate=8), SINKGD) == []
    within, across = optimizer_communication(
        Work(seven), Grid(dp_shard=4, tp=2), find_method("muon")
    )
    assert (within.group, within.bytes) == ("tp", gathered.bytes)
    assert (across.group, across.bytes) == ("dp_shard", gathered.bytes // 2)


def test_fsdp_gathers_blocks_twice_and_reduces_gradients_once():
    sixty, grid = find_architecture("llama-60m"), Grid(dp_replicate=2, dp_shard=4)
    gather, reduce, average = training_communication(Work(sixty), grid)
    blocks, rest = 25_296_896 + 16 * 512, 2 * 32_000 * 512 + 512
    assert gather.bytes == 2 * (2 * blocks + rest)
    assert reduce.bytes == 2 * (blocks + rest)
    assert average.bytes == reduce.bytes // 4
    assert (gather.count, reduce.count, average.count) == (17, 9, 9)


@pytest.mark.parametrize("name", ["sinkgd", "sinkgd-paper", "muon"])
def test_the_messages_of_405_billion_weights_are_the_plans(name):
    grid = Grid(dp_replicate=2, dp_shard=1024, tp=8)
    found = vectors(find_architecture("llama-3-405b"), grid, find_method(name))
    start = "| Muon | 0.2" if name == "muon" else f"| `{name}`"
    rows = (ROOT / "docs/plan.md").read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in rows if row.startswith(start)]
    count, _, size, unit = row.split("|")[-2].split()
    assert int(count.strip(",").replace(",", "")) == sum(own.count for own in found)
    power = {"MiB": 20, "GiB": 30}[unit]
    assert float(size) == pytest.approx(sum(own.bytes for own in found) / 2**power, rel=2e-3)
