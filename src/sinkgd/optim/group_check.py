"""What a parameter group must be: options in range, and parameters that fit its algorithm."""

from torch import Tensor

from sinkgd.optim.algorithms.contract import Algorithm, Group
from sinkgd.optim.arguments import check_initialized
from sinkgd.optim.exchanged import named
from sinkgd.optim.nonfinite import POLICIES
from sinkgd.optim.option_kinds import check_kinds


def check_group(group: Group, index: int, algorithm: Algorithm) -> None:
    """Refuse options out of range, and parameters that do not fit the algorithm of group ``index``.

    Raises:
        ValueError: With the option or the parameter.
        TypeError: The same.
    """
    check_kinds(group)
    if group["nonfinite"] not in POLICIES:
        raise ValueError(f"nonfinite must be one of {POLICIES}, got {group['nonfinite']!r}")
    for name, param in named(group, index):
        check_param(name, param, group, algorithm)


def check_param(name: str, param: Tensor, group: Group, algorithm: Algorithm) -> None:
    """Refuse a parameter that does not fit the algorithm of its group.

    Raises:
        ValueError: With its name.
        TypeError: The same.
    """
    check_initialized(name, param)
    if not param.is_floating_point():
        raise TypeError(
            f"{name!r} is {param.dtype}; only real floating parameters can be normalized"
        )
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "ds_id"):
        raise TypeError(
            f"{name!r} lies in flat pieces, of FullyShardedDataParallel or DeepSpeed ZeRO, "
            "which have neither rows nor columns; shard the model with fully_shard (FSDP2)"
        )
    algorithm.check(name, param, group)
