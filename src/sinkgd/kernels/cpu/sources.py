"""What the compiled loops read and write; see `sinkgd.kernels.cpu.backend` for what they do not."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sinkgd.kernels.cpu.form import DTYPES, Form, form_of
from sinkgd.kernels.layout import aligned, dense


class Source(NamedTuple):
    """A gradient as the loops read it."""

    tensor: Tensor
    form: Form


def readable(grad: Tensor) -> Source | None:
    """Return what the loops can read of ``grad``; None where `EagerBackend` must."""
    if grad.requires_grad and torch.is_grad_enabled():
        return None
    form = form_of(grad)
    if form is not None:
        return Source(grad, form)
    if type(grad) not in (Tensor, Parameter) or not grad.is_cpu or grad.numel() == 0:
        return None
    if grad.dtype == torch.float16:
        return with_form(dense(grad.float()))
    return with_form(dense(grad)) if grad.dtype in DTYPES else None


def beside(grad: Tensor, param: Tensor, form: Form) -> Source | None:
    """Return ``grad`` as it is read beside ``param``; None where `EagerBackend` must."""
    own = form_of(grad)
    if own is not None and own.turned == form.turned and param.shape == grad.shape:
        return Source(grad, own)
    if type(grad) not in (Tensor, Parameter) or not grad.is_cpu or param.shape != grad.shape:
        return None
    return with_form(aligned(grad, param)) if grad.dtype in DTYPES else None


def with_form(x: Tensor) -> Source:
    """Return a tensor that is known to be dense."""
    form = form_of(x)
    assert form is not None, f"strides {x.stride()}"
    return Source(x, form)


def writable(param: Tensor) -> Form | None:
    """Return the form by which the loops write ``param``; None where `EagerBackend` must."""
    form = form_of(param)
    if form is None or not form.may_be_written or (param.requires_grad and torch.is_grad_enabled()):
        return None
    return form
