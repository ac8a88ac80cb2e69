r"""The tempered update: rows and columns divided by their sums in turn, then squashed by tanh.

It resembles SR-Sinkhorn but is a different method. It divides by sums of absolute values instead of
lengths, applies a tanh, and gives the result the root-mean-square of the gradient. So the step of a
matrix is as large as its gradient times the rate, as in SGD.

Shapes, everywhere in this file:
    m: rows, the out_features of an ``nn.Linear`` weight
    n: columns, its in_features
    ...: leading batch dimensions, one independent matrix each
"""

import math
from collections.abc import Generator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.distributed.shards import (
    ParamMatrix,
    check_shards,
    first_entry_of,
    is_dtensor,
    local,
    param_matrices,
    shard_groups,
)
from sinkgd.exchange import Steps, computation, sums_in_turn
from sinkgd.matrix_views import check_layout
from sinkgd.number_check import check_number, check_whole_number
from sinkgd.optim.apply import ROUNDING_OPTIONS, UpdateWriter, check_rounding
from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.grouped import GroupedOptimizer
from sinkgd.optim.method import Context, Group, Method, Need, Slot, are_finite
from sinkgd.precision import in_full_precision

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    Groups = Sequence[ProcessGroup]

TAU, NUM_ITERS, EPS = 0.1, 5, 1e-8


class TemperedSinkGD(GroupedOptimizer):
    r"""Descend along the tempered gradient, with no state.

    .. math::
        W \leftarrow (1 - \eta\lambda)\, W - \eta\, T_\tau(G)

    where T is `sinkgd.temper`. T is not the iteration of the SinkGD paper: it divides by sums of
    absolute values instead of lengths, and T(G) has the root-mean-square of G if G is a matrix
    and ``n_iter`` is not 0. So clipping and the scale of the loss matter as for SGD. ``state``
    stays empty. The step needs scratch memory for up to five float32 copies of the largest matrix.
    Ranks that share sharded parameters exchange, for each matrix, one vector per iteration (two if
    both rows and columns are sharded) and two numbers, and need a float32 copy of all their shards.

    Args:
        params: Tensors or (name, tensor) pairs, or groups of them, of any shape; whole or sharded.
        lr: Learning rate η of the groups that do not set their own, at least 0; a float or a tensor
            of one element. Default: 3e-4.
        weight_decay: Decoupled weight decay λ, at least 0, multiplied by ``lr``. Default: 0.1.
        cautious_decay: Decay only entries that the update moves toward zero; see `SinkGD`.
        tau: Temperature τ, positive. Needs an ``n_iter`` above 0.
        n_iter: Iterations, at least 0; with 0, the gradient is only divided by the mean absolute
            value of its entries.
        eps: Floor on a sum of absolute values, at least 0.
        maximize: Ascend instead.
        nonfinite: What a gradient with NaN or infinity does: ``"raise"`` or ``"skip"`` (leave the
            parameter unchanged, and count it in `skipped`).
        rounding: How bfloat16 parameters are rounded: ``"nearest"``, or ``"stochastic"``.
        seed: Seed of the stochastic rounding; equal seeds draw equal bits.

    Raises:
        ValueError: If an option is out of range; the message names it.
        TypeError: If a parameter is not real and floating.

    Examples:
        >>> import torch
        >>> from sinkgd import TemperedSinkGD
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = TemperedSinkGD([weight], lr=0.1, weight_decay=0.0)
        >>> (weight * torch.tensor([[3.0, 4.0], [0.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> round(weight.data.square().mean().sqrt().item() / 0.1, 4)  # the gradient's: √(29/4)
        2.6926
    """

    default_algorithm = "tempered"
    usual_call = "TemperedSinkGD(model.parameters())"
    none_means = MappingProxyType({"lr": 3e-4, "weight_decay": 0.1})

    @suggest_names({})
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        cautious_decay: bool = False,
        tau: float = TAU,
        n_iter: int = NUM_ITERS,
        eps: float = EPS,
        *,
        maximize: bool = False,
        nonfinite: str = "raise",
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        arguments: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "cautious_decay": cautious_decay,
            "tau": tau,
            "n_iter": n_iter,
            "eps": eps,
            "maximize": maximize,
            "nonfinite": nonfinite,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(params, arguments)


