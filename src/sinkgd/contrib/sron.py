"""SRON: descend along the gradient with its rows normalized, with no state."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sinkgd.norms import RowNorm
from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.mngd import MNGD


class SRON(MNGD):
    r"""Descend along the gradient with rows of root-mean-square 1.

    .. math::
        W \leftarrow (1 - \eta\lambda)\, W - \eta\, \sqrt{n}\, Q(G)^{-1} G

    where n is the number of columns and Q the diagonal matrix of row lengths. This update is the
    first half step of SR-Sinkhorn, and equals that of `MNGD` with only a `RowNorm`. A zero row
    stays zero; the paper adds an ε to the length instead. Without momentum, no state is kept for
    matrices.

    Args:
        params: Groups of ``param_groups(model, matrix_algorithm="mngd")``, or matrices: tensors or
            (name, tensor) pairs. Vectors are refused.
        lr: Learning rate η of the groups that do not set their own, at least 0: the
            root-mean-square change of a weight in one step. It includes the paper's factor α.
            Default: 1e-3.
        **options: The keyword options of `MNGD`.

    Raises:
        ValueError: If an option is out of range or has no effect, or a parameter is not a matrix;
            the message names the option or the parameter.
        TypeError: If an option does not exist or has the wrong type, ``params`` is a model, or a
            parameter is not real and floating.

    Examples:
        >>> import torch
        >>> from sinkgd import SRON
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = SRON([weight], lr=0.1)
        >>> (weight * torch.tensor([[3.0, 4.0], [0.0, 0.5]])).sum().backward()
        >>> optimizer.step()
        >>> weight.data.square().mean(dim=1).sqrt()
        tensor([0.1000, 0.1000])

    References:
        Wen et al., SRON: State-free LLM Training via Row-wise Gradient Normalization.
        https://openreview.net/forum?id=BtQLBWr6zI
    """

    usual_call = "SRON(param_groups(model, matrix_algorithm='mngd'))"

    @suggest_names(passes_to=MNGD)
    def __init__(self, params: ParamsT, lr: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(params, lr, [RowNorm()], 1, **options)
