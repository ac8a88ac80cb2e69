"""Who goes where is read from the modules, not from their names."""

import ast
import re
import warnings

import pytest
import torch
from torch import nn

import sinkgd
from optimizer_cases import ABSENT
from sinkgd.optim.methods import METHODS
from sinkgd.optim.roles import roles


def where(model, **options):
    """Return the algorithm of each parameter by name."""
    return {
        name: group["algorithm"]
        for group in sinkgd.param_groups(model, **options)
        for name, _ in group["params"]
    }


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.n = nn.LayerNorm(width)
        self.x = nn.Linear(width, 2 * width)
        self.y = nn.Linear(2 * width, width)


class Model(nn.Module):
    """Names that say nothing: only types and places are left to go by."""

    def __init__(self, tied=False, depth=2):
        super().__init__()
        self.a = nn.Embedding(32, 8)
        self.b = nn.ModuleList(Block() for _ in range(depth))
        self.c = nn.Linear(8, 32, bias=False)
        if tied:
            self.c.weight = self.a.weight


@pytest.mark.parametrize("depth", [1, 2])
def test_linears_in_blocks_are_matrices_and_all_else_is_not(depth):
    found = where(Model(depth=depth))
    matrices = {name for name, algorithm in found.items() if algorithm == "sinkgd"}
    assert matrices == {f"b.{i}.{x}.weight" for i in range(depth) for x in "xy"}
    assert len(found) == 2 + 6 * depth


def test_a_tied_weight_counts_once_whoever_comes_first():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 32, bias=False)
            self.blocks = nn.ModuleList([Block()])
            self.table = nn.Embedding(32, 8)
            self.table.weight = self.head.weight

    assert where(Model(tied=True))["a.weight"] == "adamw"
    found = where(HeadFirst())
    assert found["head.weight"] == "adamw"
    assert "table.weight" not in found


def test_a_linear_tied_to_an_embedding_inside_a_block_is_no_matrix():
    model = Model()
    model.b[0].table = nn.Embedding(16, 8)
    model.b[0].x.weight = model.b[0].table.weight
    assert where(model)["b.0.x.weight"] == "adamw"


def test_frozen_parameters_are_left_out():
    model = Model()
    model.a.requires_grad_(False)
    assert "a.weight" not in where(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        sinkgd.param_groups(model)


def test_without_blocks_the_last_layer_is_the_head():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert [where(model)[f"{i}.weight"] for i in (0, 2, 4)] == ["sinkgd", "sinkgd", "adamw"]


def test_a_model_of_one_layer_has_no_head():
    assert where(nn.Linear(4, 2)) == {"weight": "sinkgd", "bias": "adamw"}


def test_convolutions_flatten_and_depthwise_ones_go_to_adamw():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.full = nn.Conv2d(8, 8, 3)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.grouped = nn.Conv2d(8, 8, 3, groups=2)
            self.of_one_channel = nn.Conv2d(1, 8, 3)

    model = nn.Sequential(nn.Conv2d(3, 8, 7), Stage(), Stage())
    groups = sinkgd.param_groups(model)
    options = {
        n: (g["algorithm"], g.get("layout"), g.get("split")) for g in groups for n, _ in g["params"]
    }
    assert options["0.weight"][0] == "adamw"  # the stem stands outside the stages
    assert options["1.full.weight"] == ("sinkgd", "flatten", 1)
    assert options["1.grouped.weight"] == ("sinkgd", "flatten", 2)
    assert options["2.depthwise.weight"][0] == "adamw"
    assert options["1.of_one_channel.weight"] == ("sinkgd", "flatten", 1)
    sinkgd.SinkGD(groups)


def test_fused_projections_of_torch_are_split():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    (fused,) = [g for g in sinkgd.param_groups(model) if g.get("split") == 3]
    assert [name for name, _ in fused["params"]] == [
        "layers.0.self_attn.in_proj_weight",
        "layers.1.self_attn.in_proj_weight",
    ]


def test_recurrent_weights_are_split_by_gate():
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 8), "head": nn.Linear(8, 2)})
    groups = sinkgd.param_groups(model)
    assert [n for n, _ in groups[0]["params"]] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert groups[0]["split"] == 4


