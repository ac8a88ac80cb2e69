"""Stepping inside backward is the ordinary step, bit for bit, with one gradient at a time."""

import copy
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import sinkgd
from optimizer_cases import OPTIMIZERS
from sinkgd.kernels.rounding import keys_of_step
from sinkgd.lab.models.llama import Llama, LlamaConfig
from sinkgd.optim import release as releases
from spawn import on_ranks

CONFIG = LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2)
STEPS = 5


def hybrid(model):
    return sinkgd.SinkGD(sinkgd.param_groups(model, lr=0.02))


RECIPES = {
    "hybrid": hybrid,
    "stateless": lambda model: sinkgd.SinkGD(model.named_parameters(), lr=3e-3),
    "swan": lambda model: sinkgd.SWAN(sinkgd.param_groups(model, matrix_algorithm="swan")),
    "warm": lambda model: sinkgd.SinkGDVariant(
        sinkgd.param_groups(model), sinkhorn_iterations=2, warm_start=True
    ),
    "options": lambda model: sinkgd.SinkGDVariant(
        sinkgd.param_groups(model, overrides={"embed|lm_head": "sinkgd-table"}),
        momentum=0.9,
        momentum_place="after",
        operator_norm="muon",
    ),
    "scale": lambda model: sinkgd.SCALE(sinkgd.scale_groups(model)),
    "random rounding": lambda model: sinkgd.SinkGD(
        model.named_parameters(), lr=3e-3, rounding="stochastic", seed=5
    ),
}


def a_model(recipe="hybrid"):
    return Llama(CONFIG, seed=0).to(torch.bfloat16 if recipe == "random rounding" else None)


def micro_batches(step, count):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(CONFIG.vocab_size, (8, 9), generator=generator).chunk(count)


def loss_of(model, batch):
    logits = model(batch[:, :-1])
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train(model, recipe, *, released, accumulation=1, watch=None, **options):
    """Train with a schedule; return the losses."""
    optimizer = RECIPES[recipe](model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, STEPS)
    release = sinkgd.GradientRelease(optimizer, **options) if released else None
    losses = []
    for step in range(STEPS):
        *first, last = micro_batches(step, accumulation)
        with release.accumulate() if release else nullcontext():
            for batch in first:
                loss_of(model, batch).backward()
        loss = loss_of(model, last)
        loss.backward()
        if watch:
            watch(model)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


def same_weights(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("recipe", "accumulation", "bucket_bytes"),
    [
        *product(["hybrid"], (1, 4), (0, 20_000, 1 << 30)),
        *product([name for name in RECIPES if name != "hybrid"], (4,), (0, 20_000)),
    ],
)
def test_it_is_the_ordinary_step_bit_for_bit(recipe, accumulation, bucket_bytes):
    ordinary, released = a_model(recipe), a_model(recipe)
    losses = train(ordinary, recipe, released=False, accumulation=accumulation)
    options = {"accumulation": accumulation, "bucket_bytes": bucket_bytes}
    assert train(released, recipe, released=True, **options) == losses
    assert same_weights(ordinary, released)


# AdamWSPAM needs the norm of all gradients, and is refused.
ONE_BY_ONE = [case for case in OPTIMIZERS if case.name != "AdamWSPAM"]


@pytest.mark.parametrize(("bucket_bytes", "updated"), [(1, [1, 1, 1]), (1 << 30, [3])])
@pytest.mark.parametrize("case", ONE_BY_ONE, ids=str)
def test_it_is_the_ordinary_step_with_every_method(case, bucket_bytes, updated, monkeypatch):
    ends = []
    for released in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(*shape, bias=False) for shape in ((6, 8), (8, 8), (8, 4))]
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
        optimizer = case.build([*model.named_parameters()])
        if released:
            sinkgd.GradientRelease(optimizer, bucket_bytes=bucket_bytes)
            calls = calls_of(optimizer, monkeypatch)
        for _ in range(STEPS):
            model(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model)
    assert [len(call) for call in calls] == updated * STEPS
    assert same_weights(*ends)


