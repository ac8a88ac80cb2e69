"""Who goes where, whatever wraps a layer, and for every layer that torch has."""

import inspect
import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import sinkgd


def routed(model):
    """Return (algorithm, split, layout) of each parameter by its name without wrappers."""
    return {
        plain(name): (group["algorithm"], group.get("split"), group.get("layout"))
        for group in sinkgd.param_groups(model)
        for name, _ in group["params"]
    }


def plain(name):
    for wrapper in WRAPPER_NAMES:
        name = name.replace(wrapper, "")
    return re.sub(r"\.original\d?$", "", name)


WRAPPER_NAMES = (
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "modules_to_save.default.",
    "base_layer.",
    "original_module.",
    "parametrizations.",
    "_forward_module.",
)


class SavedModules(nn.Module):
    """The shape of PEFT's ``modules_to_save``: a frozen original and trained copies."""

    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": module})


class Adapted(nn.Module):
    """The shape of PEFT's layers around a base layer that is trained."""

    def __init__(self, module):
        super().__init__()
        self.base_layer = module
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()


class Fabric(nn.Module):
    """The shape of Lightning Fabric's wrapper, which has a module twice."""

    def __init__(self, module, wrap=lambda module: module):
        super().__init__()
        self._forward_module = wrap(module)
        self._original_module = module


def parametrized(module):
    """Give every linear a spectral norm; parameters are then made from ``original``."""
    for inner in [*module.modules()]:
        if isinstance(inner, nn.Linear):
            parametrizations.spectral_norm(inner)
    return module


def saved(module):
    """A wrapper whose original is frozen, and so has no role."""
    return SavedModules(module)


WRAPPERS = {
    "torch.compile": torch.compile,
    "checkpoint": checkpoint_wrapper,
    "both": lambda module: torch.compile(checkpoint_wrapper(module)),
    "saved": saved,
    "Fabric": Fabric,
    "Fabric, compiled": lambda module: Fabric(module, torch.compile),
    "spectral norm": parametrized,
}


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))


