"""A constructor argument takes effect or is refused, whatever the optimizer and the option."""

import copy
import inspect
import math
import re

import pytest
import torch
from torch import nn

import sinkgd
from exports import OPTIMIZER_CLASSES
from sinkgd.optim.arguments import COMMON, KINDS, OF_GROUPS, OF_PARAM_GROUPS
from sinkgd.optim.methods import METHODS

NORMS = (sinkgd.RowNorm(),)
CLASSES = {
    "SinkGD": sinkgd.SinkGD,
    "SinkGDVariant": sinkgd.SinkGDVariant,
    "SWAN": sinkgd.SWAN,
    "MNGD": sinkgd.MNGD,
    "SRON": sinkgd.SRON,
    "SCALE": sinkgd.SCALE,
    "TemperedSinkGD": sinkgd.TemperedSinkGD,
    "SPAM": sinkgd.SPAM,
    "AdamWSPAM": sinkgd.AdamWSPAM,
}
# Of each option: two values that are valid, the second of them no default, and one out of range.
VALUES = {
    "lr": (0.5, 0.25, -1.0),
    "weight_decay": (0.5, 0.25, -1.0),
    "cautious_decay": (False, True, None),
    "maximize": (False, True, None),
    "nonfinite": ("raise", "skip", "ignore"),
    "sinkhorn_iterations": (3, 4, 0),
    "backend": ("auto", "eager", "none"),
    "tol": (0.25, 0.5, -1.0),
    "warm_start": (False, True, None),
    "rounding": ("nearest", "stochastic", "up"),
    "seed": (3, 4, -1),
    "momentum": (0.25, 0.5, 1.5),
    "nesterov": (False, True, None),
    "momentum_place": ("before", "after", "middle"),
    "momentum_bits": (32, 8, 16),
    "momentum_rank": (2, 1, -1),
    "low_rank_momentum": (0.25, 0.5, 1.5),
    "cross_fit": (False, True, None),
    "averaged_scales": (0.25, 0.5, 1.5),
    "last": ("column", "row", "rows"),
    "first": (None, "row", "rows"),
    "tiny_rows": ("keep", "mask", "drop"),
    "tiny_row_threshold": (0.25, 0.5, -1.0),
    "deflated_rank": (2, 1, -1),
    "deflated_start": ("fixed", "kept", "last"),
    "operator_norm": (None, "muon", "spectral"),
    "weight_projection": (False, True, None),
    "constant_norm": (False, True, None),
    "newton_schulz_steps": (3, 4, 0),
    "num_iters": (3, 4, 0),
    "norms": ((sinkgd.RowNorm(),), (sinkgd.SignNorm(),), ()),
    "tau": (0.25, 0.5, 0.0),
    "n_iter": (3, 4, -1),
    "eps": (0.25, 0.5, -1.0),
    "betas": ((0.25, 0.5), (0.5, 0.75), (1.5, 0.5)),
    "theta": (30.0, 40.0, -1.0),
    "clip_delay": (3, 4, -1),
    "reset_interval": (30, 40, 0),
    "warmup_steps": (3, 4, -1),
    "max_norm": (0.25, 0.5, 0.0),
    "spike_z": (0.25, 0.5, 0.0),
    "norm_window": (30, 40, 2),
}
NEEDS = {
    "nesterov": {"momentum": 0.5},
    "momentum_place": {"momentum": 0.5},
    "momentum_bits": {"momentum": 0.5, "momentum_place": "after"},
    "low_rank_momentum": {"momentum_rank": 2},
    "tiny_row_threshold": {"tiny_rows": "mask"},
    "deflated_start": {"deflated_rank": 2},
    "clip_delay": {"theta": 30.0},
    "cautious_decay": {"weight_decay": 0.5},
    "seed": {"rounding": "stochastic"},
}
# What disables an option that another one needs.
OFF = {
    **{key: {"momentum": 0.0} for key in ("nesterov", "momentum_place", "momentum_bits")},
    "low_rank_momentum": {"momentum_rank": 0},
    "tiny_row_threshold": {"tiny_rows": "keep"},
    "deflated_start": {"deflated_rank": 0},
    "clip_delay": {"theta": None},
    "norm_window": {"spike_z": math.inf},
    "tau": {"n_iter": 0},
    "cautious_decay": {"weight_decay": 0.0},
}