def test_expert_weights_are_batches_and_unknown_parameters_go_to_adamw():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 16, 8))
            self.table = nn.Parameter(torch.randn(16, 8))
            self.inner = nn.Identity()

    model = nn.ModuleList([Experts(), Experts()])
    found = where(model)
    assert found["0.up"] == "sinkgd"
    assert found["0.table"] == "adamw"
    assert "Experts is no known layer; see overrides" in sinkgd.describe_param_groups(model)


@pytest.mark.parametrize(
    "shape",
    [(16, 2, 8), (8, 2, 2), (32, 8, 8)],
    ids=["projection to heads", "positions", "more matrices than rows"],
)
def test_three_dimensions_whose_first_is_no_batch_go_to_adamw(shape):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Parameter(torch.randn(shape))
            self.segments = nn.Parameter(torch.randn(3, 4, 8))
            self.inner = nn.Identity()

    assert set(where(nn.ModuleList([Attention(), Attention()])).values()) == {"adamw"}


def test_a_class_of_ones_own_that_says_out_and_in_features_is_linear():
    class MyLinear(nn.Module):
        def __init__(self, width, length):
            super().__init__()
            self.in_features, self.out_features = width, length
            self.weight = nn.Parameter(torch.randn(length, width))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = MyLinear(4, 6), MyLinear(6, 4)

    assert set(where(nn.ModuleList([Layer(), Layer()])).values()) == {"sinkgd"}


def test_low_rank_adapters_go_to_adamw_and_their_base_does_not():
    class LoraLinear(nn.Module):  # the shape of PEFT's layers
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})

    found = where(nn.ModuleList([LoraLinear(), LoraLinear()]))
    assert found["0.lora_A.default.weight"] == found["1.lora_B.default.weight"] == "adamw"
    assert found["0.base_layer.weight"] == "sinkgd"


class Tuned(nn.Module):
    """What PEFT's layers of every method have in common, around a frozen base."""

    adapter_layer_names: tuple[str, ...] = ()

    def __init__(self, width=8):
        super().__init__()
        self.in_features = self.out_features = width
        self.base_layer = nn.Linear(width, width).requires_grad_(False)


class Loha(Tuned):
    def __init__(self):
        super().__init__()
        self.hada_w1_a = nn.ParameterDict({"default": torch.randn(8, 8)})


class Bone(Tuned):
    def __init__(self):
        super().__init__()
        self.bone_block = nn.ParameterDict({"default": torch.randn(2, 4, 4)})


class Oft(Tuned):
    def __init__(self):
        super().__init__()
        self.oft_R = nn.ModuleDict({"default": nn.Linear(8, 8, bias=False)})


@pytest.mark.parametrize("adapter", [Loha, Bone, Oft])
def test_adapters_of_every_method_go_to_adamw(adapter):
    model = nn.ModuleList([adapter(), adapter()])
    assert set(where(model).values()) == {"adamw"}
    assert "adapter" in sinkgd.describe_param_groups(model)


def test_a_first_layer_called_base_layer_is_no_adapter():
    """As in DLA, whose stem has this name."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            blocks = (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))
            self.layers = nn.ModuleList(blocks)
            self.head = nn.Linear(8, 3)

    found = where(Net())
    assert [name for name, to in found.items() if to == "sinkgd"] == [
        "layers.0.0.weight",
        "layers.1.0.weight",
    ]


class WithTables(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        blocks = (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 7)


@pytest.mark.parametrize("model", [Model, WithTables])
def test_learning_rates_and_decay_follow_the_recipe(model):
    made = model()
    reasons = {name: role.reason for name, _, role in roles(made)}
    for group in sinkgd.param_groups(made, lr=0.1, matrix_lr_scale=0.5, weight_decay=0.01):
        assert group["lr"] == (0.05 if group["algorithm"] == "sinkgd" else 0.1)
        for name, param in group["params"]:
            is_decayed = param.ndim >= 2 and reasons[name] not in {"embedding", "output head"}
            assert group["weight_decay"] == (0.01 if is_decayed else 0.0), name


def test_an_override_decays_an_embedding():
    overrides = {"^embed": {"weight_decay": 0.5}}
    groups = sinkgd.param_groups(WithTables(), weight_decay=0.01, overrides=overrides)
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decays["embed.weight"] == 0.5
    assert decays["head.weight"] == 0.0
    assert decays["layers.0.0.weight"] == 0.01


def test_overrides_choose_algorithms_and_options_and_the_first_match_decides():
    overrides = {
        r"^c\.": "sinkgd",
        r"b\.0\.x\.weight": {"split": 2, "lr": 0.125},
        r"b\.0\.x": "normalize",
        r"^a\.": "sinkgd",
    }
    groups = sinkgd.param_groups(Model(), lr=0.02, overrides=overrides)
    found = {name: group for group in groups for name, _ in group["params"]}
    assert found["c.weight"]["algorithm"] == "sinkgd"
    assert found["c.weight"]["lr"] == 0.0005
    assert (found["b.0.x.weight"]["split"], found["b.0.x.weight"]["lr"]) == (2, 0.125)
    assert found["b.0.x.bias"]["algorithm"] == "normalize"
    sinkgd.SinkGD(groups)


def test_an_override_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"has no effect, because earlier overrides match all of"):
        sinkgd.param_groups(Model(), overrides={"c": "adamw", "c.weight": "sinkgd"})
    with pytest.raises(ValueError, match=r"override 'lm_head' matches no parameter"):
        sinkgd.param_groups(Model(), overrides={"lm_head": "sinkgd"})


class Gated(nn.Module):
    """A matrix, a vector and a scalar below one name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.layers[0].gate = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("algorithm", METHODS)