class Layer(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2)
        self.norm = Norm(width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(31, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(8, 31, bias=False)


def mlp():
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def residual():
    def stage():
        return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    return nn.Sequential(nn.Conv2d(3, 8, 7), stage(), stage(), nn.Flatten(), nn.Linear(8, 5))


# torch.compile imports what torch itself has deprecated.
COMPILED = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

MODELS = {"decoder": Decoder, "mlp": mlp, "residual": residual}


def replaced(model, path, wrap):
    """Put a wrapper around the module at ``path``; the empty path is the model itself."""
    if not path:
        return wrap(model)
    model.set_submodule(path, wrap(model.get_submodule(path)))
    return model


def paths_of(build):
    model = build()
    return [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]


@COMPILED
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_wrapper_around_any_module_moves_no_parameter(model, wrapper):
    build = MODELS[model]
    expected = routed(build())
    for path in paths_of(build):
        if wrapper == "spectral norm" and path.endswith("out_proj"):
            continue  # torch's attention looks at the weight's type
        found = routed(replaced(build(), path, WRAPPERS[wrapper]))
        assert found == expected, path


@COMPILED
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_around_every_layer_move_no_parameter(wrapper):
    expected = routed(Decoder())
    model = Decoder()
    for i in range(2):
        replaced(
            model,
            f"layers.{i}.attention",
            WRAPPERS[wrapper] if wrapper != "spectral norm" else checkpoint_wrapper,
        )
        replaced(model, f"layers.{i}.up", WRAPPERS[wrapper])
    assert routed(model) == expected


class Twice(nn.Module):
    """Has a model under two names."""

    def __init__(self, model):
        super().__init__()
        self.first = self.second = model


@pytest.mark.parametrize("model", MODELS)
def test_a_model_of_two_names_is_routed_as_with_one(model):
    expected = routed(MODELS[model]())
    found = routed(Twice(MODELS[model]()))
    assert found == {f"first.{name}": where for name, where in expected.items()}


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    "path", ["table", "layers", "layers.0", "layers.1", "layers.1.attention", "layers.0.up", "head"]
)
def test_another_name_of_a_module_moves_no_parameter(path, last):
    """As ``self.first = self.layers[0]``, beside the module or, for layers, beside their list."""
    model = Decoder()
    names = {param: name for name, param in model.named_parameters()}
    owner = model.get_submodule(path.rpartition(".")[0])
    owner = model if isinstance(owner, nn.ModuleList) else owner
    owner.alias = model.get_submodule(path)
    if not last:
        owner._modules = {"alias": owner._modules.pop("alias"), **owner._modules}
    found = {
        names[param]: (group["algorithm"], group.get("split"), group.get("layout"))
        for group in sinkgd.param_groups(model)
        for _, param in group["params"]
    }
    assert found == routed(Decoder())


def test_one_layer_of_two_names_is_not_taken_for_the_last_of_several():
    model = Twice(nn.Linear(8, 8))
    (matrices, _) = sinkgd.param_groups(model)
    assert [name for name, _ in matrices["params"]] == ["first.weight"]


def test_the_table_does_not_call_a_parameter_tied_to_its_own_copy():
    table = sinkgd.describe_param_groups(Fabric(Decoder()))
    assert "_forward_module.layers.*.up.weight ×2" in table
    assert "tied" not in table
    model = Decoder()
    model.head.weight = model.table.weight
    assert "tied to _forward_module.head.weight" in sinkgd.describe_param_groups(Fabric(model))


def test_layers_of_peft_are_not_blocks():
    """A base layer keeps its role, and what stands beside it in a Sequential, too."""
    model = mlp()
    expected = routed(mlp())
    for i in (0, 2):
        model[i] = Adapted(model[i])
    assert routed(model) == expected


# Heads --------------------------------------------------------------------------------------------


def box_head():
    """DETR's head for boxes, as torchvision and transformers have it."""
    head = nn.Module()
    head.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)])
    return head


def medusa_head():
    block = nn.Module()
    block.linear, block.act = nn.Linear(8, 8), nn.SiLU()
    return nn.Sequential(block, nn.Linear(8, 31, bias=False))


class ClassificationHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.out_proj = nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)


