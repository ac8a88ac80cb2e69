"""AdamW with moments of one byte per entry, computed by the kernels of bitsandbytes.

It is a method for embeddings, the output head and other parameters that SinkGD leaves to AdamW:
``param_groups(model, state_bits=8)``.

A moment of at least 4,096 entries is stored in blocks of 256, in row-major order. For each block
its largest absolute value is stored in float32, and for each entry one of 256 fractions of that
value. The fractions are closer together near zero. A step decodes both moments to float32, takes
AdamW's step, and encodes them again.
"""

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from sinkgd.distributed.shards import is_dtensor
from sinkgd.exchange import Computation, immediate, run
from sinkgd.kernels.eager import apply_update_
from sinkgd.optim.apply import allowed, decay_factor, decays_cautiously, learning_rate
from sinkgd.optim.method import Context, Group, Slot, are_finite
from sinkgd.optim.methods.adamw import AdamW, check_averages, refuse_other_dtype

# Sizes in bitsandbytes: the entries of a block, and those of the smallest tensor whose moments are
# stored in 8 bits.
BLOCK = 256
MIN_8BIT_SIZE = 4096

# The number of entries that are updated at a time, unless a tensor is updated as a whole. On a CPU
# bitsandbytes makes about six float32 copies of these entries, 24 MiB. On every device, cautious
# decay needs two float32 numbers for each of them.
CPU_ENTRIES = 1 << 20


