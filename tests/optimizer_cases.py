"""The table of optimizers that every generic test loops over. A new method is a new row."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sinkgd
from sinkgd.optim.grouped import GroupedOptimizer


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[..., GroupedOptimizer]
    options: list[dict[str, Any]] = field(default_factory=list)  # each is tried by itself
    takes_vectors: bool = False
    has_state: bool = False
    keeps_size: bool = False  # of the gradient, where others have root-mean-square 1
    takes_float64: bool = True

    def __str__(self) -> str:
        return self.name


def _mngd(*norms):
    return lambda params, lr=1e-3, **options: sinkgd.MNGD(params, lr, norms=norms, **options)


def _in_groups(build, algorithm):
    """Give every parameter to one algorithm, whatever the optimizer's own is."""

    def built(params, **options):
        params = list(params)
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        return build([{"algorithm": algorithm, **group} for group in groups], **options)

    return built


def optimizer_of(params, algorithm, **options):
    """Build an optimizer that gives every parameter, or every group, to one algorithm."""
    if algorithm == "mngd":
        build = _with(sinkgd.MNGD, norms=[sinkgd.SignNorm(), sinkgd.RowNorm()])
    else:
        build = sinkgd.SinkGDVariant
    return _in_groups(build, algorithm)(params, **options)


def _with(build, **fixed):
    return lambda params, **options: build(params, **{**fixed, **options})


def _stateless(params, lr=1e-3, **options):
    """Build SinkGD without groups; it warns where nobody chose its rate."""
    return sinkgd.SinkGDVariant(params, lr, **options)


_matrices = _in_groups(sinkgd.SinkGDVariant, "sinkgd")
CAUTIOUS = {"weight_decay": 0.1, "cautious_decay": True}
FEW = [{}, {"weight_decay": 0.1, "maximize": True}, CAUTIOUS, {"nonfinite": "skip"}]
AVERAGES = [*FEW, {"nesterov": True}]
COMMON = [
    {},
    {"lr": 1e-2},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"weight_decay": 0.1, "maximize": True},
    CAUTIOUS,
    {**CAUTIOUS, "maximize": True},
    {"nonfinite": "skip"},
]

# Resets, warm-ups and cut spikes within the few steps of a test.
YOUNG = {"reset_interval": 6, "warmup_steps": 2, "theta": 2.0, "clip_delay": 1}

OPTIMIZERS = [
    Case("SinkGD", _stateless, [*COMMON, {"sinkhorn_iterations": 1}], takes_vectors=True),
    Case("SinkGD-eager", _with(_stateless, backend="eager"), COMMON, True),
    Case("SinkGD-matrices", _in_groups(sinkgd.SinkGD, "sinkgd"), COMMON),
    Case("SinkGD-normalize", _in_groups(sinkgd.SinkGD, "normalize"), COMMON, takes_vectors=True),
    Case(
        "SinkGD-adamw",
        _in_groups(sinkgd.SinkGD, "adamw"),
        COMMON,
        takes_vectors=True,
        has_state=True,
    ),
    Case(
        "SinkGD-sage",
        _in_groups(sinkgd.SinkGD, "sage"),
        COMMON,
        takes_vectors=True,
        has_state=True,
    ),
    Case("SinkGD-momentum", _with(_stateless, momentum=0.9), AVERAGES, True, has_state=True),
    Case(
        "SinkGD-momentum-after",
        _with(_stateless, momentum=0.5, momentum_place="after"),
        AVERAGES,
        takes_vectors=True,
        has_state=True,
    ),
    Case(
        "SinkGD-momentum-8bit",
        _with(_stateless, momentum=0.5, momentum_place="after", momentum_bits=8),
        FEW,
        takes_vectors=True,
        has_state=True,
    ),
    Case("SinkGD-last-row", _with(_matrices, last="row"), [*FEW, {"sinkhorn_iterations": 1}]),
    Case("SinkGD-half-step-more", _with(_matrices, first="column"), [*FEW, {"last": "row"}]),
    Case("SinkGD-masked", _with(_matrices, tiny_rows="mask", tiny_row_threshold=0.5), FEW),
    Case(
        "SinkGD-pinned",
        _with(_matrices, operator_norm="muon"),
        [*FEW, {"operator_norm": "unit"}],
        has_state=True,
    ),
    Case(
        "SinkGD-low-rank-momentum",
        _with(_matrices, momentum_rank=2),
        [*FEW, {"low_rank_momentum": 0.5}],
        has_state=True,
    ),
    Case(
        "SinkGD-averaged-scales",
        _with(_matrices, averaged_scales=0.5),
        FEW,
        has_state=True,
    ),
    Case(
        "SinkGD-deflated-kept",
        _with(_matrices, deflated_rank=2, deflated_start="kept"),
        FEW,
        has_state=True,
    ),
    Case("SinkGD-table", _in_groups(sinkgd.SinkGD, "sinkgd-table"), FEW, has_state=True),
    Case("SWAN", sinkgd.SWAN, [*COMMON, {"newton_schulz_steps": 10}, {"num_iters": 2}]),
    Case("SWAN-momentum", _with(sinkgd.SWAN, momentum=0.9), AVERAGES, has_state=True),
    Case(
        "MNGD-rows-columns",
        _mngd(sinkgd.RowNorm(), sinkgd.ColumnNorm()),
        [*COMMON, {"num_iters": 1}],
    ),
    Case("MNGD-sign", _mngd(sinkgd.SignNorm()), COMMON),
    Case("MNGD-frobenius", _mngd(sinkgd.FrobeniusNorm()), COMMON),
    Case("SRON", sinkgd.SRON, FEW),
    Case("SCALE", sinkgd.SCALE, FEW),
    Case(
        "SCALE-head",
        _with(sinkgd.SCALE, momentum=0.9),
        [*AVERAGES, {"momentum_place": "after"}],
        has_state=True,
    ),
    Case(
        "TemperedSinkGD",
        lambda p, **o: sinkgd.TemperedSinkGD(p, **{"lr": 1e-3, "weight_decay": 0.0, **o}),
        [*COMMON, {"tau": 0.5}, {"n_iter": 2}, {"n_iter": 0}, {"eps": 1e-3}],
        takes_vectors=True,
        keeps_size=True,
    ),
    Case(
        "SPAM",
        sinkgd.SPAM,
        [*COMMON, {"betas": (0.8, 0.9)}, YOUNG, {"theta": None}],
        takes_vectors=True,
        has_state=True,
    ),
    Case(
        "AdamWSPAM",
        sinkgd.AdamWSPAM,
        [*COMMON, {"max_norm": 0.1}, {**YOUNG, "theta": 50.0}, {"norm_window": 10, "spike_z": 0.5}],
        takes_vectors=True,
        has_state=True,
    ),
]

# Algorithms of packages that are not installed; their own tests skip, and say how to install them.
ABSENT = set() if importlib.util.find_spec("bitsandbytes") else {"adamw-8bit"}
if not ABSENT:
    OPTIMIZERS.append(
        Case(
            "SinkGD-adamw-8bit",
            _in_groups(sinkgd.SinkGD, "adamw-8bit"),
            COMMON,
            takes_vectors=True,
            has_state=True,
            takes_float64=False,
        )
    )