@pytest.mark.parametrize(("pattern", "shape"), [("0.gate", "()"), ("layers.*bias", "(4,)")])
def test_an_override_that_gives_a_parameter_to_an_algorithm_for_larger_ones_is_refused(
    algorithm, pattern, shape
):
    """All that the optimizer would refuse is refused where the override is known."""
    model = Gated()
    overrides = {pattern: algorithm}
    param = next(p for name, p in model.named_parameters() if re.search(pattern, name))
    if param.ndim >= METHODS[algorithm].least_dims:
        group = {"params": [param], "algorithm": algorithm}
        if algorithm not in ABSENT:
            sinkgd.SinkGD([group])
        sinkgd.param_groups(model, overrides=overrides)
        return
    with pytest.raises(
        ValueError, match=rf"override '{re.escape(pattern)}' gives 'layers"
    ) as caught:
        sinkgd.param_groups(model, overrides=overrides)
    assert f"of shape {shape}, to {algorithm!r}, which updates matrices" in str(caught.value)
    remedy = ast.literal_eval(re.search(r"\{.*\}", str(caught.value))[0])
    with pytest.raises(ValueError, match=r"earlier overrides match all|gives 'layers\.1\.bias'"):
        sinkgd.param_groups(model, overrides={**remedy, **overrides})
    sinkgd.param_groups(model, overrides={r"layers.*weight$": "sinkgd"})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"algo": "adamw"}, "sets algo='adamw', .*; did you mean 'algorithm'"),
        ({"sinkhorn_iteration": 3}, ".*did you mean 'sinkhorn_iterations'"),
        ({"betas": (0.5, 0.5)}, "which algorithm 'sinkgd' does not take; its options are"),
    ],
    ids=str,
)
def test_an_override_with_an_option_that_its_algorithm_lacks_is_refused(override, said):
    with pytest.raises(ValueError, match=rf"^override 'x', which matches 'b.0.x.weight', .*{said}"):
        sinkgd.param_groups(Model(), overrides={"x": override})


def test_an_override_of_a_tied_weight_by_its_other_name_is_told_the_one_that_counts():
    model = nn.Sequential()
    model.add_module("tok", nn.Embedding(7, 4))
    model.add_module("head", nn.Linear(4, 7, bias=False))
    model.head.weight = model.tok.weight
    said = r"override '\^head' matches no parameter; 'head\.weight' is 'tok\.weight', a tied weight"
    for wrapped in (model, nn.DataParallel(model)):
        with pytest.raises(ValueError, match=said):
            sinkgd.param_groups(wrapped, overrides={"^head": "sinkgd"})
    groups = sinkgd.param_groups(model, overrides={"^tok": "sinkgd"})
    assert [group["algorithm"] for group in groups] == ["sinkgd"]


@pytest.mark.parametrize("argument", ["lr", "matrix_lr_scale", "weight_decay"])
def test_negative_rates_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument} must be at least 0, got -1"):
        sinkgd.param_groups(Model(), **{argument: -1.0})


