"""torch's ZeroRedundancyOptimizer, which gives each rank some of the parameters, takes ours."""

import warnings

import torch
from torch import nn

import sinkgd
from exports import OPTIMIZER_CLASSES
from spawn import on_ranks


def zero_redundancy():
    """Import it on a rank: torch warns of itself while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer


RECIPES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "stateless": (sinkgd.SinkGD, {"lr": 0.01}),
    "momentum": (sinkgd.SinkGD, {"lr": 0.01, "momentum": 0.9}),
    "hybrid": (sinkgd.SinkGD, {}),
    "variant": (sinkgd.SinkGDVariant, {"lr": 0.01, "deflated_rank": 2}),
    "swan": (sinkgd.SWAN, {"lr": 0.01}),
    "mngd": (sinkgd.MNGD, {"lr": 0.01, "norms": [sinkgd.RowNorm(), sinkgd.ColumnNorm()]}),
    "sron": (sinkgd.SRON, {"lr": 0.01}),
    "scale": (sinkgd.SCALE, {"lr": 0.01, "momentum": 0.9}),
    "tempered": (sinkgd.TemperedSinkGD, {}),
    "spam": (sinkgd.SPAM, {}),
    # Each rank would clip by the norm of its own parameters.
    "adamw-spam": (sinkgd.AdamWSPAM, {"max_norm": float("inf")}),
}
OF_MATRICES = {"swan", "mngd", "sron", "scale"}  # these train matrices only


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))


def params_of(made, recipe, with_names):
    if recipe == "hybrid":
        groups = sinkgd.param_groups(made)
    else:
        named = made.named_parameters()
        if recipe in OF_MATRICES:
            named = ((name, param) for name, param in named if param.ndim == 2)
        groups = [{"params": [*named]}]
    if with_names:
        return groups
    return [{**group, "params": [param for _, param in group["params"]]} for group in groups]


def train(made, optimizer, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        made(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
    return [param.detach().clone() for param in made.parameters()]


def differences():
    """Train each way, with a save and a load between; return the largest difference of each."""
    found = {}
    sharing = zero_redundancy()
    for recipe, (kind, options) in RECIPES.items():
        whole, pieces = model(), model()
        expected = train(
            whole, kind(params_of(whole, recipe, with_names=False), **options), range(6)
        )
        optimizer = sharing(
            params_of(pieces, recipe, with_names=False), optimizer_class=kind, **options
        )
        train(pieces, optimizer, range(3))
        optimizer.consolidate_state_dict(to=0)
        states = [optimizer.state_dict() if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(states)
        resumed = model()
        resumed.load_state_dict(pieces.state_dict())
        optimizer = sharing(
            params_of(resumed, recipe, with_names=False), optimizer_class=kind, **options
        )
        optimizer.load_state_dict(states[0])
        trained = train(resumed, optimizer, range(3, 6))
        pairs = zip(trained, expected, strict=True)
        found[recipe] = max((one - other).abs().max().item() for one, other in pairs)
    return found


def said_of_names(recipe):
    kind, options = RECIPES[recipe]
    try:
        zero_redundancy()(
            params_of(model(), recipe, with_names=True), optimizer_class=kind, **options
        )
    except (AttributeError, TypeError) as error:
        return str(error)
    return "taken"


def test_every_optimizer_is_tried():
    ours = {getattr(sinkgd, name) for name in OPTIMIZER_CLASSES}
    assert {kind for kind, _ in RECIPES.values()} == {torch.optim.SGD, *ours}


def test_ranks_that_share_the_parameters_train_as_one():
    for found in on_ranks(2, differences):
        assert max(found.values()) < 1e-6, found


def test_pairs_of_name_and_tensor_are_taken_where_those_of_sgd_are():
    # It refuses them before the optimizer sees them.
    (ours, _), (torchs, _) = on_ranks(2, said_of_names, "hybrid"), on_ranks(2, said_of_names, "sgd")
    assert ours == torchs
