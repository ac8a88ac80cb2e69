"""Which parameter gets which method: the default recipe as parameter groups."""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

from sinkgd.matrix_views import dims_of
from sinkgd.number_check import check_betas, check_flag, check_number
from sinkgd.optim.arguments import COMMON, OF_VARIANT, find_method, options_of, suggest_names
from sinkgd.optim.group_names import name_groups
from sinkgd.optim.overrides import Overrides, check_fits, check_overrides, match
from sinkgd.optim.parameters import check_initialized
from sinkgd.optim.roles import EMBEDDING, HEAD, Role, roles
from sinkgd.optim.transforms.deflate import check_deflated_rank

# The default recipe, measured in the setting of study table1 on a LLaMA of 1.3M parameters:
# benchmarks/deflation has the runs. 0.002 was the best rate of matrices among 0.001 to 0.004.
LR = 0.08
MATRIX_LR_SCALE = 0.025
BETAS = (0.9, 0.95)
DEFLATED_RANK = 15

# A lower ``lr`` was probably meant for AdamW: the paper uses 0.02, and study table1 0.08.
LOW_LR = 1e-3

# With ``adamw_lr``: the root-mean-square of AdamW's update of a hidden matrix, relative to its
# rate. benchmarks/finetune measured 0.27 to 0.47. For gradients that are only noise it would be
# √((1 - β₁) / (1 + β₁)), 0.23.
ADAMW_UPDATE_SIZE = 0.3
ADAMW_BETAS = (0.9, 0.999)

# Algorithms that take AdamW's rate and betas, by the bits of their state.
_ADAMWS = {None: "adamw", 8: "adamw-8bit"}

# Arguments of the optimizers, and the call that takes each.
_OF_OPTIMIZERS = {
    option: f"{optimizer}(param_groups(model), {option}=...)"
    for optimizer, options in (
        ("MNGD", find_method("mngd").options),
        ("SWAN", find_method("swan").options),
        ("SinkGD", (*COMMON, *find_method("sinkgd").options)),
        ("SinkGDVariant", OF_VARIANT),
    )
    for option in options
    if option not in ("deflated_rank", "layout", "split", "rounding_step")
}


