"""A table of parameters: the group of each, and why it is there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sinkgd.optim.arguments import list_names
from sinkgd.optim.param_groups import check_model, param_groups
from sinkgd.optim.roles import roles, without_wrappers

# The remedy in errors about arguments that are not groups.
_REMEDY = "pass the list of param_groups, or optimizer.param_groups"


def describe_param_groups(
    model: nn.Module, groups: Iterable[Mapping[str, Any]] | None = None, **options: Any
) -> str:
    """Return a table of parameters: the group of each, its algorithm, its rate, and the reason.

    A group is shown by its ``name``, or by its number if it has none. Parameters whose names differ
    only by a number share a line with a count, ``×``. The last lines name or count the parameters
    that are in no group, and say which groups the table shows.

    Args:
        model: The model whose parameters the groups contain.
        groups: Groups from `param_groups`, or ``optimizer.param_groups``; by default
            ``param_groups(model, **options)``.
        **options: Options of `param_groups`, instead of ``groups``.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, ``groups`` is not a list of groups, or both
            ``groups`` and ``options`` are given.
        ValueError: If `param_groups` refuses the model or the options.

    Examples:
        >>> import torch, sinkgd
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> print(sinkgd.describe_param_groups(model).splitlines()[0])
        parameter                           shape  group             algorithm  lr     why
        >>> print(sinkgd.describe_param_groups(model, lr=0.02).splitlines()[-1])
        These are the groups of param_groups(model, lr=0.02).
    """
    check_model(model, "describe_param_groups")
    if groups is None:
        shown = "".join(f", {name}={value!r}" for name, value in options.items())
        source = f"These are the groups of param_groups(model{shown})"
        source += "." if options else ", with its default rates; pass your groups to see yours."
        groups = param_groups(model, **options)
    else:
        groups = _checked_groups(groups, options)
        source = "These are the rates of the groups that you passed."
    names = _names(model)
    reasons = {param: role.reason for _, param, role in roles(model)}
    alike: dict[tuple[str, ...], list[str]] = {}
    for index, group in enumerate(groups):
        for name, param in _named_params(group, names):
            row = (
                _starred(name),
                "×".join(map(str, param.shape)) or "scalar",
                str(group.get("name", index)),
                _words(group),
                f"{float(group['lr']):g}",
                _why(name, param, names, reasons),
            )
            alike.setdefault(row, []).append(name)
    lines: list[Sequence[str]] = [("parameter", "shape", "group", "algorithm", "lr", "why")]
    for (starred, *cells), own in alike.items():
        lines.append((f"{starred} ×{len(own)}" if len(own) > 1 else own[0], *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    in_groups = {param for group in groups for _, param in _named_params(group, names)}
    return "\n".join([*table, *_left_out(names, in_groups), source])


def _checked_groups(groups: object, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups as a list, and refuse anything else."""
    if options:
        raise TypeError(
            f"describe_param_groups takes groups or the options of param_groups, got groups and "
            f"{', '.join(options)}; leave one of them out"
        )
    found: list[Any] = []
    if isinstance(groups, Iterable) and not isinstance(groups, Optimizer | Mapping | str | Tensor):
        found = list(groups)
    if not found:
        raise TypeError(f"groups must be a list of groups, got {type(groups).__name__}; {_REMEDY}")
    for index, group in enumerate(found):
        if not isinstance(group, Mapping):
            raise TypeError(f"groups must be dicts, got {type(group).__name__}; {_REMEDY}")
        for key in ("params", "algorithm", "lr"):
            if key not in group:
                raise TypeError(f"group {index} has no {key!r}; {_REMEDY}")
    return found


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    """Return all names that each parameter of a model has."""
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return names


def _named_params(
    group: Mapping[str, Any], names: Mapping[Tensor, Sequence[str]]
) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with their names in the group, or else in the model."""
    if own := group.get("param_names"):
        return list(zip(own, group["params"], strict=True))
    return [
        (names.get(entry, ["unnamed"])[0], entry) if isinstance(entry, Tensor) else tuple(entry)
        for entry in group["params"]
    ]


def _starred(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)


def _words(group: Mapping[str, Any]) -> str:
    """Name the algorithm of a group, and its deflation."""
    rank = group.get("deflated_rank")
    return f"{group['algorithm']}, deflated {rank}" if rank else str(group["algorithm"])


def _why(
    name: str,
    param: Tensor,
    names: Mapping[Tensor, Sequence[str]],
    reasons: Mapping[Tensor, str],
) -> str:
    """Return the reason for a parameter's algorithm, and its other names if it is tied."""
    if param not in names:
        return "not a parameter of this model"
    reason = reasons.get(param, "frozen")
    others: dict[str, str] = {}
    for other in names[param]:
        others.setdefault(_starred(without_wrappers(other)), _starred(other))
    others.pop(_starred(without_wrappers(name)), None)
    return f"{reason}; tied to {list_names([*others.values()])}" if others else reason


def _left_out(names: Mapping[Tensor, Sequence[str]], in_groups: set[Tensor]) -> list[str]:
    """Return lines about the parameters of a model that are in no group, frozen or not."""
    left = [(own[0], param) for param, own in names.items() if param not in in_groups]
    frozen = [name for name, param in left if not param.requires_grad]
    others = [name for name, param in left if param.requires_grad]
    lines = []
    if others:
        lines.append(f"In no group, and so not trained: {list_names(others)}.")
    if frozen:
        are = "parameter is" if len(frozen) == 1 else "parameters are"
        lines.append(
            f"{len(frozen)} frozen {are} in no group: after unfreezing, such a parameter trains "
            "only if optimizer.add_param_group adds it."
        )
    return lines
