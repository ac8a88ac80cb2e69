"""A model in pieces learns what it learns whole: FSDP2, HSDP, and FSDP2 with tensor parallelism."""

import warnings

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import sinkgd
from sinkgd.lab.models.llama import Llama, LlamaConfig
from spawn import on_ranks

CONFIG = LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2)
STEPS, BATCH = 12, 8
# Losses are near 4; sums in another order move a weight by a few units of float32 a step.
TOLERANCE = 2e-5


def tokens(step):
    generator = torch.Generator().manual_seed(step)
    # Each token is followed by its double, so that there is something to learn.
    first = torch.randint(CONFIG.vocab_size, (BATCH, 1), generator=generator)
    return torch.cat([first * 2**i % CONFIG.vocab_size for i in range(9)], dim=1)


def train(model, optimizer, share=slice(None)):
    """Train on a share of every batch; return the losses of it."""
    losses = []
    for step in range(STEPS):
        batch = tokens(step)[share]
        logits = model(batch[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


RECIPES = {
    "hybrid": lambda model: sinkgd.SinkGD(sinkgd.param_groups(model, lr=0.02)),
    "stateless": lambda model: sinkgd.SinkGD(model.named_parameters(), lr=3e-3),
    "warm": lambda model: sinkgd.SinkGDVariant(
        sinkgd.param_groups(model, lr=0.02), sinkhorn_iterations=2, warm_start=True
    ),
    "tempered": lambda model: sinkgd.TemperedSinkGD(model.named_parameters(), lr=0.5),
    # It resets in the tenth step, and is in the warm-up after it when it is saved.
    "adamw-spam": lambda model: sinkgd.AdamWSPAM(
        model.named_parameters(), lr=0.01, reset_interval=9, warmup_steps=6, norm_window=10
    ),
    "options": lambda model: sinkgd.SinkGDVariant(
        sinkgd.param_groups(
            model, 0.02, overrides={"embed|head": {"algorithm": "sinkgd-table", "lr": 0.02}}
        ),
        momentum=0.9,
        operator_norm="muon",
        momentum_rank=4,
        averaged_scales=0.9,
        deflated_start="kept",
        sinkhorn_iterations=2,
    ),
    "held": lambda model: sinkgd.SinkGDVariant(
        sinkgd.param_groups(model, lr=0.02), weight_projection=True, constant_norm=True
    ),
}

KINDS = ("ddp", "fsdp", "hsdp", "fsdp-tp")


def is_tried(kind, recipe):
    """The paper's recipe on every mesh, others on the one that cuts them most.

    Warm starts are refused where rows are sharded.
    """
    return recipe == "hybrid" or kind == ("hsdp" if recipe == "warm" else "fsdp-tp")


CASES = [(recipe, kind) for recipe in RECIPES for kind in KINDS if is_tried(kind, recipe)]
pytestmark = pytest.mark.slow
cases = pytest.mark.parametrize(("whole", "kind"), CASES, indirect=["whole"])


def shard(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def split_in_parallel(model, mesh):
    columns, rows = ColwiseParallel(), RowwiseParallel()
    for layer in model.model.layers:
        parallelize_module(
            layer,
            mesh,
            {
                "self_attn.q_proj": columns,
                "self_attn.k_proj": columns,
                "self_attn.v_proj": columns,
                "self_attn.o_proj": rows,
                "mlp.gate_proj": columns,
                "mlp.up_proj": columns,
                "mlp.down_proj": rows,
            },
        )
    return model


def parts(kind):
    """Build the model in pieces; return it with the mesh whose ranks have batches of their own."""
    model = Llama(CONFIG, seed=0)
    if kind == "ddp":
        mesh = init_device_mesh("cpu", (2,))
        return DistributedDataParallel(model), mesh
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        return shard(model, mesh), mesh
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "inner"))
    if kind == "hsdp":
        return shard(model, mesh), mesh["dp", "inner"]._flatten()
    return shard(split_in_parallel(model, mesh["inner"]), mesh["dp"]), mesh["dp"]


def trained(kinds):
    warnings.filterwarnings("ignore", message=".*_register_pre_backward_hook.*")
    found = {}
    for kind in kinds:
        for recipe, build in RECIPES.items():
            if not is_tried(kind, recipe):
                continue
            model, ranks = parts(kind)
            optimizer = build(getattr(model, "module", model))
            each = BATCH // ranks.size()
            share = slice(ranks.get_local_rank() * each, (ranks.get_local_rank() + 1) * each)
            losses = torch.tensor(train(model, optimizer, share), dtype=torch.float64)
            torch.distributed.all_reduce(losses, group=ranks.get_group())
            options = StateDictOptions(full_state_dict=True)
            weights = get_model_state_dict(model, options=options)
            state = get_optimizer_state_dict(model, optimizer, options=options)
            found[kind, recipe] = losses / ranks.size(), weights, state
    return found


@pytest.fixture(scope="module")
def found():
    return [*on_ranks(2, trained, ["ddp", "fsdp"]), *on_ranks(4, trained, ["hsdp", "fsdp-tp"])]


@pytest.fixture(scope="module")
def whole(request):
    """The recipe, its losses and weights in one process, and its losses where it goes on."""
    model = Llama(CONFIG, seed=0)
    optimizer = RECIPES[request.param](model)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0] - 0.5
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return request.param, losses, weights, train(model, optimizer)


@cases
def test_the_loss_curve_is_that_of_one_process(found, whole, kind):
    recipe, losses, weights, _ = whole
    of_ranks = [ranks[kind, recipe] for ranks in found if (kind, recipe) in ranks]
    assert of_ranks
    for found_losses, found_weights, _ in of_ranks:
        torch.testing.assert_close(found_losses.tolist(), losses, rtol=0, atol=TOLERANCE)
        for name, weight in found_weights.items():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4)


@cases
def test_what_was_trained_in_pieces_goes_on_in_one_process(found, whole, kind):
    recipe, _, _, expected = whole
    for ranks in found:
        if (kind, recipe) not in ranks:
            continue
        _, weights, state = ranks[kind, recipe]
        model = Llama(CONFIG, seed=1)
        model.load_state_dict(weights)
        optimizer = RECIPES[recipe](model)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, optimizer, state, options=options)
        torch.testing.assert_close(train(model, optimizer), expected, rtol=0, atol=5 * TOLERANCE)