def test_no_gradient_is_left_after_backward():
    def watch(model):
        assert all(param.grad is None for param in model.parameters())

    train(a_model(), "hybrid", released=True, watch=watch)


def test_gradients_are_there_one_at_a_time(monkeypatch):
    monkeypatch.setattr(releases, "SMALL_BYTES", 0)
    model = a_model()
    held = []

    def count(_):
        held.append(sum(param.grad is not None for param in model.parameters()))

    for param in model.parameters():  # before those of the release
        param.register_post_accumulate_grad_hook(count)
    train(model, "hybrid", released=True)
    assert set(held) == {1}


def calls_of(optimizer, monkeypatch):
    """Note the parameters of each call of `update`."""
    calls, update = [], optimizer.update
    monkeypatch.setattr(optimizer, "update", lambda own: calls.append([*own]) or update(own))
    return calls


def test_small_gradients_wait_for_a_large_one_or_for_each_other_or_for_the_end(monkeypatch):
    monkeypatch.setattr(releases, "SMALL_BYTES", 128)  # 32 entries
    sizes = [4, 32, 4, 4, 20, 12, 8, 8]
    weights = [nn.Parameter(torch.ones(1, size)) for size in sizes]
    optimizer = sinkgd.SinkGD([{"params": weights, "algorithm": "adamw"}], lr=0.1)
    sinkgd.GradientRelease(optimizer)
    calls = calls_of(optimizer, monkeypatch)
    for number in range(2):
        loss = torch.zeros(())
        for weight in reversed(weights):  # gradients come in the order of `weights`
            loss = (loss + weight.sum()).tanh()
        loss.backward()
        assert all(weight.grad is None for weight in weights)
        together = [[param.numel() for param in own] for own in calls]
        assert together == [[4, 32], [4, 4, 20, 12], [8, 8]] * (number + 1)
        optimizer.step()


def test_a_gradient_that_the_last_micro_batch_lacks_is_applied_by_step():
    weights = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))]
    optimizer = sinkgd.SinkGD(weights, lr=0.1)
    release = sinkgd.GradientRelease(optimizer)
    with release.accumulate():
        (weights[0].square().sum() + weights[1].sum()).backward()
    weights[0].square().sum().backward()
    assert weights[0].ne(1).all()
    assert weights[1].eq(1).all()
    optimizer.step()
    assert weights[1].ne(1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_a_bad_gradient_is_told_by_step_and_the_next_step_goes_on(bad):
    good, ill = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = sinkgd.SinkGD([("good", good), ("ill", ill)], lr=0.1)
    sinkgd.GradientRelease(optimizer)
    (good.sum() + bad * ill.sum()).backward()
    with pytest.raises(sinkgd.NonFiniteGradientError, match="gradient of ill holds"):
        optimizer.step()
    assert good.ne(1).all()
    assert ill.eq(1).all()
    (good.sum() + ill.sum()).backward()
    optimizer.step()
    assert ill.ne(1).all()


def test_a_bad_gradient_holds_back_its_matrix_or_what_adamw_updates_with_it():
    matrices = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    norms = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    large = nn.Parameter(torch.ones(1 << 15))  # 128 KiB
    groups = [{"params": matrices}, {"params": [*norms, large], "algorithm": "adamw"}]
    optimizer = sinkgd.SinkGD(groups, lr=0.1, nonfinite="skip")
    sinkgd.GradientRelease(optimizer)
    large.sum().backward()
    (torch.nan * matrices[0].sum() + matrices[1].sum()).backward()
    (torch.nan * norms[0].sum() + norms[1].sum()).backward()
    optimizer.step()
    assert [bool(p.eq(1).all()) for p in (*matrices, *norms, large)] == [1, 0, 1, 1, 0]


def test_a_second_backward_is_refused_by_name():
    weight = nn.Parameter(torch.ones(3, 4))
    sinkgd.GradientRelease(sinkgd.SinkGD([("w", weight)], lr=0.1))
    loss = (weight * torch.ones(3, 4)).sum()  # had the graph saved the weight, torch would refuse
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"'w' got a second gradient.*release\.accumulate"):
        loss.backward()