@suggest_names(_OF_OPTIMIZERS)
def param_groups(
    model: nn.Module,
    lr: float | Tensor | None = None,
    matrix_lr_scale: float | None = None,
    *,
    adamw_lr: float | Tensor | None = None,
    matrix_algorithm: str = "sinkgd",
    deflated_rank: int = DEFLATED_RANK,
    weight_decay: float = 0.0,
    cautious_decay: bool = False,
    betas: tuple[float, float] | None = None,
    overrides: Overrides | None = None,
    base_width: int | None = None,
    state_bits: int | None = None,
    only: Iterable[Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into groups for `SinkGD`, `SWAN` or `MNGD`.

    Hidden matrices (linear and convolution weights inside the model's blocks, or anywhere if it has
    no blocks) go to ``matrix_algorithm`` at ``matrix_lr_scale * lr``; so do experts, as stacks of
    matrices. Everything else goes to AdamW at ``lr``: embeddings, the output head, routers of
    experts, norms, biases, depthwise convolutions, low-rank adapters and modules of unknown types.
    Module types and places decide, not names; tied weights count once. Print
    `describe_param_groups` to see the result.

    Args:
        model: The model, before or after FSDP2. Frozen parameters are left out: one that is
            unfrozen later does not train unless ``optimizer.add_param_group`` adds it; see
            ``only``.
        lr: Learning rate of AdamW, a float or a tensor of one element. The default, 0.08, is that
            of study table1, in which a model of 1.3M parameters and width 128 was trained from
            scratch. The paper uses 0.02 for models of 60M to 1.3B parameters.
        matrix_lr_scale: The paper's α: the root-mean-square change of a hidden weight in one step
            is ``matrix_lr_scale * lr``. The default, 0.025, gives 0.002, the best of four
            rates of the default recipe in the setting of study table1 (benchmarks/deflation). The
            paper uses 0.05 with its ``lr`` of 0.02, which gives 0.001. Wider models need smaller
            rates: with an earlier version of deflation, the largest good rate fell from 0.004 at
            width 128 to 0.002 at width 256 (study width, docs/experiments.md).
        adamw_lr: Instead of ``lr`` and ``matrix_lr_scale``: the rate at which AdamW would train the
            whole model, for fine-tuning and whenever such a rate is known. AdamW's groups get this
            rate. Hidden matrices get 0.3 times this rate, so that an update is as large as AdamW's
            (benchmarks/finetune), and the weight decay divided by 0.3, so that a step decays all
            weights equally; embeddings and the output head decay, too. ``betas`` is then
            (0.9, 0.999) by default, as in torch.
        matrix_algorithm: ``"sinkgd"``, ``"swan"``, or ``"mngd"`` (with the norms passed to `MNGD`).
        deflated_rank: The option of every ``"sinkgd"`` group, which `SinkGD` describes;
            benchmarks/deflation compares ranks. 0 is the paper's method, without deflation.
        weight_decay: Decoupled weight decay of all parameters except embeddings, the output head,
            vectors and scalars; with ``adamw_lr``, of all except vectors and scalars. Decay is
            multiplied by the learning rate. Without ``adamw_lr`` this rate is 40 times larger for
            embeddings than for hidden matrices, and decay would shrink the rows of words that do
            not occur. An override may set the decay of any parameter. The paper uses none.
        cautious_decay: The option of every group, which `SinkGD` describes: decay only entries that
            the update moves toward zero. If it is False, groups take the optimizer's argument.
        betas: AdamW's decay rates of the two moments. The default, (0.9, 0.95), is that of study
            table1.
        overrides: Maps regular expressions to an algorithm (``"adamw"``, ``"sinkgd"``,
            ``"normalize"`` …) or to group options such as
            ``{"algorithm": "sinkgd", "split": 3, "lr": 1e-3}``. A parameter's name is searched for
            each expression, with and without prefixes of wrappers such as torch.compile. The first
            match decides. ``"sinkgd-table"`` is meant for embeddings and output heads.
        base_width: To transfer a rate tuned on a smaller model, pass that model's width. The rate
            of a hidden matrix with d_in in-features is multiplied by ``base_width / d_in``: muP's
            rule for updates of a given root-mean-square, which keeps the change of a layer's output
            independent of the width. None changes no rate, as in the paper. For plain SinkGD,
            from width 64 to 256, the largest good rate fell by a factor of 8 or more without the
            rule, and by 2 or more with it (docs/experiments.md, `width`).
        state_bits: 8 keeps the moments of AdamW's groups in 8 bits, by bitsandbytes (in a clone of
            the repository, ``pip install '.[8bit]'``): their algorithm is ``"adamw-8bit"``. The
            moments of tensors below 4,096 entries stay in float32. None gives moments the type of
            the weights.
        only: Make groups for these parameters alone, such as those that were unfrozen after the
            optimizer was created. Their places in the whole model decide their groups.

    Returns:
        Groups of (name, parameter) pairs. A group has ``algorithm``, ``lr``, ``weight_decay``, some
        options of its algorithm, and a ``name`` of its own for logs, such as ``"matrices"`` or
        ``"embeddings-head-vectors"``.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, ``only`` is not an iterable of tensors, or
            an option has the wrong type.
        ValueError: If the model has a lazy module that has not run, or no trainable parameter; if
            an option is out of range, ``adamw_lr`` is given together with ``lr`` or
            ``matrix_lr_scale``, an override matches no parameter, does not fit one or is no regular
            expression, or an algorithm is unknown; if ``only`` has a tensor that is not a trainable
            parameter of the model; and if an option has no effect:
            ``deflated_rank`` if no group runs ``"sinkgd"``, ``matrix_lr_scale`` and ``base_width``
            if every group runs AdamW, ``state_bits`` if no group runs ``"adamw-8bit"``, and
            ``cautious_decay`` if no group decays.

    Examples:
        >>> import torch, sinkgd
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> for group in sinkgd.param_groups(model):
        ...     print(group["name"], group["algorithm"], group["lr"], len(group["params"]))
        matrices-split-3 sinkgd 0.002 2
        matrices sinkgd 0.002 6
        vectors adamw 0.08 16
        >>> optimizer = sinkgd.SinkGD(sinkgd.param_groups(model))

    References:
        Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
        section 5. https://arxiv.org/abs/2502.06742
        Yang et al., Tensor Programs V, table 8 (the width rule). https://arxiv.org/abs/2203.03466
        That the best learning rate of SinkGD is proportional to 1 / d_in is a finding of axolotl.
    """
    check_model(model, "param_groups")
    rates = _rates(lr, matrix_lr_scale, adamw_lr, betas)
    check_number("weight_decay", weight_decay)
    check_flag("cautious_decay", cautious_decay)
    find_method(matrix_algorithm, "matrix_algorithm")
    check_deflated_rank(deflated_rank)
    check_overrides(overrides)
    if base_width is not None:
        check_number("base_width", base_width, least=1)
    _check_state_bits(state_bits)
    found = roles(model)
    if not found:
        raise ValueError("the model has no parameter with requires_grad=True; nothing to optimize")
    given = match(overrides or {}, model, {name: param for name, param, _ in found})
    common = {"cautious_decay": True} if cautious_decay else {}
    groups: dict[str, dict[str, Any]] = {}
    for name, param, role in found:
        usual = matrix_algorithm if role.is_matrix else _ADAMWS[state_bits]
        algorithm = given[name].get("algorithm", usual)
        check_fits(overrides or {}, name, param, {"algorithm": algorithm, **given[name]})
        options = {"algorithm": algorithm, "lr": rates.lr, "betas": rates.betas}
        if algorithm not in _ADAMWS.values():
            options = {"algorithm": algorithm, "lr": rates.matrix_lr_scale * rates.lr}
            options |= _layout(role, options_of(algorithm))
            if base_width is not None and role.is_matrix:
                options["lr"] *= base_width / _in_features(param, role)
        if algorithm == "sinkgd":
            options["deflated_rank"] = deflated_rank
        decay = _decay(param, role, algorithm, weight_decay, rates)
        options |= {"weight_decay": decay, **common, **given[name]}
        group = groups.setdefault(_key(options), {"params": [], **_with_own_rate(options)})
        group["params"].append((name, param))
    running = _algorithms(groups.values())
    _check_effects(
        running,
        {
            "deflated_rank": None if deflated_rank in (0, DEFLATED_RANK) else deflated_rank,
            "matrix_lr_scale": matrix_lr_scale,
            "base_width": base_width,
            "state_bits": state_bits,
        },
    )
    _check_decays(cautious_decay, groups.values())
    if matrix_lr_scale is None and isinstance(lr, float):
        _warn_of_low_rate(lr, running)
    selected = [*groups.values()] if only is None else _only(groups.values(), only)
    ordered = sorted(selected, key=lambda group: group["algorithm"] in _ADAMWS.values())
    name_groups(ordered, {param: role for _, param, role in found})
    return ordered


def _only(groups: Iterable[dict[str, Any]], only: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return the groups with only these parameters, without empty groups.

    Raises:
        TypeError: If ``only`` is not an iterable of tensors.
        ValueError: If a parameter is in no group; the message gives its shape.
    """
    members = [only] if isinstance(only, Tensor) or not isinstance(only, Iterable) else [*only]
    if members == [only] or not all(isinstance(member, Tensor) for member in members):
        raise TypeError(f"only must be parameters, such as module.parameters(), got {only!r:.80}")
    params = {*members}
    found = [
        {**group, "params": [pair for pair in group["params"] if pair[1] in params]}
        for group in groups
    ]
    left = params - {param for group in found for _, param in group["params"]}
    if left:
        raise ValueError(
            f"only contains a tensor of shape {tuple(next(iter(left)).shape)} that is not a "
            "trainable parameter of the model; pass parameters of the model, and unfreeze them "
            "first"
        )
    return [group for group in found if group["params"]]


def _with_own_rate(options: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a rate that is a tensor: the caller's own would drive only some of the groups."""
    lr = options["lr"]
    return {**options, "lr": lr.clone() if isinstance(lr, Tensor) else lr}


def _key(options: Mapping[str, Any]) -> str:
    """Return a string that is equal for equal options; a tensor's ``repr`` has only four digits."""
    plain = {
        name: float(value) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    return repr(sorted(plain.items()))


def _decay(
    param: Tensor, role: Role, algorithm: str, weight_decay: float, rates: "_Rates"
) -> float:
    """Return the weight decay of a parameter."""
    if param.ndim < 2 or (role.reason in (EMBEDDING, HEAD) and not rates.is_adamws):
        return 0.0
    is_matrices = rates.is_adamws and algorithm not in _ADAMWS.values()
    return weight_decay / rates.matrix_lr_scale if is_matrices else weight_decay


def _check_decays(cautious_decay: bool, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse cautious decay if no group decays."""
    if cautious_decay and not any(group["weight_decay"] for group in groups):
        raise ValueError(
            "cautious_decay=True has no effect: no group has a weight_decay. Pass weight_decay, or "
            "leave out cautious_decay"
        )


def _check_state_bits(state_bits: object) -> None:
    if state_bits is not None and (type(state_bits) is not int or state_bits not in _ADAMWS):
        raise ValueError(
            f"state_bits must be 8, or None for moments in the type of the weights, got "
            f"{state_bits!r}"
        )


def _check_effects(running: Sequence[str], options: Mapping[str, object]) -> None:
    """Refuse an option if no group runs an algorithm to which the option applies.

    Args:
        running: The algorithms of the groups.
        options: Options of `param_groups`; None for those that were not given.
    """
    matrix_rate = "no hidden matrix has a rate of its own", _has_matrix_rate(running)
    has = {
        "deflated_rank": ("no group runs 'sinkgd'", "sinkgd" in running),
        "matrix_lr_scale": matrix_rate,
        "base_width": matrix_rate,
        "state_bits": ("no group runs 'adamw-8bit'", _ADAMWS[8] in running),
    }
    for name, value in options.items():
        reason, has_effect = has[name]
        if value is not None and not has_effect:
            raise ValueError(
                f"{name}={value!r} has no effect: {reason}, the groups run "
                f"{', '.join(map(repr, running))}. Leave it out"
            )


def _has_matrix_rate(running: Sequence[str]) -> bool:
    """Whether a group runs an algorithm other than AdamW, at the rate of matrices."""
    return not {*running} <= {*_ADAMWS.values()}


def _warn_of_low_rate(lr: float, running: Sequence[str]) -> None:
    """Warn if ``lr`` looks like a rate of AdamW: matrices get a fortieth of it."""
    if 0 < lr < LOW_LR and _has_matrix_rate(running):
        warnings.warn(
            f"lr={lr:g} gives hidden matrices a rate of {MATRIX_LR_SCALE * lr:g}. If {lr:g} is the "
            f"rate that AdamW would have, pass adamw_lr={lr:g} instead. Otherwise pass "
            "matrix_lr_scale, too, to silence this warning",
            stacklevel=4,
        )


class _Rates(NamedTuple):
    """Rates of the groups."""

    lr: float | Tensor
    matrix_lr_scale: float
    betas: tuple[float, float]
    # Whether ``lr`` was given as ``adamw_lr``. Embeddings and the head then decay as matrices do.
    is_adamws: bool = False


def _rates(
    lr: float | Tensor | None,
    matrix_lr_scale: float | None,
    adamw_lr: float | Tensor | None,
    betas: tuple[float, float] | None,
) -> _Rates:
    """Fill in the defaults of the rates.

    Raises:
        ValueError: If ``adamw_lr`` is given together with a rate that it replaces, or a number is
            out of range.
        TypeError: If a rate or ``betas`` has the wrong type.
    """
    if adamw_lr is None:
        found = _Rates(
            LR if lr is None else lr,
            MATRIX_LR_SCALE if matrix_lr_scale is None else matrix_lr_scale,
            BETAS if betas is None else betas,
        )
        check_number("lr", found.lr)
    else:
        for name, value in (("lr", lr), ("matrix_lr_scale", matrix_lr_scale)):
            if value is not None:
                raise ValueError(
                    f"adamw_lr={adamw_lr!r} sets all rates, and {name}={value!r} would set them "
                    "again; pass only one"
                )
        found = _Rates(
            adamw_lr,
            ADAMW_UPDATE_SIZE,
            ADAMW_BETAS if betas is None else betas,
            is_adamws=True,
        )
        check_number("adamw_lr", adamw_lr)
    check_number("matrix_lr_scale", found.matrix_lr_scale)
    check_betas("betas", found.betas)
    return found


def check_model(model: object, function: str) -> None:
    """Refuse anything but a model, and a model with lazy modules that have not run.

    Raises:
        TypeError: If ``model`` is not a model; the message gives the right call of ``function``.
        ValueError: If a parameter has no shape yet; the message gives its name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function} takes the model itself, an nn.Module, got {type(model).__name__}; write "
            f"{function}(model). Its parameters do not show which of them are hidden matrices"
        )
    for name, param in model.named_parameters():
        check_initialized(name, param)


def _layout(role: Role, taken: Set[str]) -> dict[str, Any]:
    """Return how the parameter is viewed as matrices, if the algorithm takes these options."""
    seen = {"layout": role.layout, "split": role.split}
    return {option: value for option, value in seen.items() if option in taken}


def _algorithms(groups: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(group["algorithm"]) for group in groups))


def _in_features(param: Tensor, role: Role) -> int:
    _, cols = dims_of(param.ndim, role.layout)
    return prod(param.shape[dim] for dim in cols)