def options_of(kind):
    """Return the arguments of a class but ``params``, with their defaults."""
    parameters = inspect.signature(kind).parameters
    if kind is sinkgd.SinkGDVariant:  # it passes the rest on, as SRON and SCALE do
        parameters = {**inspect.signature(sinkgd.SinkGD).parameters, **parameters}
        parameters.pop("options")
    if "options" in parameters:
        fixed = {"norms", "num_iters"}
        inner = inspect.signature(sinkgd.MNGD).parameters
        parameters = {k: v for k, v in inner.items() if k not in fixed}
    return {name: p.default for name, p in parameters.items() if name not in ("self", "params")}


CASES = [(name, option) for name, kind in CLASSES.items() for option in options_of(kind)]
every_class = pytest.mark.parametrize("name", CLASSES)
every_option = pytest.mark.parametrize(("name", "option"), CASES)


def build(name, groups, **options):
    if name == "MNGD":
        options.setdefault("norms", NORMS)
    return CLASSES[name](groups, **options)


def matrix():
    return nn.Parameter(torch.ones(4, 3))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))) for _ in range(2)
        )
        self.head = nn.Linear(4, 2)


def test_the_table_has_every_class():
    assert {*CLASSES} == OPTIMIZER_CLASSES


def test_the_table_has_every_argument_of_every_class():
    assert {option for _, option in CASES} == set(VALUES)


@every_option
def test_the_default_in_the_signature_is_the_one_in_effect(name, option):
    optimizer = build(name, [matrix()], **NEEDS.get(option, {}))
    default = options_of(CLASSES[name])[option]
    if option == "norms":  # a default of none, which is refused
        return
    if default is None:
        default = optimizer.none_means.get(option)
    assert optimizer.param_groups[0][option] == default
    if option != "momentum":
        assert optimizer.defaults[option] == default


@every_option
def test_an_argument_reaches_the_groups_that_do_not_set_it(name, option):
    own, passed, _ = VALUES[option]
    fixed = NEEDS.get(option, {})
    groups = [{"params": [matrix()], option: own}, {"params": [matrix()]}]
    optimizer = build(name, groups, **{**fixed, option: passed})
    assert [group[option] for group in optimizer.param_groups] == [own, passed]
    optimizer.add_param_group({"params": [matrix()]})
    assert optimizer.param_groups[2][option] == passed


DEPENDENT = pytest.mark.parametrize(("name", "option"), [c for c in CASES if c[1] in OFF])


def test_the_table_has_every_option_that_needs_another():
    found = {option: need for method in METHODS.values() for option, need in method.needs.items()}
    assert {*found, "cautious_decay"} == set(OFF)
    assert all(OFF[option] == {need.switch: need.off} for option, need in found.items())
    assert all(need.switch in need.remedy for need in found.values())


