"""Schedulers of torch and of transformers treat every optimizer here as they treat AdamW."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import sinkgd
from exports import OPTIMIZER_CLASSES
from sinkgd.optim.methods import METHODS

STEPS = 12


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))) for _ in range(2)
        )
        self.head = nn.Linear(4, 6, bias=False)


def hybrid(kind, algorithm="sinkgd", **options):
    groups = sinkgd.param_groups(Model(), lr=0.5, matrix_algorithm=algorithm, weight_decay=0.25)
    return kind(groups, **options)


def plain(kind, **options):
    return kind([nn.Parameter(torch.ones(4, 3))], lr=0.5, **options)


NORMS = {"norms": [sinkgd.RowNorm()]}
OPTIMIZERS = {
    "SinkGD": lambda **o: hybrid(sinkgd.SinkGD, **o),
    "SinkGD, stateless": lambda **o: plain(sinkgd.SinkGD, **o),
    "SinkGDVariant": lambda **o: hybrid(sinkgd.SinkGDVariant, **o),
    "SWAN": lambda **o: hybrid(sinkgd.SWAN, "swan", **o),
    "MNGD": lambda **o: hybrid(sinkgd.MNGD, "mngd", **NORMS, **o),
    "SRON": lambda **o: hybrid(sinkgd.SRON, "mngd", **o),
    "SCALE": lambda **o: sinkgd.SCALE(sinkgd.scale_groups(Model(), 0.5), **o),
    "TemperedSinkGD": lambda **o: plain(sinkgd.TemperedSinkGD, **o),
    "SPAM": lambda **o: plain(sinkgd.SPAM, **o),
    "AdamWSPAM": lambda **o: plain(sinkgd.AdamWSPAM, **o),
}
WITH_MOMENTUM = ["SinkGD", "SinkGD, stateless", "SWAN", "MNGD", "SRON"]
WITH_BETAS = [
    name
    for name, build in OPTIMIZERS.items()
    if "betas" in METHODS[type(build()).default_algorithm].options
]
every = pytest.mark.parametrize("name", OPTIMIZERS)


def test_every_optimizer_is_among_them():
    assert {*OPTIMIZERS} >= OPTIMIZER_CLASSES


def as_adamw(optimizer):
    """Return torch's AdamW with groups of the same rates, and the largest as its own."""
    groups = [
        {"params": [nn.Parameter(torch.ones(2))], "lr": copy.deepcopy(group["lr"])}
        for group in optimizer.param_groups
    ]
    return torch.optim.AdamW(groups, lr=max(float(group["lr"]) for group in groups))


def rates(optimizer, build):
    """Return each group's rate, divided by its first, after every step of the scheduler."""
    start = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = build(optimizer)
    found = []
    for step in range(STEPS):
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) or hasattr(scheduler, "best"):
            scheduler.step(float(step))
        else:
            scheduler.step()
        found.append(
            [float(g["lr"]) / first for g, first in zip(optimizer.param_groups, start, strict=True)]
        )
    return torch.tensor(found)


TORCH = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, STEPS + 1, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5), lr_scheduler.StepLR(o, 2)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.1, 4),
}


def test_every_scheduler_of_torch_is_tried():
    ours = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert ours <= set(TORCH)


@every
@pytest.mark.parametrize("scheduler", TORCH)
def test_torchs_schedulers_scale_every_group_as_adamws(name, scheduler):
    optimizer = OPTIMIZERS[name]()
    expected = rates(as_adamw(optimizer), TORCH[scheduler])
    torch.testing.assert_close(rates(optimizer, TORCH[scheduler]), expected)


SPECIFIC = {
    "cosine_with_min_lr": {"min_lr": 0.05},
    "cosine_warmup_with_min_lr": {"min_lr": 0.05},
    "warmup_stable_decay": {"num_decay_steps": 4},
    "polynomial": {"lr_end": 0.05},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 1},
}


def names_of_transformers():
    try:
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    except ImportError:
        return []
    return [kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION]


@every
@pytest.mark.parametrize("scheduler", names_of_transformers())
def test_transformers_schedulers_scale_every_group_as_adamws(name, scheduler):
    from transformers import get_scheduler

    def build(optimizer):
        return get_scheduler(scheduler, optimizer, 2, STEPS, SPECIFIC.get(scheduler))

    optimizer = OPTIMIZERS[name]()
    expected = rates(as_adamw(optimizer), build)
    torch.testing.assert_close(rates(optimizer, build), expected)


@every
def test_defaults_agree_with_the_groups(name):
    optimizer = OPTIMIZERS[name]()
    for option in ("lr", "weight_decay"):
        largest = max(group[option] for group in optimizer.param_groups)
        assert optimizer.defaults[option] == largest


VECTORS = {"algorithm": "adamw"}


