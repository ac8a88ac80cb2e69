"""Megatron's own functions build SinkGD for a tiny model beside its Adam, and schedule it.

`make test-plugin-megatron_core` runs it, with the versions in pins/megatron_core.txt.
Megatron asks for Python 3.12 or newer; the functions that the test calls also run with 3.11.

Megatron asks for the package emerging-optimizers, which SinkGD does not use: the test passes over
that check, and makes Megatron's scalars on the CPU. bfloat16, several ranks and ``pretrain`` were
not run.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sinkgd

pytest.importorskip(
    "megatron.core.optimizer.emerging_optimizers",
    reason="`make test-plugin-megatron_core` runs it",
    exc_type=ImportError,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of Megatron and of what it imports


class OnCpu(torch.overrides.TorchFunctionMode):
    """Makes Megatron's own scalars on the CPU, where it asks for a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Model(nn.Module):
    """What the functions read of a Megatron model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.embedding.weight.is_embedding_or_output_parameter = True
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.config = SimpleNamespace(
            num_attention_heads=2, num_query_groups=2, kv_channels=4, init_method_std=0.02
        )
        self.ddp_config = SimpleNamespace(use_megatron_fsdp=False, use_distributed_optimizer=False)

    def forward(self, tokens):
        return self.layers(self.embedding(tokens))


@pytest.fixture
def groups(monkeypatch):
    """The process groups of one rank."""
    from megatron.core import optimizer, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    monkeypatch.setattr(optimizer, "HAVE_EMERGING_OPTIMIZERS", True)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    with OnCpu():
        yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build(groups, **options):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from sinkgd.integrations.megatron_core import register

    register(matrix_lr=1e-3, matrix_min_lr=1e-4, **options)
    config = OptimizerConfig(
        optimizer="sinkgd", lr=1e-2, min_lr=1e-3, weight_decay=0.1, clip_grad=0.0
    )
    model = Model()
    optimizer = get_megatron_optimizer(config, [model], pg_collection=groups)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-3,
        lr_warmup_steps=1,
        lr_decay_steps=4,
        lr_decay_style="linear",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, seeds):
    for seed in seeds:
        tokens = torch.randint(16, (2, 4), generator=torch.Generator().manual_seed(seed))
        model(tokens).square().mean().backward()
        for param in model.parameters():
            param.main_grad = param.grad
        scheduler.step(increment=1)
        optimizer.step()
        for param in model.parameters():
            param.grad = None


def test_matrices_train_with_sinkgd_at_their_own_schedule(groups):
    model, optimizer, scheduler = build(groups)
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer, scheduler, range(4))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    kinds = {type(own.optimizer).__name__: own.optimizer for own in optimizer.chained_optimizers}
    assert kinds.keys() == {"MegatronSinkGD", "AdamW"}
    own = kinds["MegatronSinkGD"]
    assert isinstance(own, sinkgd.SinkGD)
    trained = {param for group in own.param_groups for param in group["params"]}
    assert trained == {layer.weight for layer in model.layers}
    assert [group["lr"] for group in own.param_groups] == pytest.approx([1e-4])
    assert all(group["lr"] == pytest.approx(1e-3) for group in kinds["AdamW"].param_groups)
    assert {group["deflated_rank"] for group in own.param_groups} == {15}


def test_a_saved_state_continues(groups):
    model, optimizer, scheduler = build(groups, momentum=0.5)
    train(model, optimizer, scheduler, range(2))
    saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    other, again, schedule = build(groups, momentum=0.5)
    other.load_state_dict(weights)
    again.load_state_dict(saved)
    schedule.load_state_dict(scheduler.state_dict())
    train(other, again, schedule, range(2, 4))
    train(model, optimizer, scheduler, range(2, 4))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_tensor_parallelism_is_refused(groups):
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    build(groups)
    split = SimpleNamespace(tp=SimpleNamespace(size=lambda: 2))
    with pytest.raises(ValueError, match=r"tensor parallelism of size 2 .*parallel-size 1"):
        _EMERGING_OPTIMIZERS["sinkgd"].config_to_kwargs(SimpleNamespace(), [], split)
