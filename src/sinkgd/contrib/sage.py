"""SAGE: the sign of a momentum, damped in columns whose gradients are larger than average.

It is a method for embeddings and output heads, which SinkGD's authors leave to Adam.

Letters, everywhere in this file:
    n: columns, the features of an embedding
    s: (n,), the mean absolute value of each column of the gradient; for a vector, the absolute
        value of each entry
    S: (n,), the average of s over steps
"""

from collections.abc import MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sinkgd.distributed.all_reduce import all_reduce_tensors
from sinkgd.distributed.shards import is_dtensor, local, shard_groups
from sinkgd.exchange import Steps, computation
from sinkgd.optim.apply import ROUNDING_OPTIONS, UpdateWriter, check_rounding
from sinkgd.optim.method import Context, Group, Method, Slot, are_finite
from sinkgd.optim.methods.adamw import check_averages


class Sage(Method):
    r"""Step along Lion's direction, with a factor of at most 1 for each column.

    With β₁ and β₂ from ``betas``, and with root-mean-squares over the columns,

    .. math::
        H_j = \min\Bigl(\frac{\mathrm{rms}(\hat S)}{\hat S_j + \epsilon},
        \frac{\mathrm{rms}(s)}{s_j + \epsilon}, 1\Bigr), \qquad
        W \leftarrow (1 - \eta\lambda) W - \eta\, \mathrm{sign}(\beta_1 M + (1 - \beta_1) G)\, H

    and then :math:`M \leftarrow \beta_2 M + (1 - \beta_2) G`, where M is the momentum and G the
    gradient. :math:`\hat S` is S corrected for its start at zero. State: one number per entry, in
    the parameter's type, and n + 1 numbers in float32 or wider. Rows may be sharded; ranks then
    exchange n numbers per parameter, in one message for all parameters. Another message tells which
    gradients are finite.

    References:
        Lee and Kim, SAGE: Sign-Adaptive Gradient for Memory-Efficient LLM Optimization.
        https://arxiv.org/abs/2604.07663
    """

    is_auxiliary = True
    options = MappingProxyType[str, Any]({"betas": (0.9, 0.99), "eps": 1e-8, **ROUNDING_OPTIONS})

    least_dims = 1  # a scalar has no columns

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, and columns that are sharded."""
        check_averages(group)
        last = {-1, param.ndim - 1}
        if is_dtensor(param) and any(getattr(p, "dim", None) in last for p in param.placements):
            raise TypeError(
                f"SAGE keeps one average of all rows, and the columns of {name!r} are sharded "
                f"({param.placements}); shard its rows, or give it to 'adamw'"
            )
        check_rounding(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create the momentum and the average, filled with zeros."""
        del group
        if state:
            return
        device = param.device
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        wide = torch.promote_types(param.dtype, torch.float32)
        state["mean_size"] = torch.zeros(param.shape[-1], dtype=wide, device=device)
        # 1 - β₂ᵗ after t steps
        state["weight_seen"] = torch.zeros((), dtype=wide, device=device)

    @computation
    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        """Check the gradients; then damp and write the updates one by one."""
        grads = [_gradient(slot, context) for slot in slots]
        sizes = yield _mean_sizes(slots, grads)
        finite: Tensor = yield are_finite(slots)
        writer = UpdateWriter(slots, finite, group, context)
        for slot in slots:
            self.init_state(slot.param, group, context.states[slot.param])
        states = [context.states[slot.param] for slot in slots]
        flags = [writer.may_write(i) for i in range(len(slots))]
        dampers = _dampers(sizes, states, group, flags)
        for i, (slot, grad, state) in enumerate(zip(slots, grads, states, strict=True)):
            update = _direction(local(state["exp_avg"]), grad, group["betas"], flags[i])
            writer.write_(i, local(slot.param), update.mul_(dampers[i]))
        return finite


def _gradient(slot: Slot, context: Context) -> Tensor:
    grad = local(slot.grad)
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return wide if context.loss_scale is None else wide / context.loss_scale


def _direction(
    momentum: Tensor, grad: Tensor, betas: tuple[float, float], flag: Tensor | None
) -> Tensor:
    """Return Lion's direction; average the gradient into the momentum unless ``flag`` is False."""
    beta1, beta2 = betas
    wide = momentum.to(grad.dtype)  # may be the momentum itself, so the direction comes first
    direction = _between(wide, grad, beta1).sign_()
    ahead = _between(wide, grad, beta2)
    momentum.copy_(ahead if flag is None else torch.where(flag, ahead, wide))
    return direction


def _between(momentum: Tensor, grad: Tensor, beta: float) -> Tensor:
    # torch.lerp computes the difference grad - momentum, which may overflow.
    return (momentum * beta).add_(grad, alpha=1 - beta)


def _dampers(
    sizes: Sequence[Tensor],
    states: Sequence[MutableMapping[str, Any]],
    group: Group,
    flags: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return H of each parameter, ``(n,)``, after averaging s into S where the flag is not False.

    ``sizes`` holds the s of each parameter.
    """
    beta2, eps = group["betas"][1], group["eps"]
    dampers = []
    for size, state, flag in zip(sizes, states, flags, strict=True):
        for average, new in ((state["mean_size"], size), (state["weight_seen"], 1.0)):
            ahead = beta2 * average + (1 - beta2) * new
            average.copy_(ahead if flag is None else torch.where(flag, ahead, average))
        # Both numbers in the state are zero until the first finite gradient.
        average = state["mean_size"] / state["weight_seen"].clamp(min=1e-38)
        dampers.append(
            torch.minimum(_rms(average) / (average + eps), _rms(size) / (size + eps)).clamp(max=1)
        )
    return dampers


@computation
def _mean_sizes(slots: Sequence[Slot], grads: Sequence[Tensor]) -> Steps[list[Tensor]]:
    """Return s of each parameter. If rows are sharded, each process group gets one message."""
    sums = [
        grad.abs().flatten(0, -2).sum(0, dtype=torch.float64) if grad.ndim > 1 else grad.abs()
        for grad in grads
    ]
    groups = [shard_groups(slot.param) for slot in slots]
    if any(groups):
        sums = yield all_reduce_tensors([own.double() for own in sums], groups)
    rows = [slot.param.numel() // slot.param.shape[-1] for slot in slots]
    return [
        (own / count).to(grad.dtype) for own, count, grad in zip(sums, rows, grads, strict=True)
    ]


def _rms(x: Tensor) -> Tensor:
    size = x.amax()  # entries are not negative; divided by the largest, their squares are in range
    unit = x / torch.where(size == 0, 1, size)
    return size * unit.square().mean().sqrt()
