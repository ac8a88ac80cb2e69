"""A table of which parameter gets which algorithm, at which rate, and why."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sinkgd.optim.partition import check_model, param_groups
from sinkgd.optim.roles import roles
from sinkgd.optim.wording import some_of

_REMEDY = "pass the list of param_groups, or optimizer.param_groups"


def describe_param_groups(
    model: nn.Module, groups: Iterable[Mapping[str, Any]] | None = None, **options: Any
) -> str:
    """Return a table of who goes where and why.

    Parameters that differ by a number in their name alone share a line, counted by ``×``. The last
    lines tell which parameters are in no group, and whose rates the table shows.

    Args:
        model: The model that the groups were made from.
        groups: From `param_groups`, or ``optimizer.param_groups``; by default
            ``param_groups(model, **options)``.
        **options: Those of `param_groups`, in the place of ``groups``.

    Raises:
        TypeError: If ``model`` is no ``nn.Module``, ``groups`` are no groups, or there are both
            ``groups`` and ``options``.

    Examples:
        >>> import torch, sinkgd
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> print(sinkgd.describe_param_groups(model).splitlines()[0])
        parameter                           shape  algorithm  lr     why
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
        groups = _checked(groups, options)
        source = "These are the groups that were passed."
    names = _names(model)
    reasons = {param: role.reason for _, param, role in roles(model)}
    counts: dict[tuple[str, ...], int] = {}
    for group in groups:
        for name, param in _named(group, names):
            row = (
                _starred(name),
                "×".join(map(str, param.shape)) or "scalar",
                _words(group),
                f"{float(group['lr']):g}",
                _why(name, param, names, reasons),
            )
            counts[row] = counts.get(row, 0) + 1
    lines: list[Sequence[str]] = [("parameter", "shape", "algorithm", "lr", "why")]
    for (name, *cells), count in counts.items():
        lines.append((f"{name} ×{count}" if count > 1 else name, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    in_groups = {param for group in groups for _, param in _named(group, names)}
    return "\n".join([*table, *_left_out(names, in_groups), source])


def _checked(groups: object, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups as a list; refuse what is none."""
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
            raise TypeError(f"groups must hold dicts, got {type(group).__name__}; {_REMEDY}")
        for key in ("params", "algorithm", "lr"):
            if key not in group:
                raise TypeError(f"group {index} has no {key!r}; {_REMEDY}")
    return found


def _names(model: nn.Module) -> dict[Tensor, list[str]]:
    """Return what each parameter of a model is called, in all its places."""
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    return names


def _named(
    group: Mapping[str, Any], names: Mapping[Tensor, Sequence[str]]
) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with its names for them, or else the model's."""
    if own := group.get("param_names"):
        return list(zip(own, group["params"], strict=True))
    return [
        (names.get(entry, ["unnamed"])[0], entry) if isinstance(entry, Tensor) else tuple(entry)
        for entry in group["params"]
    ]


def _starred(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)


def _words(group: Mapping[str, Any]) -> str:
    """Name a group's algorithm, and its deflation."""
    rank = group.get("deflated_rank")
    return f"{group['algorithm']}, deflated {rank}" if rank else str(group["algorithm"])


def _why(
    name: str,
    param: Tensor,
    names: Mapping[Tensor, Sequence[str]],
    reasons: Mapping[Tensor, str],
) -> str:
    """Return the reason for a parameter's algorithm, and the other names of a tied one."""
    if param not in names:
        return "not a parameter of this model"
    reason = reasons.get(param, "frozen")
    others = dict.fromkeys(_starred(other) for other in names[param][1:] if other != name)
    others.pop(_starred(name), None)
    return f"{reason}; tied to {some_of([*others])}" if others else reason


def _left_out(names: Mapping[Tensor, Sequence[str]], in_groups: set[Tensor]) -> list[str]:
    """Tell which parameters of a model are in no group, in a line for frozen ones and others."""
    left = [(own[0], param) for param, own in names.items() if param not in in_groups]
    frozen = [name for name, param in left if not param.requires_grad]
    others = [name for name, param in left if param.requires_grad]
    lines = []
    if others:
        lines.append(f"In no group, and so not trained: {some_of(others)}.")
    if frozen:
        are = "parameter is" if len(frozen) == 1 else "parameters are"
        lines.append(
            f"{len(frozen)} frozen {are} in no group: to train after unfreezing, add them with "
            "optimizer.add_param_group."
        )
    return lines
