"""Whether a saved optimizer gave each parameter to the same algorithm as this one."""

import re
from collections.abc import Sequence
from typing import Any

# Options that say what is done with a parameter; all others may differ and are loaded.
_ROUTING = ("algorithm", "layout", "split", "norms")

# What wrappers put before the name of a module: torch.compile, DistributedDataParallel and
# DataParallel, FullyShardedDataParallel, and torch's checkpoint_wrapper.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# `sinkgd.optim.exchanged.unnamed`
_UNNAMED = re.compile(r"parameter \d+ of group \d+")


def check_same_routing(
    own_groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]
) -> None:
    """Raise a ValueError that names the first parameter or option that differs.

    Args:
        own_groups: Options of the optimizer's own groups, as they are saved.
        saved_groups: ``param_groups`` of the ``state_dict`` to load.
    """
    if len(own_groups) != len(saved_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} parameter groups, this optimizer has "
            f"{len(own_groups)}; build it with the same param_groups() arguments"
        )
    for index, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True)):
        for option in _ROUTING:
            if _plain(own.get(option)) != _plain(saved.get(option)):
                raise ValueError(
                    f"group {index} has {option} {saved.get(option)!r} in the checkpoint and "
                    f"{own.get(option)!r} here; build the optimizer as it was when it was saved"
                )
        _check_same_names(index, own.get("param_names"), saved.get("param_names"))


def without_wrappers(name: str) -> str:
    """Return the name that a parameter has in the model without wrappers.

    Examples:
        >>> without_wrappers("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
        'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _check_same_names(index: int, own: Sequence[str] | None, saved: Sequence[str] | None) -> None:
    if own is None or saved is None:
        return
    here, there = [*map(without_wrappers, own)], [*map(without_wrappers, saved)]
    if len(here) == len(there):  # a parameter without a name may have one there
        pairs = [
            pair for pair in zip(here, there, strict=True) if not any(map(_UNNAMED.fullmatch, pair))
        ]
        here, there = [name for name, _ in pairs], [name for _, name in pairs]
    if here == there:
        return
    moved = sorted({*here} ^ {*there})
    if not moved:
        raise ValueError(f"group {index} of the checkpoint lists its parameters in another order")
    name = moved[0]
    where = "this optimizer" if name in here else "the checkpoint"
    raise ValueError(
        f"{name!r} is in group {index} of {where} alone; build the optimizer with the same "
        "param_groups() arguments as when it was saved"
    )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
