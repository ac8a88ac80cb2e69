"""Lightning Fabric shards a model by FSDP2 on two ranks, trains it, saves it and resumes it."""

import os
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import sinkgd
from spawn import on_ranks

lightning = pytest.importorskip("lightning", reason="pip install sinkgd[trainers]")

RECIPES = {
    "hybrid": lambda model: sinkgd.SinkGD(sinkgd.param_groups(model, adamw_lr=1e-2)),
    "decayed": lambda model: sinkgd.SinkGD(
        sinkgd.param_groups(model, adamw_lr=1e-2, weight_decay=0.1), momentum=0.9
    ),
    "stateless": lambda model: sinkgd.SinkGD(model.named_parameters(), lr=1e-3),
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}
BEFORE, AFTER = range(3), range(3, 6)


def network():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(32, 16), body, nn.Linear(16, 32))


def rows(step):
    return torch.randint(32, (8, 8), generator=torch.Generator().manual_seed(step))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def shard(model, mesh):
    for layer in model[1].layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def set_up(fabric, recipe):
    model = fabric.setup_module(network())
    return model, fabric.setup_optimizers(RECIPES[recipe](model))


def train(fabric, model, optimizer, steps):
    for step in steps:
        fabric.backward(loss_of(model, rows(step)[fabric.global_rank :: 2]))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()


def algorithms(optimizer):
    return [group.get("algorithm") for group in optimizer.param_groups]


def whole(model):
    named = model.module.named_parameters()
    return {name: param.full_tensor().detach() for name, param in named}


def weights_of(folder, recipe, in_shards):
    """Return the weights of a run that goes on, and of one that resumes it."""
    strategy = lightning.fabric.strategies.ModelParallelStrategy(
        shard, data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=in_shards
    )
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model, optimizer = set_up(fabric, recipe)
    assert algorithms(optimizer) == algorithms(RECIPES[recipe](network()))
    train(fabric, model, optimizer, BEFORE)
    path = folder / f"{recipe}-{in_shards}"
    fabric.save(path, {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, AFTER)
    other, own = set_up(fabric, recipe)
    fabric.load(path, {"model": other, "optimizer": own})
    train(fabric, other, own, AFTER)
    return whole(model), whole(other)


def results(folder):
    warnings.filterwarnings("ignore")
    rank = str(torch.distributed.get_rank())
    # As torchrun sets them; Fabric takes the process group that is there.
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test")
    return {
        (recipe, in_shards): weights_of(folder, recipe, in_shards)
        for recipe in RECIPES
        for in_shards in (True, False)
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return on_ranks(2, results, tmp_path_factory.mktemp("fabric"))


def alone(recipe):
    """Train on whole batches in one process."""
    model = network()
    optimizer = RECIPES[recipe](model)
    for step in (*BEFORE, *AFTER):
        loss_of(model, rows(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_learn_what_one_process_learns(found, recipe):
    expected = alone(recipe).eval()
    start, model = network().eval(), network().eval()
    for rank in found:
        model.load_state_dict(rank[recipe, True][0])
        # Sums over the ranks are in another order. Weights may differ by more: the gradient of the
        # bias of keys is zero but for rounding, and AdamW's step does not depend on its size.
        torch.testing.assert_close(model(rows(9)), expected(rows(9)), atol=1e-3, rtol=0)
        assert (model(rows(9)) - start(rows(9))).abs().max() > 0.1


@pytest.mark.parametrize("in_shards", [True, False], ids=["shards", "one file"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_is_the_uninterrupted_one(found, recipe, in_shards):
    for rank in found:
        went_on, resumed = rank[recipe, in_shards]
        assert went_on.keys() == resumed.keys()
        assert all(torch.equal(went_on[name], resumed[name]) for name in went_on)
