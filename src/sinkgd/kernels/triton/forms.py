"""What a step's launches depend on, of its tensors: all but their addresses.

It is looked up in every step, for every tensor, so it is made of what torch has at hand.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

Form = tuple[Hashable, ...]


def form_of(tensors: Sequence[Tensor | None]) -> tuple[Form, list[int]] | None:
    """Return the form of tensors, and their addresses, 0 for None.

    None where some tensor is of a subclass, which may have no address.
    """
    form: list[Hashable] = [torch.is_grad_enabled()]
    addresses = []
    for x in tensors:
        if x is None:
            form.append(None)
            addresses.append(0)
            continue
        if type(x) is not Tensor and type(x) is not Parameter:
            return None
        at = x.data_ptr()
        addresses.append(at)
        form.append((x.shape, x.stride(), x.dtype, x.device, at % 16, x.requires_grad))
    return tuple(form), addresses