@in_full_precision
def temper(
    grad: Tensor, tau: float = TAU, num_iters: int = NUM_ITERS, *, eps: float = EPS
) -> Tensor:
    r"""Return the tempered update of a gradient.

    For a matrix, the iteration

    .. math::
        v_{ij} \leftarrow \frac{v_{ij}}{\max(\sum_j |v_{ij}|, \epsilon)}, \qquad
        v_{ij} \leftarrow \frac{v_{ij}}{\max(\sum_i |v_{ij}|, \epsilon)}, \qquad
        v_{ij} \leftarrow \tanh(v_{ij} / \tau)

    runs ``num_iters`` times. The result is scaled to the root-mean-square of the gradient; entries
    are clamped to the range of their type. A vector becomes
    :math:`\tanh(v / (\tau \max(\sum |v|, \epsilon)))` and a scalar :math:`\tanh(v / \tau)`. With
    ``num_iters=0`` every shape becomes :math:`v / (\overline{|v|} + \epsilon)`.

    Args:
        grad: ``(..., m, n)``, ``(n,)`` or ``()``, any floating dtype. Not modified.
        tau: Temperature τ, positive, 0.1 by default. Entries well below τ keep their proportions;
            larger entries become almost equal.
        num_iters: Iterations, at least 0, 5 by default. For vectors and scalars, all numbers
            except 0 give the same result.
        eps: Floor on a sum, at least 0, 1e-8 by default. Zero rows and columns stay zero in any
            case.

    Returns:
        The update, of ``grad``'s shape and dtype; computed in float32, or in float64 for float64.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option has the wrong type.

    Examples:
        >>> temper(torch.tensor([[8.0, 1.0], [-1.0, 2.0]]))  # in so small a matrix all exceed tau
        tensor([[ 4.1833,  4.1833],
                [-4.1833,  4.1833]])
        >>> temper(torch.tensor([[8.0, 1.0], [-1.0, 2.0]]), tau=10.0, num_iters=1)
        tensor([[ 5.2221,  1.0275],
                [-1.9613,  6.1504]])
    """
    check_tempering(tau, num_iters, eps)
    steps = tempering(grad, tau, num_iters, eps=eps)
    try:
        sums = next(steps)
        while True:
            sums = steps.send(sums.numbers)
    except StopIteration as end:
        update: Tensor = end.value
        return update.to(grad.dtype)


class Sums(NamedTuple):
    """Sums over a matrix or a vector, or over this rank's shard of one."""

    numbers: Tensor
    over: Literal["row", "column", "all"]  # each number is the sum of a row, a column, or all


def tempering(
    grad: Tensor, tau: float, num_iters: int, *, eps: float
) -> Generator[Sums, Tensor, Tensor]:
    """Temper a gradient or a shard of one: the definition of `temper`.

    Yields:
        `Sums` over the shard. The caller sends back the sums over the whole matrix or vector.

    Returns:
        The update of the shard, in float32 or float64.
    """
    v = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if num_iters == 0:
        mean = yield from _mean_size(v)
        return v / torch.where(mean == 0, 1, mean + eps).to(v.dtype)
    if v.ndim >= 2:
        return (yield from _temper_matrices(v, tau, num_iters, eps))
    if v.ndim == 1:
        total = yield Sums(v.abs().sum(dtype=torch.float64), "all")
        return torch.tanh(_divided(v, total, eps) / tau)
    return torch.tanh(v / tau)


def check_tempering(tau: float, num_iters: int, eps: float, iterations: str = "num_iters") -> None:
    """Refuse options out of range; ``iterations`` is what the caller calls ``num_iters``.

    Raises:
        TypeError: If an option has the wrong type; the message gives the option and its value.
        ValueError: If an option is out of range; the message gives the option and its value.
    """
    check_number("tau", tau, least=None)
    check_whole_number(iterations, num_iters)
    check_number("eps", eps, least=None)
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if num_iters < 0:
        raise ValueError(f"{iterations} must be at least 0, got {num_iters}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")


def _temper_matrices(
    grad: Tensor, tau: float, num_iters: int, eps: float
) -> Generator[Sums, Tensor, Tensor]:
    v = grad
    for _ in range(num_iters):
        row_sums = yield Sums(v.abs().sum(-1, keepdim=True, dtype=torch.float64), "row")
        v = _divided(v, row_sums, eps)
        column_sums = yield Sums(v.abs().sum(-2, keepdim=True, dtype=torch.float64), "column")
        v = _divided(v, column_sums, eps)
        v = v.div_(tau).tanh_()
    squares = yield Sums(torch.stack([_squares(grad), _squares(v)]), "all")
    # The squares of float64 entries above 1e154 overflow. The clamp then shortens the update.
    own, now = squares.clamp(max=torch.finfo(torch.float64).max).unbind()
    factor = (own / torch.where(now == 0, 1, now)).sqrt()
    # The factor may be out of the range of v's dtype, so v is multiplied by it in two parts.
    unit = torch.ones_like(factor).masked_fill_(factor > 1, 2.0**64)
    limit = torch.finfo(v.dtype).max
    return v.mul_((factor / unit).to(v.dtype)).mul_(unit.to(v.dtype)).clamp_(-limit, limit)


def _divided(v: Tensor, sums: Tensor, eps: float) -> Tensor:
    """Return ``v`` divided by float64 sums, which may be beyond the range of the type of ``v``."""
    sums = torch.where(sums == 0, 1, sums.clamp(min=eps))
    # Multiplication by a power of two changes no rounding.
    unit = torch.ones_like(sums).masked_fill_(sums > torch.finfo(v.dtype).max, 2.0**-64)
    return (v * unit.to(v.dtype)).div_((sums * unit).to(v.dtype))