class AdamW8bit(AdamW):
    """The method ``adamw-8bit``: AdamW with both moments in 8 bits.

    State: two bytes per entry, and two float32 per block of 256; as in bitsandbytes, tensors below
    4,096 entries keep two float32 per entry. Without ``cautious_decay``, the step is that of
    ``bitsandbytes.optim.AdamW8bit``, bit for bit. On a GPU a step waits for the device, to read
    which gradients are finite. Only parameters with a non-finite gradient are left unchanged, not
    their whole group.

    Names in the state: ``state1`` and ``state2``, the moments; ``absmax1`` and ``absmax2``, the
    largest absolute values in their blocks; ``step``. The first four names are those of
    bitsandbytes.

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization.
        https://arxiv.org/abs/2110.02861
    """

    options = MappingProxyType[str, object]({"betas": (0.9, 0.999), "eps": 1e-8})

    def check(self, name: str, param: Tensor, group: Group) -> None:
        """Refuse options out of range, and parameters that bitsandbytes cannot take.

        Raises:
            ImportError: If bitsandbytes is not installed.
            TypeError: If the parameter is a DTensor, or is not float32, bfloat16 or float16.
            ValueError: If an option is out of range.
        """
        check_averages(group)
        if is_dtensor(param):
            raise TypeError(
                f"{name!r} is on a mesh ({param.placements}), and the blocks of 8-bit moments "
                "cannot be sharded; give it to 'adamw', or leave out state_bits=8"
            )
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name!r} is {param.dtype}, and bitsandbytes computes in float32; give it to "
                "'adamw', or leave out state_bits=8"
            )
        _functional()

    def init_state(self, param: Tensor, group: Group, state: MutableMapping[str, Any]) -> None:
        """Create both moments, filled with zeros, if there are none."""
        del group
        if state:
            return
        # On the host, since bitsandbytes takes it as a number.
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        is_small = param.numel() < MIN_8BIT_SIZE
        dtype = torch.float32 if is_small else torch.uint8
        for number in "12":
            state[f"state{number}"] = torch.zeros(param.shape, dtype=dtype, device=param.device)
            if not is_small:
                blocks = math.ceil(param.numel() / BLOCK)
                absmax = torch.zeros(blocks, dtype=torch.float32, device=param.device)
                state[f"absmax{number}"] = absmax

    def check_other_dtype(self, name: str, param: Tensor, grad: Tensor, group: Group) -> None:
        """Refuse the gradient: on a GPU bitsandbytes would write beyond the end of the weights."""
        del group
        refuse_other_dtype(name, param, grad)

    def step(self, slots: Sequence[Slot], group: Group, context: Context) -> Computation[Tensor]:
        """Check the gradients, then update the parameters one by one."""
        finite = run(are_finite(slots))
        self._update_(slots, finite, group, context)
        return immediate(finite)

    @_disable_dynamo  # each number that it reads from a tensor would break the graph
    def _update_(
        self, slots: Sequence[Slot], finite: Tensor, group: Group, context: Context
    ) -> None:
        flags = allowed(finite, context)
        may_write = [True] * len(slots) if flags is None else flags.tolist()
        for slot, is_allowed in zip(slots, may_write, strict=True):
            state = context.states[slot.param]
            self.init_state(slot.param, group, state)
            if is_allowed:
                _descend_(slot.param, slot.grad, state, group, context.loss_scale)

    def adopt(
        self, param: Tensor, group: Group, saved: Mapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Return the state of a parameter that torch's AdamW has updated: its moments, encoded."""
        state: dict[str, Any] = {}
        self.init_state(param, group, state)
        state["step"].fill_(float(saved["step"]))
        for number, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            moment = saved[name].to(device=param.device, dtype=torch.float32).contiguous()
            if f"absmax{number}" in state:
                code = _code(number, param.device)
                moment, absmax = torch.ops.bitsandbytes.quantize_blockwise(moment, code, BLOCK)
                state[f"absmax{number}"].copy_(absmax)
            state[f"state{number}"].copy_(moment)
        return state


def _functional() -> Any:
    """Import bitsandbytes. The first call takes half a second.

    Raises:
        ImportError: If the import fails. The message gives the command that installs bitsandbytes.
    """
    try:
        import bitsandbytes.functional  # noqa: PLC0415 - optional, and slow to import
    except ImportError as error:
        raise ImportError(
            "the algorithm 'adamw-8bit' (state_bits=8) runs on bitsandbytes, which cannot be "
            f"imported ({error}); in a clone of the repository, run: pip install '.[8bit]', or "
            "leave out state_bits=8"
        ) from error
    return bitsandbytes.functional


_CODES: dict[tuple[str, torch.device], Tensor] = {}


def _code(number: str, device: torch.device) -> Tensor:
    """Return the 256 fractions of a moment on a device; those of moment ``"1"`` have signs."""
    key = number, device
    if key not in _CODES:
        with torch.device("cpu"):  # bitsandbytes makes the fractions on the default device
            code = _functional().create_dynamic_map(signed=number == "1")
        _CODES[key] = code.to(device)
    return _CODES[key]


def _descend_(
    param: Tensor,
    grad: Tensor,
    state: MutableMapping[str, Any],
    group: Group,
    loss_scale: Tensor | None,
) -> None:
    """Take a step of one parameter."""
    state["step"] = state["step"].to("cpu") + 1  # reading a checkpoint may have moved it
    written = param.detach().contiguous()
    is_cautious = decays_cautiously(group)
    numbers = {
        "beta1": group["betas"][0],
        "beta2": group["betas"][1],
        "eps": group["eps"],
        "weight_decay": 0.0 if is_cautious else group["weight_decay"],
        "lr": float(learning_rate(group)),
        "step": int(state["step"]),
        "gnorm_scale": -1.0 if group["maximize"] else 1.0,  # a factor of the gradient
    }
    flat, flat_grad = written.view(-1), grad.contiguous().view(-1)
    for entries, blocks in _parts(param, is_whole=not (param.is_cpu or is_cautious)):
        own_grad = flat_grad[entries]
        if loss_scale is not None:
            own_grad = own_grad / loss_scale
        if not is_cautious:
            _update_entries_(flat[entries], own_grad, state, entries, blocks, numbers)
            continue
        moved = torch.zeros_like(own_grad, dtype=torch.float32)  # the step from zero
        _update_entries_(moved, own_grad.float(), state, entries, blocks, numbers)
        apply_update_(flat[entries], moved, keep=decay_factor(group), step=1.0)
    if written.data_ptr() != param.data_ptr():
        param.copy_(written)


def _parts(param: Tensor, *, is_whole: bool) -> Iterator[tuple[slice, slice]]:
    """Yield slices: the entries that are updated together, and their blocks."""
    size = param.numel() if is_whole else CPU_ENTRIES
    for start in range(0, param.numel(), size):
        end = min(start + size, param.numel())
        yield slice(start, end), slice(start // BLOCK, math.ceil(end / BLOCK))


def _update_entries_(
    param: Tensor,
    grad: Tensor,
    state: MutableMapping[str, Any],
    entries: slice,
    blocks: slice,
    numbers: Mapping[str, Any],
) -> None:
    """Call bitsandbytes for some entries of a parameter, which make up whole blocks."""
    functional = _functional()
    first, second = (state[name].view(-1)[entries] for name in ("state1", "state2"))
    if "absmax1" not in state:
        functional.optimizer_update_32bit("adam", grad, param, first, state2=second, **numbers)
        return
    functional.optimizer_update_8bit_blockwise(
        "adam",
        grad,
        param,
        first,
        second,
        beta3=0.0,  # other optimizers of bitsandbytes use it and alpha
        alpha=0.0,
        qmap1=_code("1", param.device),
        qmap2=_code("2", param.device),
        absmax1=state["absmax1"][blocks],
        absmax2=state["absmax2"][blocks],
        **numbers,
    )