HEADS = {
    "boxes": lambda: nn.ModuleList([box_head() for _ in range(3)]),
    "medusa": lambda: nn.ModuleList([medusa_head() for _ in range(3)]),
    "classes": lambda: nn.ModuleList([nn.Linear(8, 91) for _ in range(3)]),
    "saved": lambda: SavedModules(ClassificationHead()),
    "value": lambda: nn.Linear(8, 1),
    "by name": lambda: nn.ModuleDict({"a": medusa_head(), "b": medusa_head()}),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_go_to_adamw_and_blocks_stay_what_they_are(head):
    model = Decoder()
    expected = routed(Decoder())
    model.more = HEADS[head]()
    found = routed(model)
    assert {name: found[name] for name in expected} == expected
    others = {name: where for name, where in found.items() if name.startswith("more")}
    assert others
    assert {algorithm for algorithm, *_ in others.values()} == {"adamw"}


# Experts ------------------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(4, 12, 8)), nn.Parameter(torch.ones(4, 8, 12))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(8, bias=False), nn.Linear(8, 4, bias=False)


EXPERTS = {"list": lambda: nn.ModuleList([Expert() for _ in range(4)]), "stack": Stack}
ROUTERS = {"linear": lambda: nn.Linear(8, 4, bias=False), "module": Router}


def mixture(experts, router):
    """Return blocks of attention, whose keys are as many as experts, a router and experts."""
    block = nn.Module()
    block.attention = nn.Module()
    block.attention.q, block.attention.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
    block.router, block.experts = ROUTERS[router](), EXPERTS[experts]()
    model = nn.Module()
    model.embed, model.head = nn.Embedding(31, 8), nn.Linear(8, 31)
    model.layers = nn.ModuleList([block])
    return model


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("wrapper", [None, checkpoint_wrapper])
def test_experts_are_matrices_and_their_router_is_not(experts, router, wrapper):
    model = mixture(experts, router)
    if wrapper is not None:
        for name in ("router", "experts"):
            block = model.layers[0]
            setattr(block, name, wrapper(getattr(block, name)))
    found = {name: algorithm for name, (algorithm, *_) in routed(model).items()}
    inside = {name: where for name, where in found.items() if name.startswith("layers")}
    assert {name for name, where in inside.items() if where == "adamw"} == {
        name for name in inside if ".router." in name
    }


# Every layer of torch -----------------------------------------------------------------------------

ARGUMENTS = {
    nn.AdaptiveLogSoftmaxWithLoss: [((16, 20, [5, 10]), {})],
    nn.BatchNorm1d: [((4,), {})],
    nn.BatchNorm2d: [((4,), {})],
    nn.BatchNorm3d: [((4,), {})],
    nn.Bilinear: [((3, 4, 5), {})],
    nn.Conv1d: [((4, 6, 3), {}), ((4, 4, 3), {"groups": 4}), ((4, 8, 3), {"groups": 2})],
    nn.Conv2d: [((4, 6, 3), {}), ((4, 4, 3), {"groups": 4})],
    nn.Conv3d: [((4, 6, 3), {})],
    nn.ConvTranspose1d: [((4, 6, 3), {}), ((4, 8, 3), {"groups": 2})],
    nn.ConvTranspose2d: [((4, 6, 3), {})],
    nn.ConvTranspose3d: [((4, 6, 3), {})],
    nn.Embedding: [((9, 4), {})],
    nn.EmbeddingBag: [((9, 4), {})],
    nn.GRU: [((4, 6), {"num_layers": 2, "bidirectional": True})],
    nn.GRUCell: [((4, 6), {})],
    nn.GroupNorm: [((2, 4), {})],
    nn.InstanceNorm1d: [((4,), {"affine": True})],
    nn.InstanceNorm2d: [((4,), {"affine": True})],
    nn.InstanceNorm3d: [((4,), {"affine": True})],
    nn.LSTM: [
        ((4, 6), {"num_layers": 2}),
        ((8, 16), {"proj_size": 5}),
        ((8, 16), {"proj_size": 8, "bidirectional": True}),
    ],
    nn.LSTMCell: [((4, 6), {})],
    nn.LayerNorm: [((4,), {}), (((3, 4),), {})],
    nn.Linear: [((4, 6), {}), ((4, 1), {}), ((1, 1), {})],
    nn.MultiheadAttention: [((8, 2), {}), ((8, 2), {"add_bias_kv": True, "kdim": 6, "vdim": 5})],
    nn.PReLU: [((4,), {})],
    nn.RMSNorm: [((4,), {}), (((3, 4),), {})],
    nn.RNN: [((4, 6), {})],
    nn.RNNCell: [((4, 6), {})],
    nn.SyncBatchNorm: [((4,), {})],
    nn.Transformer: [((8, 2, 1, 1, 16), {})],
    nn.TransformerDecoderLayer: [((8, 2, 16), {})],
    nn.TransformerEncoderLayer: [((8, 2, 16), {})],
}
# Made from other layers' parameters, or without any.
NEEDS_A_MODEL = {
    "TransformerEncoder", "TransformerDecoder", "DataParallel", "NonDynamicallyQuantizableLinear",
}  # fmt: skip
# By the layer's class and the attribute: whatever else has two dimensions goes to AdamW.
MATRICES = {
    ("Linear", "weight"): 1,
    ("NonDynamicallyQuantizableLinear", "weight"): 1,
    ("MultiheadAttention", "in_proj_weight"): 3,
    ("MultiheadAttention", "q_proj_weight"): 1,
    ("MultiheadAttention", "k_proj_weight"): 1,
    ("MultiheadAttention", "v_proj_weight"): 1,
    ("LSTM", "weight_ih"): 4,
    ("LSTM", "weight_hh"): 4,
    ("LSTM", "weight_hr"): 1,
    ("GRU", "weight_ih"): 3,
    ("GRU", "weight_hh"): 3,
    ("RNN", "weight_ih"): 1,
    ("RNN", "weight_hh"): 1,
    ("Conv1d", "weight"): None,  # as many as groups
    ("Conv2d", "weight"): None,
    ("Conv3d", "weight"): None,
}


def layers_with_parameters():
    """Every class of torch.nn that can be made, and that has parameters."""
    kinds = [
        kind for kind in vars(nn).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)
    ]
    return sorted(
        {kind for kind in kinds if kind.__name__ not in NEEDS_A_MODEL}, key=lambda k: k.__name__
    )