def _squares(x: Tensor) -> Tensor:
    """Return the sum of squares of each matrix, float64 ``(..., 1, 1)``."""
    if x.numel() == 0:
        return x.new_zeros((*x.shape[:-2], 1, 1), dtype=torch.float64)
    # The squares of a float32 gradient may be out of the range of float32.
    peak = x.abs().amax((-2, -1), keepdim=True)
    squares = (x / torch.where(peak == 0, 1, peak)).square().sum((-2, -1), keepdim=True)
    return squares.double() * peak.double().square()


def _mean_size(v: Tensor) -> Generator[Sums, Tensor, Tensor]:
    """Return the mean absolute value of the entries of each matrix, or of a vector."""
    dims = (-2, -1) if v.ndim >= 2 else ()
    sizes = v.abs().sum(dims, keepdim=v.ndim >= 2, dtype=torch.float64)
    count = v.shape[-2:].numel() if v.ndim >= 2 else v.numel()
    sums = yield Sums(torch.stack([sizes, torch.full_like(sizes, count)]), "all")
    return sums[0] / sums[1]


class Tempered(Method):
    """The method ``tempered``: matrices, vectors and scalars by one rule, with no state.

    The size of the update depends on that of the gradient, which is divided by the loss scale
    first.
    """

    options = MappingProxyType[str, object](
        {
            "tau": TAU,
            "n_iter": NUM_ITERS,
            "eps": EPS,
            "layout": "auto",
            "split": 1,
            **ROUNDING_OPTIONS,
        }
    )
    needs = MappingProxyType({"tau": Need("n_iter", 0, "an n_iter above 0, e.g. n_iter=5")})

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, and shards that cannot be seen as matrices."""
        check_tempering(group["tau"], group["n_iter"], group["eps"], "n_iter")
        check_rounding(name, param, group)
        if param.ndim >= 2:
            check_layout(name, param, layout=group["layout"], split=group["split"])
            check_shards(name, param, layout=group["layout"], split=group["split"])

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Check the gradients; then temper them and write the updates, shards side by side."""
        finite: Tensor = yield are_finite(slots)
        writer = UpdateWriter(slots, finite, group, context)

        @computation
        def step_shard(i: int, matrix: ParamMatrix, groups: "SumGroups") -> "Steps[None]":
            wide = _unscaled(matrix.grad, context)
            update = yield _temper_shard(
                wide, groups, group["tau"], group["n_iter"], eps=group["eps"]
            )
            writer.write_(i, matrix.param, update, matrix.first_entry)

        # Each computation keeps a float32 copy of its shard until its last sum is known.
        shards = []
        for i, slot in enumerate(slots):
            for matrix in _matrices_of(slot, group):
                if is_dtensor(slot.param):
                    shards.append(step_shard(i, matrix, _sum_groups(slot, matrix)))
                    continue
                wide = _unscaled(matrix.grad, context)
                update = temper(wide, group["tau"], group["n_iter"], eps=group["eps"])
                writer.write_(i, matrix.param, update, matrix.first_entry)
        if shards:
            yield shards
        return finite


class SumGroups(NamedTuple):
    """The process groups over which each kind of `Sums` is added up."""

    row: "Groups" = ()
    column: "Groups" = ()
    all: "Groups" = ()


def _sum_groups(slot: Slot, matrix: ParamMatrix) -> SumGroups:
    if matrix.sharding is None:
        return SumGroups(all=shard_groups(slot.grad))
    rows, cols = matrix.sharding.sum_groups
    return SumGroups(rows, cols, (*rows, *cols))


@computation
def _temper_shard(
    grad: Tensor, groups: SumGroups, tau: float, num_iters: int, *, eps: float
) -> Steps[Tensor]:
    """Temper this rank's shard of a gradient; a computation for `sinkgd.exchange`.

    For each matrix, a group exchanges ``num_iters`` vectors, with one number per row or column of
    the shard, and two numbers at the end.
    """
    steps = tempering(grad, tau, num_iters, eps=eps)
    try:
        sums = next(steps)
        while True:
            over: Groups = getattr(groups, sums.over)
            flat = sums.numbers.double().flatten()
            yield from sums_in_turn(flat, over, groups.column if sums.over == "row" else ())
            whole = flat.view(sums.numbers.shape).to(sums.numbers.dtype)
            sums = steps.send(whole if over else sums.numbers)
    except StopIteration as end:
        update: Tensor = end.value
        return update


def _matrices_of(slot: Slot, group: Group) -> list[ParamMatrix]:
    if slot.param.ndim < 2:
        first_entry = first_entry_of(slot.param, group["layout"])
        return [ParamMatrix(local(slot.param), local(slot.grad), first_entry)]
    return param_matrices([slot], layout=group["layout"], split=group["split"]).matrices


def _unscaled(grad: Tensor, context: Context) -> Tensor:
    """Return a gradient in float32 or wider, without the scale of the loss."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return wide if context.loss_scale is None else wide / context.loss_scale
