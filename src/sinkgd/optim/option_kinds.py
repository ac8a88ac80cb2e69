"""What kind of value each option takes: another kind is refused where it is passed, by its name.

Words, such as ``rounding="nearest"``, are not listed: they are looked up among those that exist.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sinkgd.norms import as_norms
from sinkgd.number_check import (
    check_betas,
    check_flag,
    check_number,
    check_whole_number,
    is_whole_number,
)

Check = Callable[[str, Any], None]


def check_kinds(options: Mapping[str, Any]) -> None:
    """Refuse options of the wrong kind; the range is left to the algorithm.

    Raises:
        TypeError: With the option's name and its value.
        ValueError: The same.
    """
    for name, value in options.items():
        if name in KINDS:
            KINDS[name](name, value)


def _number(name: str, value: Any) -> None:
    check_number(name, value, least=None)


def _rate(name: str, value: Any) -> None:
    check_number(name, value)


def _or_none(check: Check) -> Check:
    def checked(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return checked


def _norms(name: str, value: Any) -> None:  # noqa: ARG001 - every check has it
    as_norms(value)


def _split(name: str, value: Any) -> None:
    sizes = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not all(map(is_whole_number, sizes)) or not sizes:
        raise TypeError(
            f"{name} must be a number of parts or a list of their sizes in rows, got {value!r}"
        )


KINDS: Mapping[str, Check] = MappingProxyType(
    {
        **dict.fromkeys(("lr", "weight_decay"), _rate),
        **dict.fromkeys(
            ("eps", "momentum", "tiny_row_threshold", "tau", "max_norm", "spike_z"), _number
        ),
        **dict.fromkeys(("tol", "theta"), _or_none(_number)),
        **dict.fromkeys(
            (
                *("sinkhorn_iterations", "newton_schulz_steps", "num_iters", "n_iter"),
                *("deflated_rank", "seed"),
                *("clip_delay", "reset_interval", "warmup_steps", "norm_window"),
            ),
            check_whole_number,
        ),
        **dict.fromkeys(("maximize", "nesterov", "warm_start"), check_flag),
        "fused": _or_none(check_flag),
        "betas": check_betas,
        "norms": _norms,
        "split": _split,
    }
)
