"""SinkGD: descend along the SR-Sinkhorn normalization of the gradient, with no state."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.distributed.shards import has_values, local
from sinkgd.optim.arguments import OF_PARAM_GROUPS, OF_VARIANT, suggest_names
from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.method import Group
from sinkgd.optim.parameters import named


class SinkGD(GroupedOptimizer):
    r"""Descend along the gradient with its rows and columns normalized in turn.

    .. math::
        W \leftarrow (1 - \eta\lambda)\, W - \eta\, \text{SR-Sinkhorn}(G, L)

    The update has root-mean-square 1 (or less if columns of the gradient are zero), so ``lr`` is
    the root-mean-square change of a weight in one step. Pass the groups of `param_groups` for the
    recommended recipe: hidden matrices are updated as above, with deflation, and all other
    parameters by AdamW. Without groups and momentum, no state is kept at all: matrices are updated
    as above, and gradients of vectors and scalars are divided by their root-mean-square.

    A group may set its own value of every option, and of every option of `SinkGDVariant`;
    `param_groups` sets ``deflated_rank``. Disabled options add no cost. Of the options that change
    the update, vectors support only momentum.

    On a mesh of devices a step sends L messages to each process group that shards rows or columns,
    and sometimes one more to a group that shards rows of some matrices and columns of others.
    Momentum adds one message. ``deflated_rank`` adds two for a group that shards rows, four for
    one that shards columns, and six for one that does both. No matrix is sent. ``nesterov`` copies
    gradients: it processes 256 MiB at a time and sends one set of messages per chunk.
    ``deflated_rank`` does the same with 128 MiB of vectors.

    Args:
        params: Groups from `param_groups`, or tensors, or (name, tensor) pairs. Groups may name any
            algorithm. An argument below that no group uses is an error.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 1e-3.
        sinkhorn_iterations: Iterations L, at least 1. The paper uses 5.
        weight_decay: Decoupled weight decay λ, at least 0, multiplied by ``lr``. Default: 0.
        cautious_decay: Decay only entries that the update moves toward zero by itself: those whose
            weight and update have the same sign (opposite signs with ``maximize``). An entry whose
            update is zero does not decay; in the paper (Chen et al. 2025) it does. In AdamW's
            groups, Adam's direction is compared with the weight. Keeps no state, and costs no
            additional pass over the weights. Needs a ``weight_decay`` in some group.
        maximize: Ascend instead.
        nonfinite: What a gradient with NaN or infinity does: ``"raise"`` or ``"skip"`` (leave the
            parameter unchanged, and count it in `skipped`).
        backend: ``"auto"``, or the name of one of `sinkgd.kernels.backends()`.
        tol: Stop iterating a matrix when an iteration changes no row scale by more than ``tol``,
            relative to its previous value; at most ``sinkhorn_iterations`` are run. This changes
            the update by about ``tol``, relative to its size. None never stops early.
        rounding: How bfloat16 parameters, and the bfloat16 moments of AdamW's groups, are rounded:
            ``"nearest"``, or ``"stochastic"`` (up or down at random, so that small updates count
            on average).
        seed: Seed of the stochastic rounding; equal seeds draw equal bits.
        momentum: Decay rate μ of an exponential average B of the gradients, in [0, 1). B is
            normalized instead of the gradient. Keeps one float32 per entry; 0 keeps nothing. A
            matrix whose gradients become zero goes on at the full rate: docs/options.md.
        nesterov: Normalize μB + (1 − μ)G instead of B. Needs ``momentum``.
        deflated_rank: Number k of the update's leading singular values that are lowered to the next
            one; 0 lowers none. This whitens the largest directions, at the cost of two more passes
            over the gradient and about 10·k flops per entry. Keeps no state. The ``eager`` backend
            makes float32 copies of the gradients, 64 MiB at a time unless a single gradient is
            larger. Above 32 directions, ``triton`` makes such copies one at a time. Only for
            parameters without groups: groups of `param_groups` set their own rank, so pass it
            there. Default: 0.

    Raises:
        ValueError: If an option is out of range, does not fit a parameter, or has no effect on any
            group; the message names the option.
        TypeError: If ``params`` is a model, an option has the wrong type, or a parameter is not
            real and floating.
        ImportError: If ``backend`` names a backend that is not installed.

    Examples:
        >>> import torch
        >>> from sinkgd import SinkGD
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = SinkGD(model.parameters(), lr=1e-3)
        >>> model(torch.ones(2, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> len(optimizer.state)
        0

    References:
        Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
        Algorithm 4. https://arxiv.org/abs/2502.06742
        Chen et al., Cautious Weight Decay. https://arxiv.org/abs/2510.12402
    """

    default_algorithm = "stateless"
    usual_call = "SinkGD(param_groups(model))"
    takes_every_group = True
    none_means = MappingProxyType({"lr": 1e-3, "weight_decay": 0.0, "deflated_rank": 0})

    @suggest_names(
        {**OF_PARAM_GROUPS, **{name: f"SinkGDVariant(params, {name}=...)" for name in OF_VARIANT}}
    )
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        sinkhorn_iterations: int = 5,
        *,
        weight_decay: float | None = None,
        cautious_decay: bool = False,
        maximize: bool = False,
        nonfinite: str = "raise",
        backend: str = "auto",
        tol: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        momentum: float = 0.0,
        nesterov: bool = False,
        deflated_rank: int | None = None,
    ) -> None:
        arguments: dict[str, Any] = {
            "lr": lr,
            "sinkhorn_iterations": sinkhorn_iterations,
            "weight_decay": weight_decay,
            "cautious_decay": cautious_decay,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "backend": backend,
            "tol": tol,
            "rounding": rounding,
            "seed": seed,
            "momentum": momentum,
            "nesterov": nesterov,
            "deflated_rank": deflated_rank,
        }
        super().__init__(params, arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `GroupedOptimizer.add_param_group` does.

        It warns if the group has matrices and vectors but no algorithm, and no other group runs
        ``"stateless"``, the default. Lightning's ``BaseFinetuning.unfreeze_and_add_param_group``
        adds such a group.
        """
        has_algorithm = "algorithm" in param_group
        super().add_param_group(param_group)
        if has_algorithm or "_saved_hook" not in self.__dict__:  # the constructor checks its groups
            return
        dims = {param.ndim for param in param_group["params"]}
        others = {group["algorithm"] for group in self.param_groups[:-1]}
        if dims and min(dims) < 2 <= max(dims) and self.default_algorithm not in others:
            warnings.warn(
                "a group without an algorithm was added to an optimizer whose groups have one: all "
                "of its parameters are trained without state, embeddings and output head included. "
                "For the recommended recipe add the groups of sinkgd.param_groups(model, "
                "only=module.parameters()). To "
                f"train without state, give the group algorithm={self.default_algorithm!r}",
                UserWarning,
                stacklevel=_stacklevel_of_caller(),
            )

    def _warn_of_lost_updates(self) -> None:
        """Warn, once per optimizer, if rounding to the nearest bfloat16 loses most updates.

        An update has the root-mean-square ``lr``, and bfloat16 keeps 8 bits of a weight.
        """
        for name, param, group in _matrices_in_bfloat16(self.param_groups):
            some = local(param).detach()[:64].float()
            gap = float(some.square().mean().sqrt()) * 2**-8
            if float(group["lr"]) < gap / 8 < inf:
                warnings.warn(
                    f"{name!r} is bfloat16 and has lr={float(group['lr']):.2g}, while bfloat16 "
                    f"values near its typical weight are {gap:.1g} apart: rounding to the nearest "
                    "loses nearly all updates of such matrices. Pass rounding='stochastic', or "
                    "train float32 weights under autocast",
                    UserWarning,
                    stacklevel=_stacklevel_of_caller(),
                )
                return

    def _check_routing(self, given: Sequence[Mapping[str, Any]], passed: Mapping[str, Any]) -> None:
        """Warn if updates are lost, and if matrices and vectors have no algorithm and no rate.

        The latter is the case for ``SinkGD(model.parameters())``, and if a trainer builds the
        optimizer from groups of its own, which only set the weight decay.
        """
        self._warn_of_lost_updates()
        dims = {
            param.ndim
            for own, group in zip(given, self.param_groups, strict=True)
            if "algorithm" not in own and "lr" not in own
            for param in group["params"]
        }
        if "lr" in passed or not dims or not min(dims) < 2 <= max(dims):
            return
        name, lr = type(self).__name__, self.none_means["lr"]
        warnings.warn(
            f"{name} got matrices and vectors without an algorithm or lr, and trains all of "
            f"them without state at lr={lr}, embeddings and output head included. In the study "
            "pareto (docs/experiments.md) this ended at a higher loss than AdamW. For the "
            f"recommended recipe write {name}(sinkgd.param_groups(model)) to train a new model, or "
            f"{name}(sinkgd.param_groups(model, adamw_lr=...)) to fine-tune at the rate that AdamW "
            "would have. With the Hugging Face Trainer, write optimizer_cls_and_kwargs=("
            'sinkgd.integrations.transformers.SinkGDFactory, {"training_args": args}), where '
            "args.learning_rate is that rate. To train without state, pass lr",
            UserWarning,
            stacklevel=_stacklevel_of_caller(),
        )


def _matrices_in_bfloat16(groups: Sequence[Group]) -> Iterator[tuple[str, Tensor, Group]]:
    """Yield the first matrix of each group that rounds its bfloat16 weights to the nearest."""
    for index, group in enumerate(groups):
        if group.get("rounding") != "nearest" or not float(group["lr"]):
            continue
        for name, param in named(group, index):
            is_matrix = param.ndim >= 2 and param.dtype == torch.bfloat16 and param.numel() > 0
            if is_matrix and has_values(param) and local(param).numel() > 0:
                yield name, param, group
                break


def _stacklevel_of_caller() -> int:
    """Return the ``stacklevel`` of the first function outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("sinkgd."):
        level, frame = level + 1, frame.f_back
    return level