def test_hidden_matrices_are_deflated_unless_the_paper_is_asked_for():
    def ranks(**options):
        groups = sinkgd.param_groups(Model(), overrides={r"^c\.": "sinkgd"}, **options)
        return {(group["algorithm"], group.get("deflated_rank")) for group in groups}

    assert ranks() == {("sinkgd", 15), ("adamw", None)}
    assert ranks(deflated_rank=0) == {("sinkgd", 0), ("adamw", None)}
    assert ranks(matrix_algorithm="swan") == {("swan", None), ("sinkgd", 15), ("adamw", None)}
    with pytest.raises(ValueError, match="deflated_rank must be a whole number of at least 0"):
        sinkgd.SinkGD(sinkgd.param_groups(Model(), deflated_rank=-1))
    with pytest.raises(
        ValueError, match=r"=4 has no effect.* param_groups\(model, deflated_rank=4"
    ):
        sinkgd.SinkGD(sinkgd.param_groups(Model()), deflated_rank=4)
    sinkgd.SinkGD(sinkgd.param_groups(Model(), deflated_rank=4), deflated_rank=4)
    assert "sinkgd, deflated 15" in sinkgd.describe_param_groups(Model())


@pytest.mark.parametrize("options", [{"matrix_lr_scale": 0.05}, {"base_width": 4}])
@pytest.mark.parametrize(
    ("model", "overrides"), [(nn.Embedding(8, 4), None), (Model(), {"": "adamw"})]
)
def test_rates_of_matrices_are_refused_if_no_matrix_takes_them(model, overrides, options):
    (shown,) = (f"{name}={value}" for name, value in options.items())
    with pytest.raises(
        ValueError, match=f"{shown} has no effect: no hidden matrix has a rate of its own"
    ):
        sinkgd.param_groups(model, overrides=overrides, **options)
    sinkgd.param_groups(Model(), **options)


def test_a_rate_of_adamw_given_as_lr_warns_at_the_call():
    with pytest.warns(UserWarning, match=r"rate of 5e-07.* pass adamw_lr=2e-05 instead") as found:
        sinkgd.param_groups(Model(), lr=2e-5)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkgd.param_groups(Model(), lr=2e-5, matrix_lr_scale=0.025)
        sinkgd.param_groups(Model(), adamw_lr=2e-5)
        sinkgd.param_groups(Model(), lr=1e-3)
        sinkgd.param_groups(Model(), lr=0.0)
        sinkgd.param_groups(nn.Embedding(8, 4), lr=2e-5)  # all of it is AdamW's


@pytest.mark.parametrize("algorithm", ["sinkgd", "swan"])
def test_the_groups_train_a_model(algorithm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model, 0.01, 0.5, matrix_algorithm=algorithm))
    x = torch.randn(64, 4)
    y = x.sum(dim=1, keepdim=True)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    matrices = {p for p in model.parameters() if p.ndim == 2} - {model[4].weight}
    assert not matrices & set(optimizer.state)


def test_another_routing_is_refused_on_loading_by_name():
    model = Model()
    saved = sinkgd.SinkGD(sinkgd.param_groups(model)).state_dict()
    other = sinkgd.SinkGD(sinkgd.param_groups(model, overrides={r"b\.1\.y\.weight": "adamw"}))
    with pytest.raises(ValueError, match=r"'b\.1\.y\.weight' is in group 0 of the checkpoint, but"):
        other.load_state_dict(saved)
    swan = sinkgd.SWAN(sinkgd.param_groups(model, matrix_algorithm="swan"))
    with pytest.raises(ValueError, match="group 0 has algorithm 'sinkgd' in the checkpoint and"):
        swan.load_state_dict(saved)
    with pytest.raises(ValueError, match="2 parameter groups, this optimizer has 1"):
        sinkgd.SinkGD(model.named_parameters(), lr=0.1).load_state_dict(saved)


def test_other_norms_are_refused_on_loading():
    weight = nn.Parameter(torch.ones(2, 2))
    saved = sinkgd.MNGD([weight], 0.1, norms=[sinkgd.SpectralNorm(5)]).state_dict()
    with pytest.raises(ValueError, match=r"norms \('SpectralNorm\(num_steps=5\)',\) in the checkp"):
        sinkgd.MNGD([weight], 0.1, norms=[sinkgd.SpectralNorm(7)]).load_state_dict(saved)


