"""AdamW for the parameters that no matrix method updates; torch's own functions compute Adam."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sinkgd.distributed.shards import first_entry_of, from_local, is_dtensor, local
from sinkgd.exchange import Computation, Steps, computation, immediate, run
from sinkgd.kernels import Cautious
from sinkgd.kernels.eager import apply_update_
from sinkgd.kernels.rounding import round_to_bfloat16
from sinkgd.matrix_views import are_dense, same_memory_order
from sinkgd.number_check import check_betas
from sinkgd.optim.apply import (
    ROUNDING_OPTIONS,
    allowed,
    check_rounding,
    decays_cautiously,
    draw_keys,
    learning_rate,
)
from sinkgd.optim.method import Context, Group, Method, Slot, are_finite

# Devices for which torch has the fused kernel: torch/utils/_foreach_utils.py,
# _get_fused_kernels_supported_devices.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")

# How many entries of a parameter stochastic rounding and cautious decay have in float32 at a time.
# With random bits, each then takes some 40 bytes. The number is larger on a GPU, since launching
# small kernels takes longer than their work.
_CPU_CHUNK, _CHUNK = 1 << 18, 1 << 22

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

ADAMW_OPTIONS = MappingProxyType[str, object]({"betas": (0.9, 0.999), "eps": 1e-8, "fused": None})


class AdamW(Method):
    """Decoupled weight decay and Adam (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101).

    State: two numbers per entry. If one gradient is not finite, the whole group is left unchanged.
    As in torch, entries of the gradient must stay below 1e19, so that their squares are within
    float32's range; clip larger entries.

    With ``cautious_decay``, torch updates zeros in float32 instead of the parameter, for a part of
    a parameter at a time. The zeros become the step alone. Our own update then decays the parameter
    by the signs of this step, and adds the step.

    With ``rounding="stochastic"``, bfloat16 weights and their moments are updated in float32 and
    rounded at random. Rounding to the nearest would lose small updates of the weights, and all
    decay of the second moment if 1 - β₂ is below 2⁻⁹.
    """

    options = MappingProxyType[str, object]({**ADAMW_OPTIONS, **ROUNDING_OPTIONS})
    is_elementwise = True
    is_auxiliary = True

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range; choose the fused kernel if the device has it."""
        check_adamw(param, group)
        check_rounding(name, param, group)

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create both moments, filled with zeros."""
        init_moments(state, param, fused=group["fused"])

    def check_other_dtype(self, name: str, param: Tensor, grad: Tensor, group: Group) -> None:
        """Refuse the gradient, unless the parameter is updated in float32."""
        if group["rounding"] != "stochastic" or param.dtype != torch.bfloat16:
            remedy = ", or use rounding='stochastic' for bfloat16 parameters"
            refuse_other_dtype(name, param, grad, remedy)

    def adopt(
        self, param: Tensor, group: Group, saved: Mapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Return the state of a parameter that torch's AdamW has updated.

        Args:
            param: The parameter.
            group: Its group.
            saved: Its state in ``torch.optim.AdamW``, which is copied.
        """
        state: dict[str, Any] = {}
        self.init_state(param, group, state)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].copy_(saved[key])
        state["step"].fill_(float(saved["step"]))
        return state

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Check the gradients, then update as torch does."""
        if any(is_dtensor(slot.param) for slot in slots):
            return self._step_on_mesh(slots, group, context)
        # torch's fused kernel breaks a compiled graph, so it must not run inside
        # `sinkgd.exchange.exchange`.
        finite = run(are_finite(slots))
        self._update_(slots, finite, group, context)
        return immediate(finite)

    @computation
    def _step_on_mesh(self, slots: Sequence[Slot], group: Group, context: Context) -> Steps[Tensor]:
        finite: Tensor = yield are_finite(slots)
        self._update_(slots, finite, group, context)
        return finite

    def _update_(
        self, slots: Sequence[Slot], finite: Tensor, group: Group, context: Context
    ) -> None:
        flags = allowed(finite, context)
        states = [context.states[slot.param] for slot in slots]
        for slot, state in zip(slots, states, strict=True):
            init_moments(state, slot.param, fused=group["fused"])
        descend = partial(
            descend_by_adamw_,
            group=group,
            lr=learning_rate(group),
            held_back=None if flags is None else ~flags.all(),
            grad_scale=context.loss_scale,
        )
        keys: Sequence[Tensor | None] = draw_keys(slots, group) or [None] * len(slots)
        together: list[tuple[Slot, MutableMapping[str, Any]]] = []
        for slot, state, key in zip(slots, states, keys, strict=True):
            if key is None or slot.param.dtype != torch.bfloat16:
                together.append((slot, state))
            else:
                _descend_in_float32_(slot, state, key, descend)
        if together:
            descend(
                [local(slot.param) for slot, _ in together],
                [local(slot.grad) for slot, _ in together],
                [state for _, state in together],
            )


def refuse_other_dtype(name: str, param: Tensor, grad: Tensor, remedy: str = "") -> None:
    """Refuse a gradient of another dtype, which functions of torch and bitsandbytes do not take.

    Raises:
        TypeError: Always; the message names the parameter.
    """
    raise TypeError(
        f"{name!r} is {param.dtype} and its gradient {grad.dtype}; this algorithm needs one dtype. "
        f"Cast the gradient{remedy}"
    )


def check_adamw(param: Tensor, group: Group) -> None:
    """Refuse options of AdamW out of range; choose its fused kernel if the device has it."""
    check_averages(group)
    if group["fused"] is None:
        group["fused"] = param.device.type in _FUSED_DEVICES


def check_averages(group: Group) -> None:
    """Refuse ``betas`` and ``eps`` out of range."""
    check_betas("betas", group["betas"])
    if not group["eps"] >= 0:
        raise ValueError(f"eps must be at least 0, got {group['eps']}")


def descend_by_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    states: Sequence[MutableMapping[str, Any]],
    group: Group,
    *,
    lr: float | Tensor,
    held_back: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Take torch's AdamW step on this rank's shards.

    The step is AMSGrad's if the states contain ``max_exp_avg_sq``.

    Args:
        params: The parameters, updated in place.
        grads: Gradients in the parameters' dtype. Not modified, except that the fused kernel may
            divide them by ``grad_scale`` in place.
        states: The states of the parameters, created by `init_moments`.
        group: Sets ``betas``, ``eps``, ``weight_decay``, ``cautious_decay``, ``maximize`` and
            ``fused``.
        lr: Learning rate.
        held_back: 0-dim bool: if it is True, nothing is written.
        grad_scale: 0-dim loss scale: the gradients that are passed contain this factor, and are
            divided by it here.
    """
    step = partial(_step_, lr=lr, held_back=held_back, grad_scale=grad_scale)
    if not decays_cautiously(group):
        step(params, grads, states, group)
        return
    keep = Cautious(1 - lr * group["weight_decay"])
    without_decay = partial(step, group={**group, "weight_decay": 0.0})
    for param, grad, state in zip(params, grads, states, strict=True):
        _decay_cautiously_(param, grad, state, keep, without_decay)