@DEPENDENT
def test_an_option_without_the_one_that_it_needs_is_refused(name, option):
    ((switch, off),), value = OFF[option].items(), VALUES[option][1]
    message = rf"{option}={value!r} needs .*\b{switch}\b.*; without it, leave out {option}"
    with pytest.raises(ValueError, match=message):
        build(name, [matrix()], **{switch: off, option: value})
    off_groups = [{"params": [matrix()], switch: off} for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        build(name, off_groups, **{option: value})
    if option == "cautious_decay":  # param_groups sets it in all groups, whether they decay or not
        return
    group = {"params": [matrix()], switch: off, option: value}
    needed = NEEDS.get(option, {})
    with pytest.raises(ValueError, match=message):
        build(name, [{"params": [matrix()]}, dict(group)], **needed)
    optimizer = build(name, [matrix()], **needed)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1


@DEPENDENT
def test_an_option_is_taken_if_a_group_has_the_one_that_it_needs(name, option):
    value, needed = VALUES[option][1], NEEDS.get(option, {})
    groups = [{"params": [matrix()], **OFF[option]}, {"params": [matrix()], **needed}]
    optimizer = build(name, groups, **{option: value})
    assert [group[option] for group in optimizer.param_groups] == [value, value]


@DEPENDENT
def test_an_option_at_its_default_needs_nothing(name, option):
    default = options_of(CLASSES[name])[option]
    build(name, [matrix()], **OFF[option], **{option: default})
    build(name, [{"params": [matrix()], **OFF[option], option: default}])


def test_an_argument_may_be_meant_for_some_of_the_groups():
    groups = sinkgd.param_groups(Model(), overrides={"head.weight": "sinkgd-table"})
    variant = sinkgd.SinkGDVariant(groups, tiny_row_threshold=0.1, deflated_start="kept")
    found = {group["algorithm"]: group for group in variant.param_groups}
    assert found["sinkgd-table"]["tiny_row_threshold"] == 0.1
    assert found["sinkgd"]["deflated_start"] == "kept"


@every_option
def test_an_argument_that_every_group_sets_is_refused_with_the_remedy(name, option):
    own, passed, _ = VALUES[option]
    groups = [{"params": [matrix()], **NEEDS.get(option, {}), option: own} for _ in range(2)]
    with pytest.raises(ValueError, match=f"^{option}=.* has no effect: every group sets") as caught:
        build(name, groups, **{option: passed})
    assert "leave it out" in str(caught.value)
    assert repr(passed) in str(caught.value)


@every_option
def test_an_argument_that_all_groups_agree_with_is_taken(name, option):
    _, passed, _ = VALUES[option]
    fixed = NEEDS.get(option, {})
    groups = [{"params": [matrix()], **fixed, option: passed} for _ in range(2)]
    assert build(name, groups, **{option: passed}).defaults[option] == passed


@every_option
def test_an_option_that_no_group_takes_is_refused(name, option):
    groups = [{"params": [matrix()], "algorithm": "adamw"}]
    options = {option: VALUES[option][1]}
    if option == "cautious_decay":
        options |= NEEDS[option]
    adamws = {"lr", "weight_decay", "cautious_decay", "maximize", "nonfinite", "eps", "betas"}
    adamws |= {"rounding", "seed"}
    if name == "MNGD" and option != "norms":
        options["norms"] = ()
    if name in ("SRON", "SCALE"):  # their norms are options that no group takes
        with pytest.raises(ValueError, match="has no effect: the groups run 'adamw'"):
            CLASSES[name](groups, **options)
    elif option in adamws:
        assert CLASSES[name](groups, **options).param_groups[0][option] == VALUES[option][1]
    else:
        with pytest.raises(ValueError, match=f"^{option}=.* has no effect: the groups run 'adamw'"):
            CLASSES[name](groups, **options)


@pytest.mark.parametrize(
    ("name", "option"), [case for case in CASES if VALUES[case[1]][2] is not None]
)
def test_a_value_out_of_range_is_refused_under_its_own_name(name, option):
    bad = VALUES[option][2]
    with pytest.raises(ValueError, match=rf"\b{option}\b"):
        build(name, [matrix()], **NEEDS.get(option, {}) | {option: bad})


@every_class
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_a_rate_that_is_no_number_is_refused(name, option):
    with pytest.raises(TypeError, match=f"{option} must be a number, got '0.1'"):
        build(name, [matrix()], **{option: "0.1"})


@every_class
def test_an_argument_of_param_groups_is_named_in_the_remedy(name):
    algorithm = CLASSES[name].default_algorithm
    algorithm = "sinkgd" if algorithm == "stateless" else algorithm
    groups = sinkgd.param_groups(Model(), matrix_algorithm=algorithm)
    with pytest.raises(ValueError, match=r"pass it to param_groups\(model, lr=0.001\)"):
        build(name, groups, lr=0.001)


# The call that gives a model to each class.
CALL_FOR_A_MODEL = {
    "SinkGD": "SinkGD(param_groups(model))",
    "SinkGDVariant": "SinkGDVariant(param_groups(model))",
    "SWAN": "SWAN(param_groups(model, matrix_algorithm='swan'))",
    "MNGD": "MNGD(param_groups(model, matrix_algorithm='mngd'), norms=[...])",
    "SRON": "SRON(param_groups(model, matrix_algorithm='mngd'))",
    "SCALE": "SCALE(scale_groups(model))",
    "TemperedSinkGD": "TemperedSinkGD(model.parameters())",
    "SPAM": "SPAM(model.parameters())",
    "AdamWSPAM": "AdamWSPAM(model.parameters())",
}


@every_class
def test_a_model_and_its_parameters_are_taken_or_refused_with_the_right_call(name):
    call = CALL_FOR_A_MODEL[name]
    with pytest.raises(TypeError, match=rf"params is a model, Model; write {re.escape(call)}$"):
        build(name, Model())
    given = {"model": Model(), **vars(sinkgd), "norms": NORMS}
    optimizer = eval(call.replace("[...]", "norms"), given)  # the remedy is one
    assert type(optimizer) is CLASSES[name]
    if name.startswith("SinkGD"):  # the group of the default algorithm takes all shapes
        vectors = [{"params": Model().parameters(), "algorithm": "sinkgd"}]
    elif "param_groups" in call or "scale_groups" in call:
        vectors = Model().parameters()
    else:
        build(name, Model().parameters())
        return
    with pytest.raises(ValueError, match=rf"has shape \(8,\)\. Write {re.escape(call)}, or give"):
        build(name, vectors)


@every_class
@pytest.mark.parametrize("params", [None, 3, "weights", {"params": []}, torch.ones(2)], ids=str)
def test_what_is_no_list_of_parameters_is_refused(name, params):
    with pytest.raises(TypeError, match=r"params must be a list of groups, tensors or"):
        build(name, params)


@pytest.mark.parametrize("function", ["param_groups", "scale_groups", "describe_param_groups"])
def test_parameters_instead_of_a_model_are_refused_with_the_right_call(function):
    for wrong in (Model().parameters(), list(Model().parameters()), None):
        with pytest.raises(TypeError, match=rf"{function} takes the model itself.*{function}\(mod"):
            getattr(sinkgd, function)(wrong)


@pytest.mark.parametrize("name", [name for name in CLASSES if not CLASSES[name].takes_every_group])
def test_groups_of_another_algorithm_are_refused_with_the_right_call(name):
    algorithm, call = CLASSES[name].default_algorithm, re.escape(CALL_FOR_A_MODEL[name])
    with pytest.raises(ValueError, match=rf"{name} would .* 'sinkgd' and 'adamw'\. Write {call}"):
        build(name, sinkgd.param_groups(Model()))
    build(name, sinkgd.param_groups(Model(), matrix_algorithm=algorithm))


@pytest.mark.parametrize("algorithm", METHODS)
def test_a_misspelled_key_of_a_group_is_refused(algorithm):
    optimizer = sinkgd.SinkGD([matrix()])
    for option in {"lr", "weight_decay", *METHODS[algorithm].options} - {
        "rounding_step",
        "norm_history",
    }:
        group = {"params": [matrix()], "algorithm": algorithm, option + "s": 1}
        with pytest.raises(ValueError, match=f"sets {option}s=1, .*did you mean '{option}'"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("algorithm", METHODS)
def test_an_option_of_another_algorithm_in_a_group_is_refused(algorithm):
    every = {option for other in METHODS.values() for option in other.options}
    for option in sorted(every - set(METHODS[algorithm].options)):
        group = {"params": [matrix()], "algorithm": algorithm, option: 1}
        with pytest.raises(ValueError, match=f"sets {option}=1, which algorithm '{algorithm}' doe"):
            sinkgd.SinkGD([group])


@every_class
def test_keys_that_torch_schedulers_and_trainers_add_are_kept(name):
    first = build(name, [{"params": [("w", matrix())], "name": "matrices", "lr_scale": 0.5}])
    torch.optim.lr_scheduler.StepLR(first, 3)
    torch.optim.lr_scheduler.CyclicLR(first, 0.1, 0.2, cycle_momentum=False)
    torch.optim.lr_scheduler.OneCycleLR(first, 0.1, 10, cycle_momentum=False)
    torch.optim.swa_utils.SWALR(first, 0.1)
    again = copy.deepcopy(first.param_groups)
    second = build(name, again)
    assert second.param_groups[0]["name"] == "matrices"
    second.add_param_group({"params": [("v", matrix())], "lr": 0.5})  # as a trainer unfreezes
    assert second.param_groups[1]["lr"] == 0.5


def test_a_group_of_another_algorithm_keeps_that_algorithms_defaults():
    adamw = {"params": [matrix()], "algorithm": "adamw"}
    optimizer = sinkgd.SPAM([{"params": [matrix()]}, adamw], eps=1e-3)
    assert [group["eps"] for group in optimizer.param_groups] == [1e-3, 1e-3]
    mngd = {"params": [matrix()], "algorithm": "mngd", "norms": NORMS}
    swan = sinkgd.SWAN([{"params": [matrix()]}, mngd])
    assert [group["num_iters"] for group in swan.param_groups] == [1, 5]


def test_deflation_is_refused_where_the_groups_know_none():
    with pytest.raises(ValueError, match="deflated_rank=4 has no effect: no group runs 'sinkgd'"):
        sinkgd.param_groups(Model(), matrix_algorithm="swan", deflated_rank=4)


# Of no argument's kind, unless `FITS` says so.
WRONG = {
    "text": "0.02",
    "list": [0.02],
    "dict": {1: 2},
    "object": object(),
    "complex": 1j,
    "complex tensor": torch.tensor(1j),
    "two numbers": torch.tensor([0.1, 0.1]),
    "tuple of one": (0.9,),
    "a function": len,
    "a module": nn.Linear(1, 1),
    "not a number": float("nan"),
    "a fraction": 0.9,
    "one": 1,
    "True": True,
    "None": None,
}
NUMBER, WHOLE, FLAG, OR_NONE = {"a fraction", "one"}, {"one"}, {"True"}, {"None"}
FITS = {
    **dict.fromkeys(("lr", "weight_decay", "tol", "theta"), NUMBER | OR_NONE),
    **dict.fromkeys(("matrix_lr_scale", "adamw_lr", "eps", "tau", "max_norm", "spike_z"), NUMBER),
    **dict.fromkeys(("tiny_row_threshold", "bucket_bytes"), NUMBER),
    **dict.fromkeys(("first", "operator_norm", "overrides"), OR_NONE),
    **dict.fromkeys(("maximize", "cautious_decay", "nesterov", "warm_start", "averaged"), FLAG),
    **dict.fromkeys(("weight_projection", "constant_norm", "cross_fit"), FLAG),
    **dict.fromkeys(("sinkhorn_iterations", "newton_schulz_steps", "num_iters"), WHOLE),
    **dict.fromkeys(("n_iter", "seed", "clip_delay", "reset_interval", "momentum_rank"), WHOLE),
    "warmup_steps": WHOLE,
    "momentum_bits": set(),
    "momentum": {"a fraction"},
    "low_rank_momentum": {"a fraction"},
    "averaged_scales": {"a fraction"},
    **dict.fromkeys(("base_width", "deflated_rank"), WHOLE | OR_NONE),
    "only": OR_NONE,
    "state_bits": OR_NONE,
}
NOT_OPTIONAL = {("param_groups", name) for name in ("weight_decay", "deflated_rank")}
NOT_OPTIONAL |= {("scale_groups", name) for name in ("lr", "weight_decay")}
OPTIONAL = {("param_groups", name) for name in ("betas", "matrix_lr_scale", "adamw_lr")}
CALLS = {
    **{name: lambda name=name, **options: build(name, [matrix()], **options) for name in CLASSES},
    "param_groups": lambda **options: sinkgd.param_groups(
        Model(), **{"weight_decay": 0.1} | options
    ),
    "scale_groups": lambda **options: sinkgd.scale_groups(Model(), **options),
    "GradientRelease": lambda **options: sinkgd.GradientRelease(
        sinkgd.SinkGD([matrix()], lr=0.1), **options
    ),
}
ARGUMENTS = [
    *CASES,
    *(
        (name, argument)
        for name in ("param_groups", "scale_groups", "GradientRelease")
        for argument in inspect.signature(getattr(sinkgd, name)).parameters
        if argument not in ("model", "optimizer")
    ),
]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_value_of_another_kind_is_refused_by_the_arguments_name(name, argument):
    fits = FITS.get(argument, set()) - ({"None"} if (name, argument) in NOT_OPTIONAL else set())
    fits = fits | ({"None"} if (name, argument) in OPTIONAL else set())
    needs = NEEDS.get(argument, {}) if name in CLASSES else {}
    for label, value in WRONG.items():
        if label in fits:
            CALLS[name](**{**needs, argument: value})
            continue
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b") as caught:
            CALLS[name](**{**needs, argument: value})
        assert "instances of" not in str(caught.value), label


@pytest.mark.parametrize("algorithm", METHODS)
def test_a_value_of_another_kind_is_refused_in_a_group_too(algorithm):
    for option in {"lr", "weight_decay", *COMMON, *METHODS[algorithm].options}:
        if option in ("rounding_step", "norm_history"):  # kept for checkpoints
            continue
        for wrong in ([], {}, object(), torch.tensor([0.1, 0.1]), "0.02"):
            group = {"params": [matrix()], "algorithm": algorithm}
            if algorithm == "mngd":
                group["norms"] = NORMS
            group[option] = wrong
            with pytest.raises((TypeError, ValueError), match=rf"\b{option}\b") as caught:
                sinkgd.SinkGD([group], lr=0.1)
            assert "instances of" not in str(caught.value)


@pytest.mark.parametrize("algorithm", METHODS)
def test_every_option_has_a_kind_or_is_a_word(algorithm):
    words = {option for option, values in VALUES.items() if isinstance(values[1], str)}
    kept = {"rounding_step", "norm_history", "layout"}
    assert set(METHODS[algorithm].options) <= {*KINDS, *words, *kept}


BAD_OVERRIDES = {
    "a word": "embed",
    "a list": ["embed"],
    "no pattern": {1: "adamw"},
    "no expression": {"(": "adamw"},
    "a number": {"head": 3},
    "a rate": {"head": {"lr": "0.1"}},
}


@pytest.mark.parametrize("groups_of", [sinkgd.param_groups, sinkgd.scale_groups])
@pytest.mark.parametrize("overrides", BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
def test_overrides_that_cannot_be_read_are_refused(groups_of, overrides):
    with pytest.raises((TypeError, ValueError), match=r"^(overrides|lr)\b"):
        groups_of(Model(), overrides=overrides)


@pytest.mark.parametrize(("name", "argument"), [case for case in ARGUMENTS if case[1] != "lr"])
def test_a_misspelled_argument_is_refused_with_the_nearest_one(name, argument):
    for misspelled in (argument + "s", argument[:-1], argument.replace("_", "")):
        if misspelled in (argument, *options_of(getattr(sinkgd, name))):
            continue
        with pytest.raises(
            TypeError, match=f"^{name} has no argument '{misspelled}'; did you mean "
        ):
            CALLS[name](**{misspelled: 1})


OTHER_NAMES = [
    ("param_groups", "matrix_lr", "did you mean 'matrix_lr_scale'?"),
    ("param_groups", "learning_rate", "did you mean 'lr'?"),
    ("param_groups", "rank", "did you mean 'deflated_rank'?"),
    ("param_groups", "tol", "write SinkGD(param_groups(model), tol=...)"),
    ("param_groups", "norms", "write MNGD(param_groups(model), norms=...)"),
    ("param_groups", "foo", "it takes model, lr, matrix_lr_scale, "),
    ("SinkGD", "overrides", "write param_groups(model, overrides=...)"),
    ("SinkGD", "matrix_scale", "did you mean param_groups(model, matrix_lr_scale=...)?"),
    ("SCALE", "betas", "write scale_groups(model, betas=...)"),
    ("SRON", "num_iters", "it takes params, lr, weight_decay, "),
    ("SPAM", "learning_rate", "did you mean 'lr'?"),
]


@pytest.mark.parametrize(("name", "argument", "remedy"), OTHER_NAMES)
def test_an_unknown_argument_is_refused_with_the_remedy(name, argument, remedy):
    with pytest.raises(TypeError) as caught:
        CALLS[name](**{argument: 1})
    assert f"{name} has no argument '{argument}'; {remedy}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, o) for name in CALLS for o in sorted(OF_GROUPS) if (name, o) not in ARGUMENTS],
)
def test_an_option_of_groups_alone_is_refused_with_its_place(name, option):
    with pytest.raises(
        TypeError, match=rf"{name} has no argument '{option}'; it is an option of g"
    ):
        CALLS[name](**{option: True})


def test_the_place_of_fused_is_a_group():
    groups = sinkgd.param_groups(Model(), overrides={"bias": {"fused": True}})
    assert True in [group.get("fused") for group in sinkgd.SinkGD(groups).param_groups]
    groups = sinkgd.param_groups(Model())
    groups[-1]["fused"] = False
    assert sinkgd.SinkGD(groups).param_groups[-1]["fused"] is False


def test_the_options_of_groups_alone_are_listed():
    taken = {option for _, option in CASES}
    kept = {"rounding_step", "norm_history"}
    every = {option for method in METHODS.values() for option in method.options} - kept
    assert every - taken == OF_GROUPS - {"eps"}  # SPAM takes eps


def test_the_arguments_of_param_groups_alone_are_listed():
    of_groups = set(options_of(sinkgd.param_groups)) - {"model"}
    assert set(OF_PARAM_GROUPS) == of_groups - set(options_of(sinkgd.SinkGD))


def test_every_option_of_the_variant_is_refused_by_sinkgd_with_the_call_that_takes_it():
    moved = set(options_of(sinkgd.SinkGDVariant)) - set(options_of(sinkgd.SinkGD))
    assert len(moved) == 15
    for option in moved:
        with pytest.raises(TypeError, match=rf"write SinkGDVariant\(params, {option}=...\)"):
            sinkgd.SinkGD([matrix()], lr=0.1, **{option: VALUES[option][1]})


def test_every_option_of_an_optimizer_is_refused_by_param_groups_with_the_call_that_takes_it():
    optimizers = (sinkgd.MNGD, sinkgd.SWAN, sinkgd.SinkGD, sinkgd.SinkGDVariant)
    options = {option for own in optimizers for option in options_of(own)} - {"params"}
    of_optimizers = options - set(options_of(sinkgd.param_groups))
    assert len(of_optimizers) > 20
    for option in of_optimizers:
        with pytest.raises(TypeError) as raised:
            sinkgd.param_groups(Model(), **{option: None})
        name, found = re.search(
            r"write (\w+)\(param_groups\(model\), (\w+)=", str(raised.value)
        ).groups()
        assert found == option
        assert option in options_of(getattr(sinkgd, name))


@pytest.mark.parametrize("function", [sinkgd.param_groups, sinkgd.scale_groups, sinkgd.SinkGD])
def test_the_signature_is_the_one_that_is_written(function):
    parameters = inspect.signature(function).parameters
    assert next(iter(parameters)) in ("model", "params")
    assert "lr" in parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_a_whole_model_at_the_default_rate_warns_of_its_price():
    model = Model()
    for params in (
        model.parameters(),
        model.named_parameters(),
        [{"params": [p for p in model.parameters() if p.ndim == dims]} for dims in (1, 2)],
    ):
        with pytest.warns(UserWarning, match=r"lr=0.001, embeddings.*To train.*pass lr") as caught:
            sinkgd.SinkGD(params)
        assert [warning.filename for warning in caught] == [__file__]


def test_a_group_without_algorithm_that_is_added_to_groups_with_one_warns():
    """As Lightning's BaseFinetuning.unfreeze_and_add_param_group adds it."""
    optimizer = sinkgd.SinkGD(sinkgd.param_groups(nn.Linear(4, 3)))
    with pytest.warns(UserWarning, match=r"groups of sinkgd.param_groups\(model, only=") as one:
        optimizer.add_param_group({"params": nn.Linear(3, 2).parameters(), "lr": 1e-3})
    assert len(one) == 1
    assert one[0].filename == __file__
    later = {"params": nn.Linear(3, 2).parameters(), "algorithm": "stateless", "lr": 1e-3}
    optimizer.add_param_group(later)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 2))], "lr": 1e-3})