def lr_in_a_tensor(name):
    lr = torch.tensor(0.5)
    if name == "from param_groups":
        return sinkgd.SinkGD(sinkgd.param_groups(Model(), lr=lr, weight_decay=0.25)), lr
    groups = [{"params": [(f"w{i}", nn.Parameter(torch.ones(4, 3)))]} for i in range(3)]
    if name == "in every group":
        return sinkgd.SinkGD([{**group, "lr": lr} for group in groups]), lr
    return sinkgd.SinkGD(groups, lr=lr), lr


@pytest.mark.parametrize("name", ["from param_groups", "in every group", "an argument"])
def test_groups_never_share_a_tensor_of_the_rate(name):
    optimizer, lr = lr_in_a_tensor(name)
    optimizer.add_param_group({"params": [("v", nn.Parameter(torch.ones(4)))], **VECTORS})
    optimizer.add_param_group({"params": [("x", nn.Parameter(torch.ones(4, 3)))], "lr": lr})
    before = [float(group["lr"]) for group in optimizer.param_groups]
    lr.fill_(7.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == before
    for group in optimizer.param_groups:
        assert isinstance(group["lr"], torch.Tensor)
        group["lr"].mul_(0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [x / 2 for x in before]
    assert float(optimizer.defaults["lr"]) == 0.5


def test_a_single_group_keeps_the_tensor_that_the_caller_holds():
    lr = torch.tensor(0.5)
    assert sinkgd.SinkGD([nn.Parameter(torch.ones(4, 3))], lr=lr).param_groups[0]["lr"] is lr


@pytest.mark.parametrize("name", ["from param_groups", "in every group", "an argument"])
def test_a_plateau_halves_a_tensor_of_the_rate_once(name):
    optimizer, _ = lr_in_a_tensor(name)
    before = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [x / 2 for x in before]


CYCLES = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, STEPS + 1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2, 2),
}
every_cycle = pytest.mark.parametrize("cycle", CYCLES)


def give_gradients(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in WITH_BETAS])
@every_cycle
def test_a_cycle_does_not_switch_momentum_on(name, cycle):
    optimizer = OPTIMIZERS[name]()
    before = [group.get("momentum") for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="optimizer must support momentum"):
        CYCLES[cycle](optimizer)
    assert [group.get("momentum") for group in optimizer.param_groups] == before


@pytest.mark.parametrize("name", WITH_MOMENTUM)
@every_cycle
def test_a_cycle_moves_the_momentum_of_an_optimizer_that_has_it(name, cycle):
    optimizer = OPTIMIZERS[name](momentum=0.5)
    scheduler = CYCLES[cycle](optimizer)
    reference = as_adamw(optimizer)
    of_reference = CYCLES[cycle](reference)
    seen = set()
    for _ in range(STEPS):
        give_gradients(optimizer)
        optimizer.step()
        (momentum,) = {group["betas"][0] for group in reference.param_groups}
        for group in optimizer.param_groups:
            own = group["betas"][0] if group["algorithm"] == "adamw" else group["momentum"]
            assert own == momentum
        seen.add(momentum)
        reference.step()
        scheduler.step()
        of_reference.step()
    assert len(seen) > 2


@pytest.mark.parametrize("name", WITH_BETAS)
@every_cycle
def test_a_cycle_moves_the_first_of_betas(name, cycle):
    optimizer = OPTIMIZERS[name]()
    CYCLES[cycle](optimizer)
    give_gradients(optimizer)
    optimizer.step()
    assert optimizer.param_groups[0]["betas"][0] in (0.9, 0.95)
    assert "momentum" not in optimizer.param_groups[0]


@pytest.mark.parametrize("name", [*WITH_MOMENTUM, "SCALE", "TemperedSinkGD"])
@pytest.mark.parametrize("is_copied", [False, True])
def test_momentum_set_after_construction_is_refused_at_the_step(name, is_copied):
    optimizer = OPTIMIZERS[name]()
    optimizer = copy.deepcopy(optimizer) if is_copied else optimizer
    index = next(i for i, g in enumerate(optimizer.param_groups) if g["algorithm"] != "adamw")
    optimizer.param_groups[index]["momentum"] = 0.75
    give_gradients(optimizer)
    with pytest.raises(ValueError, match=rf"group {index} was built without .*=0.75.*cycle_momen"):
        optimizer.step()
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


def test_a_group_keeps_its_momentum_when_another_is_deleted():
    first, second = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = sinkgd.SinkGD(
        [
            {"params": [first], "algorithm": "adamw"},
            {"params": [second], "algorithm": "sinkgd", "momentum": 0.5},
        ],
        lr=0.125,
    )
    del optimizer.param_groups[0]
    second.grad = torch.ones(4, 3)
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[second]


def test_momentum_that_a_state_dict_brings_is_taken():
    with_it, without = OPTIMIZERS["SinkGD"](momentum=0.5), OPTIMIZERS["SinkGD"]()
    give_gradients(with_it)
    with_it.step()
    without.load_state_dict(with_it.state_dict())
    give_gradients(without)
    without.step()
    assert without.param_groups[0]["momentum"] == 0.5