def _decay_cautiously_(
    param: Tensor,
    grad: Tensor,
    state: MutableMapping[str, Any],
    keep: Cautious,
    step: Callable[..., None],
) -> None:
    """Compute the step alone, in float32 or wider; then decay by its signs, and add it.

    Args:
        param: This rank's shard of the parameter.
        grad: Its gradient.
        state: Its state.
        keep: The factor of the parameter.
        step: Takes the step without decay, given lists of parameters, gradients and states.
    """
    param, grad = _with_rows(param), _with_rows(grad)
    moments = {name: _with_rows(local(state[name])) for name in MOMENTS if name in state}
    count = state["step"]
    for rows in _parts(grad):
        parts = {name: x[rows] for name, x in moments.items()}
        wide = {name: _widened(x) for name, x in parts.items()}
        counted = {**wide, "step": state["step"].clone()}
        here = _widened(grad[rows])
        moved = torch.zeros_like(here)
        step([moved], [here], [counted])
        apply_update_(param[rows], moved, keep=keep, step=1.0)
        count = counted["step"]
        for name, part in parts.items():
            if wide[name] is not part:
                part.copy_(wide[name])
    state["step"].copy_(count)


def _step_(
    params: list[Tensor],
    grads: list[Tensor],
    states: Sequence[MutableMapping[str, Any]],
    group: Group,
    *,
    lr: float | Tensor,
    held_back: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """Take the step of `descend_by_adamw_` without cautious decay, by torch's function.

    The fused kernel ignores strides. So its inputs must be dense and have the memory order of the
    parameter. Other gradients and parameters are copied in every step, other moments only once.
    """
    fused = group["fused"]
    if not fused:
        # Only the fused kernel applies ``held_back`` and ``grad_scale`` on the device.
        if held_back is not None and bool(held_back):
            return
        if grad_scale is not None:
            grads = [grad / grad_scale for grad in grads]
        held_back = grad_scale = None
    written = params
    moments = [local(state[name]) for state in states for name in MOMENTS if name in state]
    if fused and not all(x.is_contiguous() for x in (*params, *grads, *moments)):
        params = [_dense(param) for param in params]
        grads = [_in_memory_order(param, grad) for param, grad in zip(params, grads, strict=True)]
        for param, state in zip(params, states, strict=True):
            _reorder_moments(state, param)
    beta1, beta2 = group["betas"]
    maxima = [local(state["max_exp_avg_sq"]) for state in states if "max_exp_avg_sq" in state]
    adamw(
        params,
        grads,
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        maxima,
        [state["step"] for state in states],
        fused=fused,
        grad_scale=grad_scale,
        found_inf=None if held_back is None else held_back.float(),
        amsgrad=bool(maxima),
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for own, param in zip(written, params, strict=True):
        if own is not param:
            own.copy_(param)


def _descend_in_float32_(
    slot: Slot, state: MutableMapping[str, Any], key: Tensor, descend: Callable[..., None]
) -> None:
    """Take the step of a bfloat16 parameter in float32; round weights and moments stochastically.

    Args:
        slot: The parameter.
        state: Its state.
        key: Decides the random bits, 0-dim int64.
        descend: Takes the step, given lists of parameters, gradients and states.
    """
    moments = {name: state[name] for name in MOMENTS if name in state}
    stored = {name: _with_rows(local(x)) for name, x in {"param": slot.param, **moments}.items()}
    grad, step = _with_rows(local(slot.grad)), state["step"]
    first = first_entry_of(slot.param, "auto")
    row = grad[:1].numel()
    for rows in _parts(grad):
        parts = {name: x[rows] for name, x in stored.items()}
        wide = {name: x.to(torch.float32).contiguous() for name, x in parts.items()}
        counted = {**wide, "step": state["step"].clone()}
        param = counted.pop("param")
        descend([param], [grad[rows].to(torch.float32).contiguous()], [counted])
        step = counted["step"]
        for number, (name, part) in enumerate(parts.items()):
            # The weights and each moment count as different entries, with different random bits.
            entry = number * slot.param.numel() + first + rows.start * row
            part.copy_(round_to_bfloat16(wide[name], key + entry))
    state["step"].copy_(step)


def _parts(x: Tensor) -> Iterator[slice]:
    """Yield the rows that are in float32 at a time; a single empty slice if ``x`` is empty."""
    chunk = _CPU_CHUNK if x.is_cpu else _CHUNK
    rows = max(1, chunk // max(1, x[:1].numel()))
    for begin in range(0, max(1, len(x)), rows):
        yield slice(begin, begin + rows)


def _widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider, with dense rows: ``x`` itself if it has that form."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _with_rows(x: Tensor) -> Tensor:
    """Return ``x``, or a view of one entry if it has no dimensions."""
    return x.view(1) if x.dim() == 0 else x


def _dense(param: Tensor) -> Tensor:
    """Return the parameter if its entries fill a range of memory, otherwise a copy that does."""
    if are_dense(param):
        return param
    return torch.empty_like(param, memory_format=torch.preserve_format).copy_(param)


def _in_memory_order(param: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` if it has the parameter's memory order, otherwise a copy that has it."""
    if same_memory_order(param, x):
        return x
    return torch.empty_like(param, dtype=x.dtype, memory_format=torch.preserve_format).copy_(x)


def _reorder_moments(state: MutableMapping[str, Any], param: Tensor) -> None:
    """Copy moments to the parameter's memory order if they have another."""
    for name in MOMENTS:
        if name in state and not same_memory_order(param, local(state[name])):
            state[name] = from_local(state[name], _in_memory_order(param, local(state[name])))


def init_moments(
    state: MutableMapping[str, Any], param: Tensor, *, fused: bool, amsgrad: bool = False
) -> None:
    """Create the moments of a parameter, filled with zeros, if it has none.

    If the dtype of the parameter has changed, for example by ``model.bfloat16()``, its moments are
    cast, too.
    """
    if state:
        for name in MOMENTS:
            if name in state and state[name].dtype != param.dtype:
                state[name] = state[name].to(param.dtype)
        return
    # Names, shapes and devices as in torch.optim.AdamW, so that its checkpoints load here.
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu")
    for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())):
        state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
