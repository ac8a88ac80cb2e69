"""Whether a saved optimizer gave each parameter to the same algorithm as this one."""

from collections.abc import Sequence
from typing import Any

# Options that say what is done with a parameter; all others may differ and are loaded.
_ROUTING = ("algorithm", "layout", "split", "norms")


def check_same_routing(
    own_groups: Sequence[dict[str, Any]], saved_groups: Sequence[dict[str, Any]]
) -> None:
    """Raise a ValueError that names the first parameter or option that differs.

    Args:
        own_groups: ``param_groups`` of the optimizer's own ``state_dict``.
        saved_groups: Those of the ``state_dict`` to load.
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


def _check_same_names(index: int, own: Sequence[str] | None, saved: Sequence[str] | None) -> None:
    if own is None or saved is None or list(own) == list(saved):
        return
    moved = sorted(set(own) ^ set(saved))
    if not moved:
        raise ValueError(f"group {index} of the checkpoint lists its parameters in another order")
    name = moved[0]
    where = "this optimizer" if name in own else "the checkpoint"
    raise ValueError(
        f"{name!r} is in group {index} of {where} alone; build the optimizer with the same "
        "param_groups() arguments as when it was saved"
    )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