def test_the_table_shows_every_parameter_once_with_its_reason():
    model = Model()
    table = sinkgd.describe_param_groups(model)
    assert "b.*.x.weight ×2" in table
    lines = {line.split()[0]: line for line in table.splitlines()}
    shape, _, *others = lines["a.weight"].split(None, 5)[1:]
    assert [shape, *others] == ["32×8", "adamw", "0.08", "embedding"]
    assert lines["c.weight"].endswith("output head")
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(model))
    shown = sinkgd.describe_param_groups(model, optimizer.param_groups)
    assert shown.splitlines()[:-1] == table.splitlines()[:-1]


def test_a_width_divides_the_learning_rate_of_hidden_matrices_by_their_inputs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
            self.kernel = nn.Conv2d(4, 6, 3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    groups = sinkgd.param_groups(Net(), 0.02, 0.05, base_width=16, overrides={"1.up": {"lr": 7.0}})
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert rates["blocks.0.up.weight"] == pytest.approx(0.001 * 16 / 8)
    assert rates["blocks.0.down.weight"] == pytest.approx(0.001 * 16 / 32)
    assert rates["blocks.0.kernel.weight"] == pytest.approx(0.001 * 16 / 36)
    assert rates["blocks.1.up.weight"] == 7.0
    assert rates["table.weight"] == rates["blocks.0.up.bias"] == 0.02


def test_a_width_counts_the_inputs_of_a_transposed_linear():
    class Conv1D(nn.Module):  # as in transformers: (in, out)
        def __init__(self, out, inputs):
            super().__init__()
            self.nf, self.weight = out, nn.Parameter(torch.zeros(inputs, out))

    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(Conv1D(5, 8), Conv1D(8, 5)) for _ in range(2))
    groups = sinkgd.param_groups(model, 1.0, 1.0, base_width=8)
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert rates["blocks.0.0.weight"] == pytest.approx(1.0)
    assert rates["blocks.0.1.weight"] == pytest.approx(8 / 5)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_close_rates_stay_apart(kind):
    model = nn.Sequential(nn.Linear(768, 8), nn.Linear(8, 1024), nn.Linear(1024, 8))
    overrides = {"0.weight": {"lr": kind(0.00312)}, "1.weight": {"lr": kind(0.00308)}}
    groups = sinkgd.param_groups(model, lr=kind(0.02), matrix_lr_scale=0.05, overrides=overrides)
    rates = {name: float(group["lr"]) for group in groups for name, _ in group["params"]}
    assert rates["0.weight"] == pytest.approx(0.00312)
    assert rates["1.weight"] == pytest.approx(0.00308)


class TestOnly:
    """Groups of some parameters, as the whole model decides them."""

    @pytest.mark.parametrize("part", ["b.1", "b.1.y", "c", "a"])
    def test_they_are_the_groups_that_the_whole_model_gives(self, part):
        model = Model()
        whole, params = where(model), {*model.get_submodule(part).parameters()}
        named = {name for name, param in model.named_parameters() if param in params}
        assert where(model, only=params) == {name: whole[name] for name in named}

    def test_they_are_added_to_an_optimizer(self):
        model = Model()
        model.b[1].requires_grad_(False)
        optimizer = sinkgd.SinkGD(sinkgd.param_groups(model))
        model.b[1].requires_grad_(True)
        for group in sinkgd.param_groups(model, only=model.b[1].parameters()):
            optimizer.add_param_group(group)
        assert "In no group" not in sinkgd.describe_param_groups(model, optimizer.param_groups)
        rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {"sinkgd": 0.002, "adamw": 0.08}

    def test_options_have_an_effect_if_they_have_one_on_the_whole_model(self):
        model = Model()
        (group,) = sinkgd.param_groups(model, deflated_rank=3, only=[model.a.weight])
        assert group["algorithm"] == "adamw"

    @pytest.mark.parametrize("frozen", [False, True])
    def test_other_tensors_are_refused(self, frozen):
        model = Model()
        model.a.requires_grad_(False)
        tensor = model.a.weight if frozen else torch.ones(32, 8)
        with pytest.raises(ValueError, match=r"contains a tensor of shape \(32, 8\) .*unfreeze"):
            sinkgd.param_groups(model, only=[tensor])


def test_a_matrix_that_is_added_without_a_rate_is_refused_if_rates_differ():
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(Model()))
    before = len(optimizer.param_groups)
    for group in ({}, {"algorithm": "sinkgd"}):
        new = {"params": [nn.Parameter(torch.ones(4, 3))], **group}
        with pytest.raises(ValueError, match=r"no lr, .*0\.002 and 0\.08; .*only=parameters"):
            optimizer.add_param_group(new)
    assert len(optimizer.param_groups) == before
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))], "algorithm": "adamw"})
    assert optimizer.param_groups[-1]["lr"] == 0.08