def test_who_chose_a_rate_or_an_algorithm_is_not_warned():
    model = Model()
    vectors = {"params": [p for p in model.parameters() if p.ndim == 1]}
    matrices = {"params": [p for p in model.parameters() if p.ndim == 2]}
    sinkgd.SinkGD(model.parameters(), lr=1e-3)
    sinkgd.SinkGD([dict(matrices)])
    sinkgd.SinkGD([{"params": model.parameters(), "algorithm": "stateless"}])
    sinkgd.SinkGD([{**matrices, "algorithm": "sinkgd"}, dict(vectors)])
    sinkgd.SinkGD([{**matrices, "lr": 1e-3}, {**vectors, "lr": 1e-3}])
    sinkgd.SinkGD(sinkgd.param_groups(model))
    sinkgd.SPAM(model.parameters())


GRAD = torch.ones(3, 3)
FUNCTIONS = {
    "sr_sinkhorn": lambda **o: sinkgd.sr_sinkhorn(GRAD, **o),
    "sinkhorn_scales": lambda **o: sinkgd.sinkhorn_scales(GRAD, **o),
    "multi_normalize": lambda **o: sinkgd.multi_normalize(GRAD, **{"norms": NORMS, **o}),
    "residuals": lambda **o: sinkgd.residuals(GRAD, **o),
    "temper": lambda **o: sinkgd.temper(GRAD, **o),
    "DeflatedNorm": sinkgd.DeflatedNorm,
    "SpectralNorm": sinkgd.SpectralNorm,
}
FITS_FUNCTIONS = {
    **dict.fromkeys(("num_iters", "num_steps", "rank"), WHOLE),
    **dict.fromkeys(("tau", "eps"), NUMBER),
    "tol": NUMBER | OR_NONE,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_norms_refuse_a_value_of_another_kind_too(name):
    for argument in inspect.signature(getattr(sinkgd, name)).parameters:
        if argument in ("grad", "x"):
            continue
        for label, value in WRONG.items():
            if label in FITS_FUNCTIONS.get(argument, set()):
                FUNCTIONS[name](**{argument: value})
                continue
            with pytest.raises((TypeError, ValueError), match=rf"^{argument} must ") as caught:
                FUNCTIONS[name](**{argument: value})
            assert "instances of" not in str(caught.value)
