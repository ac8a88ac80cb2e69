"""megatron-core: `register` adds SinkGD to Megatron's table of "emerging" optimizers."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from sinkgd.integrations import missing
from sinkgd.optim.param_groups import DEFLATED_RANK
from sinkgd.optim.sinkgd import SinkGD

try:
    from megatron.core.optimizer.emerging_optimizers import (
        _EMERGING_OPTIMIZERS,
        EmergingOptimizerEntry,
        _default_param_overrides_factory,
        _is_nonlinear_or_embedding,
    )
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
    from megatron.core.utils import get_pg_size
except ImportError as error:
    source = "megatron-core==0.19.2"  # 0.16.1, the newest for Python 3.11, has no such table
    raise missing(__name__, "megatron-core", error, source) from error

# Keys that Megatron's groups have, or may have, for its scheduler and its checkpoints.
_KEYS = (
    *("is_expert_parallel", "default_config", "is_decoupled_lr", "optimizer"),
    *("wd_mult", "lr_mult", "start_wd", "end_wd"),
)


class MegatronSinkGD(SinkGD):
    """`SinkGD` for Megatron's groups, which keep the keys that Megatron gave them.

    Args:
        params: Groups of Megatron.
        **options: Arguments of `SinkGD`.
    """

    def __init__(self, params: Iterable[dict[str, Any]], **options: Any) -> None:
        groups = [*params]
        own = [{key: value for key, value in g.items() if key not in _KEYS} for g in groups]
        super().__init__(own, **options)
        for group, given in zip(self.param_groups, groups, strict=True):
            group.update({key: given[key] for key in _KEYS if key in given})


def register(matrix_lr: float, matrix_min_lr: float = 0.0, **options: Any) -> None:
    """Add the optimizer "sinkgd" to Megatron's table; choose it by ``--optimizer sinkgd``.

    All matrices except embeddings and the output layer go to SinkGD, routers included; a fused
    matrix counts as one. All other parameters go to Megatron's Adam at ``--lr``. The scheduler
    takes the rates of matrices from the arguments of this function. The weight decay of matrices is
    ``--weight-decay``, multiplied by their rate.

    Args:
        matrix_lr: The largest rate of matrices. To fine-tune, use 0.3 times AdamW's rate.
        matrix_min_lr: Their rate at the end of the schedule.
        **options: Arguments of `SinkGD`; ``deflated_rank`` is 15 by default, as in `param_groups`.

    Raises:
        ValueError: When the optimizer is built, if matrices are split by tensor parallelism.

    Examples:
        In the script that calls Megatron's ``pretrain``::

            sinkgd.integrations.megatron_core.register(matrix_lr=1e-3, matrix_min_lr=1e-4)
    """
    options = {"deflated_rank": DEFLATED_RANK, **options}

    def arguments(config: Any, model_chunks: Any, pg_collection: Any) -> dict[str, Any]:
        del model_chunks
        for name in ("tp", "expt_tp"):
            size = get_pg_size(getattr(pg_collection, name, None))
            if size > 1:
                raise ValueError(
                    f"tensor parallelism of size {size} (group {name!r}) splits matrices, and "
                    "SinkGD needs whole rows and columns; use --tensor-model-parallel-size 1"
                )
        return {"lr": matrix_lr, "weight_decay": config.weight_decay, **options}

    matrices = ParamKey(predicate=ParamPredicate(name="matrix", fn=_is_matrix))
    _EMERGING_OPTIMIZERS["sinkgd"] = EmergingOptimizerEntry(
        optimizer_cls=MegatronSinkGD,
        init_state_fn=_init_state,
        config_to_kwargs=arguments,
        default_param_overrides={
            **_default_param_overrides_factory(),
            matrices: {"max_lr": matrix_lr, "min_lr": matrix_min_lr},
        },
    )


def _is_matrix(param: Tensor) -> bool:
    return not _is_nonlinear_or_embedding(param)


def _init_state(optimizer: SinkGD, config: Any = None) -> None:
    """Make the state that a checkpoint is read into."""
    del config
    optimizer.init_state()