def test_the_table_has_every_layer_with_parameters():
    source = {kind.__name__ for kind in layers_with_parameters() if _registers_parameters(kind)}
    listed = {kind.__name__ for kind in ARGUMENTS}
    assert source <= listed, source - listed


def _registers_parameters(kind):
    text = inspect.getsource(kind)
    return (
        ("Parameter(" in text or "register_parameter(" in text)
        and kind is not nn.Module
        and (
            "Lazy" not in kind.__name__
            and not kind.__name__.startswith("_")
            and kind
            not in (nn.ParameterList, nn.ParameterDict, nn.RNNBase, nn.Container, nn.RNNCellBase)
        )
    )


CASES = [(kind, *case) for kind, cases in ARGUMENTS.items() for case in cases]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(
    ("kind", "args", "options"), CASES, ids=lambda x: getattr(x, "__name__", "")
)
def test_every_layer_of_torch_is_routed_and_steps(kind, args, options):
    """In a block, between blocks of another kind, so that no layer counts as the head."""
    block = nn.Sequential(kind(*args, **options), nn.LayerNorm(3))
    model = nn.ModuleList([block])
    modules = dict(model.named_modules())
    for group in sinkgd.param_groups(model):
        for name, param in group["params"]:
            path, _, attribute = name.rpartition(".")
            layer = modules[path]
            stem = attribute.split("_l")[0]
            key = (type(layer).__name__, stem)
            is_matrix = param.ndim > 1 and key in MATRICES and not _is_depthwise(layer)
            is_matrix = is_matrix and (param.ndim > 2 or 1 not in param.shape)
            assert group["algorithm"] == ("sinkgd" if is_matrix else "adamw"), name
            if is_matrix:
                split = MATRICES[key] or layer.groups
                assert group["split"] == split, name
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())


def _is_depthwise(layer):
    return getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "norm", [old_weight_norm, parametrizations.weight_norm], ids=["old", "new"]
)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d])
def test_gains_of_weight_norms_go_to_adamw_and_directions_are_matrices(kind, norm):
    layer = kind(6, 4) if kind is nn.Linear else kind(6, 4, 3)
    model = nn.ModuleList([nn.Sequential(norm(layer), nn.LayerNorm(4))])
    found = {}
    for group in sinkgd.param_groups(model):
        for _, param in group["params"]:
            found.setdefault(group["algorithm"], []).append(param.numel())
    assert found["sinkgd"] == [layer.weight.numel()]
    assert 4 in found["adamw"]


@pytest.mark.parametrize("norm", [old_spectral_norm, parametrizations.orthogonal])
def test_other_parametrizations_keep_the_role_of_their_weight(norm):
    model = nn.ModuleList([nn.Sequential(norm(nn.Linear(6, 4)), nn.LayerNorm(4))])
    algorithms = [
        g["algorithm"] for g in sinkgd.param_groups(model) for _, p in g["params"] if p.ndim > 1
    ]
    assert algorithms == ["sinkgd"]