def test_a_rate_is_asked_for_during_a_warmup_too():
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(Model()))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    with pytest.raises(ValueError, match=r"no lr, .*0\.002 and 0\.08"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 3))]})


def test_a_rate_that_was_passed_is_taken_by_later_groups():
    one, two, three = (nn.Parameter(torch.ones(4, 3)) for _ in range(3))
    optimizer = sinkgd.SinkGD([{"params": [one], "lr": 1e-3}, {"params": [two]}], lr=1e-2)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    optimizer.add_param_group({"params": [three]})
    assert optimizer.param_groups[-1]["lr"] == 1e-2


def test_a_width_below_one_is_refused():
    with pytest.raises(ValueError, match="base_width must be at least 1, got 0"):
        sinkgd.param_groups(nn.Linear(2, 2), base_width=0)


@pytest.mark.parametrize("function", [sinkgd.param_groups, sinkgd.describe_param_groups])
def test_a_lazy_module_is_refused_by_name_until_it_has_run(function):
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"'1.weight' .* run one forward pass first"):
        function(model)
    model(torch.ones(2, 3))
    function(model)


NO_BETAS = [0.9, (0.9,), "0.9,0.95", ("0.9", 0.95), (0.9, 1.0), ()]


@pytest.mark.parametrize("betas", NO_BETAS)
def test_what_is_no_pair_of_betas_is_refused(betas):
    group = {"params": [nn.Parameter(torch.ones(3))], "algorithm": "adamw", "betas": betas}
    for call in (
        lambda: sinkgd.param_groups(Model(), betas=betas),
        lambda: sinkgd.SinkGD([group], lr=0.1),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^betas must (be|lie) "):
            call()


class TestRatesOfAdamW:
    def groups(self, **options):
        return sinkgd.param_groups(Model(), adamw_lr=1e-3, **options)

    def test_matrices_get_the_rate_whose_updates_are_as_large_as_adamws(self):
        rates = {group["algorithm"]: group["lr"] for group in self.groups()}
        assert rates == {"sinkgd": pytest.approx(3e-4), "adamw": 1e-3}

    def test_a_step_decays_every_matrix_and_table_alike_and_no_vector(self):
        decays = {}
        for group in self.groups(weight_decay=0.1):
            for name, param in group["params"]:
                decays[name] = (param.ndim, group["lr"] * group["weight_decay"])
        assert {"a.weight", "c.weight"} <= decays.keys()  # the embedding and the head
        for ndim, decay in decays.values():
            assert decay == pytest.approx(1e-4 if ndim >= 2 else 0.0)

    def test_the_betas_are_torchs(self):
        found = {group["betas"] for group in self.groups() if group["algorithm"] == "adamw"}
        assert found == {(0.9, 0.999)}
        given = self.groups(betas=(0.5, 0.75))
        assert {group.get("betas", (0.5, 0.75)) for group in given} == {(0.5, 0.75)}

    def test_another_algorithm_of_matrices_has_the_same_size(self):
        found = self.groups(matrix_algorithm="swan")
        (rate,) = {group["lr"] for group in found if group["algorithm"] == "swan"}
        assert rate == pytest.approx(3e-4)

    @pytest.mark.parametrize("other", [{"lr": 0.02}, {"matrix_lr_scale": 0.05}], ids=str)
    def test_a_rate_that_it_replaces_is_refused_beside_it(self, other):
        ((name, value),) = other.items()
        with pytest.raises(ValueError, match=rf"adamw_lr=0.001 sets all rates, and {name}={value}"):
            self.groups(**other)

    @pytest.mark.parametrize("bad", [-1.0, "1e-3", float("nan")], ids=str)
    def test_what_is_no_rate_is_refused_by_its_name(self, bad):
        with pytest.raises((TypeError, ValueError), match=r"^adamw_lr must be"):
            sinkgd.param_groups(Model(), adamw_lr=bad)

    def test_a_tensor_is_a_rate(self):
        rate = torch.tensor(1e-3)
        (lr,) = {
            float(group["lr"])
            for group in sinkgd.param_groups(Model(), adamw_lr=rate)
            if group["algorithm"] == "sinkgd"
        }
        assert lr == pytest.approx(3e-4)