def test_frozen_parameters_are_left_alone():
    weights = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4), requires_grad=False)
    optimizer = sinkgd.SinkGD(weights, lr=0.1)
    sinkgd.GradientRelease(optimizer)
    (weights[0] * weights[1]).sum().backward()
    optimizer.step()
    assert weights[0].ne(1).all()
    assert weights[1].eq(1).all()


def test_tied_weights_are_updated_once():
    ordinary, released = (nn.Parameter(torch.randn(4, 4, generator=a_seed())) for _ in "ab")
    for weight, is_released in ((ordinary, False), (released, True)):
        optimizer = sinkgd.SinkGD([weight], lr=0.1)
        if is_released:
            sinkgd.GradientRelease(optimizer)
        (torch.ones(2, 4) @ weight @ weight.T).square().sum().backward()
        optimizer.step()
    assert torch.equal(ordinary, released)


def a_seed():
    return torch.Generator().manual_seed(0)


def test_a_scaler_is_refused():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = sinkgd.SinkGD([weight], lr=0.1)
    sinkgd.GradientRelease(optimizer)
    optimizer.grad_scale = torch.ones(())
    with pytest.raises(TypeError, match="GradScaler"):
        optimizer.step()


def test_other_optimizers_and_sizes_are_refused():
    weight = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(TypeError, match="got AdamW"):
        sinkgd.GradientRelease(torch.optim.AdamW([weight]))
    with pytest.raises(ValueError, match="bucket_bytes must be at least 0, got -1"):
        sinkgd.GradientRelease(sinkgd.SinkGD([weight]), bucket_bytes=-1)


def test_after_it_is_removed_backward_leaves_gradients():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = sinkgd.SinkGD([weight], lr=0.1)
    with sinkgd.GradientRelease(optimizer, bucket_bytes=1 << 30):
        weight.sum().backward()
    assert weight.grad is None
    assert weight.ne(1).all()
    before = copy.deepcopy(weight)
    weight.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight, before)


class Counted(list):
    """A list that counts what is read of it."""

    reads = 0

    def __iter__(self):
        for x in super().__iter__():
            Counted.reads += 1
            yield x

    def __getitem__(self, i):
        Counted.reads += 1
        return super().__getitem__(i)


@pytest.mark.parametrize("recipe", ["stateless", "adamw", "random rounding"])
def test_a_step_looks_at_a_parameter_a_few_times_whatever_their_number(monkeypatch, recipe):
    monkeypatch.setattr(releases, "SMALL_BYTES", 0)
    options = {
        "stateless": {},
        "adamw": {"algorithm": "adamw"},
        "random rounding": {"rounding": "stochastic"},
    }[recipe]
    looked = []
    for count in (10, 100):
        dtype = torch.bfloat16 if recipe == "random rounding" else torch.float32
        weights = [nn.Parameter(torch.ones(2, 3, dtype=dtype)) for _ in range(count)]
        groups = [{"params": half, **options} for half in (weights[::2], weights[1::2])]
        optimizer = sinkgd.SinkGD(groups, lr=0.1) if recipe != "adamw" else adamw_of(groups)
        sinkgd.GradientRelease(optimizer)
        for group in optimizer.param_groups:
            group["params"] = Counted(group["params"])
        Counted.reads = 0
        sum(weight.float().sum() for weight in weights).backward()
        optimizer.step()
        looked.append(Counted.reads / count)
    assert max(looked) < 10


def adamw_of(groups):
    return sinkgd.SinkGD([*groups, {"params": [nn.Parameter(torch.ones(2, 2))]}], lr=0.1)


def test_a_released_parameter_draws_its_own_key_alone(monkeypatch):
    counts = []

    def keys(seed, step, count, **first):
        counts.append(count)
        return keys_of_step(seed, step, count, **first)

    monkeypatch.setattr(releases, "SMALL_BYTES", 0)
    monkeypatch.setattr("sinkgd.optim.apply.keys_of_step", keys)
    weights = [nn.Parameter(torch.ones(2, 3).bfloat16()) for _ in range(20)]
    optimizer = sinkgd.SinkGD(weights, lr=0.1, rounding="stochastic")
    sinkgd.GradientRelease(optimizer)
    sum(weight.float().sum() for weight in weights).backward()
    assert counts == [1] * 20


def test_parameters_that_are_moved_between_flushes_are_found(monkeypatch):
    monkeypatch.setattr(releases, "SMALL_BYTES", 0)
    weights = [nn.Parameter(torch.ones(2, 3)) for _ in range(4)]
    optimizer = sinkgd.SinkGD([{"params": weights[:3]}, {"params": weights[3:], "lr": 0.0}], lr=0.1)
    for weight in weights:
        weight.grad = torch.ones(2, 3)
    assert optimizer.update([weights[0]]) == [weights[0]]
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop(1))
    third = nn.Parameter(torch.ones(2, 3))
    third.grad = torch.ones(2, 3)
    first["params"].append(third)
    updated = optimizer.update([weights[1], weights[2], third])
    assert {*map(id, updated)} == {*map(id, [weights[1], weights[2], third])}
    assert weights[1].eq(1).all()  # of the group whose rate is zero
    assert weights[2].ne(1).all()
    assert third.ne(1).all()
    del optimizer.param_groups[1]
    assert optimizer.update([weights[3]]) == []


# On ranks -----------------------------------------------------------------------------------------


def sharded_model(recipe):
    model, mesh = a_model(recipe), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def differences_on_mesh(names):
    """Train both ways under FSDP2; say of each recipe whether bits are equal."""
    equal = {}
    for recipe in names:
        every = product((1, 2), (0, 1 << 14)) if recipe == "hybrid" else [(2, 1 << 14)]
        for accumulation, bucket_bytes in every:
            ordinary, released = sharded_model(recipe), sharded_model(recipe)
            losses = train(ordinary, recipe, released=False, accumulation=accumulation)
            options = {"accumulation": accumulation, "bucket_bytes": bucket_bytes}
            same_losses = train(released, recipe, released=True, **options) == losses
            pieces = zip(ordinary.parameters(), released.parameters(), strict=True)
            same = all(torch.equal(a.to_local(), b.to_local()) for a, b in pieces)
            equal[recipe, accumulation, bucket_bytes] = same_losses and same
    return equal


@pytest.mark.slow
def test_under_fsdp2_it_is_the_ordinary_step_bit_for_bit():
    for equal in on_ranks(
        2, differences_on_mesh, ["hybrid", "stateless", "options", "scale", "random rounding"]
    ):
        assert equal
        assert all(equal.values()), equal


def flushes_of_uneven_pieces():
    """Return how many parameters are applied at a time; nothing is sent."""
    mesh = init_device_mesh("cpu", (2,))
    weights = [nn.Parameter(distribute_tensor(torch.ones(3, 4), mesh, [Shard(0)])) for _ in "abc"]
    optimizer = sinkgd.SinkGD(weights, lr=0.1)
    sinkgd.GradientRelease(optimizer, bucket_bytes=64)  # two of 2 rows each, four of one row
    flushed = []
    optimizer.update = lambda own: flushed.append(len(own)) or own
    sum(weight.to_local().sum() for weight in weights).backward()
    return flushed


def test_ranks_flush_the_same_parameters_whatever_they_hold():
    assert on_ranks(2, flushes_of_uneven_pieces) == [[2], [2]]


def said_of_plain_tensors():
    model = DistributedDataParallel(a_model())
    optimizer = hybrid(model.module)
    sinkgd.GradientRelease(optimizer, averaged=True).remove()
    try:
        sinkgd.GradientRelease(optimizer)
    except TypeError as error:
        return str(error)
    return "nothing"


def test_plain_tensors_on_several_ranks_are_refused_by_name():
    for said in on_ranks(2, said_of_plain_tensors):
        assert "model.layers.0.self_attn.q_proj.weight" in said
        assert "fully_shard" in said
