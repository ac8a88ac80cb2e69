"""SCALE: row-normalized gradients, with momentum for the output head only."""

import re
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sinkgd.norms import RowNorm
from sinkgd.number_check import check_betas, check_decay_rate, check_number
from sinkgd.optim.arguments import suggest_names
from sinkgd.optim.mngd import MNGD
from sinkgd.optim.overrides import Overrides, check_overrides, matches
from sinkgd.optim.param_groups import check_model, param_groups
from sinkgd.optim.roles import EMBEDDING, HEAD, roles

_OF_SCALE_GROUPS = {name: f"scale_groups(model, {name}=...)" for name in ("betas", "overrides")}


class SCALE(MNGD):
    r"""Step along the row-normalized gradient; the output head's gradient is averaged first.

    .. math::
        W \leftarrow (1 - \eta\lambda)\, W - \eta\, \sqrt{n}\, Q(D)^{-1} D

    where D is the gradient G or, for the output head, its average B ← μB + (1 − μ)G. D has n
    columns, and Q(D) is the diagonal matrix of its row lengths. A column in the paper holds the
    weights of one output. In torch that is a row of a linear weight, but a column of an embedding,
    which is stored transposed. So `scale_groups` normalizes the columns of embeddings. State: one
    float32 per entry of the head, and two numbers per entry of the parameters that AdamW updates,
    such as vectors.

    Args:
        params: Groups from `scale_groups`; or matrices, as tensors or (name, tensor) pairs, which
            have no momentum unless ``momentum`` is given. Plain vectors are refused.
        lr: Learning rate η of the groups that do not set their own, at least 0: the
            root-mean-square change of a weight in one step. Default: 1e-3.
        **options: The keyword options of `MNGD`.

    Raises:
        ValueError: If an option is out of range or has no effect, or a parameter is not a matrix;
            the message names the option or the parameter.
        TypeError: If an option does not exist or has the wrong type, ``params`` is a model, or a
            parameter is not real and floating.

    Examples:
        >>> import torch, sinkgd
        >>> layers = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 7)
        >>> model = torch.nn.Sequential(*layers)
        >>> optimizer = sinkgd.SCALE(sinkgd.scale_groups(model))
        >>> model(torch.tensor([1, 2])).logsumexp(dim=1).sum().backward()
        >>> optimizer.step()
        >>> [list(optimizer.state[layer.weight]) for layer in layers]
        [[], [], ['momentum_buffer']]

    References:
        Glentis et al., A Minimalist Optimizer Design for LLM Pretraining.
        https://arxiv.org/abs/2506.16659
    """

    usual_call = "SCALE(scale_groups(model))"

    @suggest_names(_OF_SCALE_GROUPS, passes_to=MNGD)
    def __init__(self, params: ParamsT, lr: float | Tensor | None = None, **options: Any) -> None:
        super().__init__(params, lr, [RowNorm()], 1, **options)


@suggest_names({})
def scale_groups(
    model: nn.Module,
    lr: float = 1e-3,
    momentum: float = 0.9,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    overrides: Overrides | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into groups for `SCALE`.

    Hidden matrices, embeddings and the output head are normalized at ``lr``, the head with
    ``momentum``; all other parameters go to AdamW at ``lr``. A weight that is embedding and head
    counts as the one that comes first in the model, usually the embedding.

    Args:
        model: The model, before or after FSDP2. Frozen parameters are left out, as in
            `param_groups`.
        lr: Learning rate. The paper uses 1e-3 for models of 60M to 350M parameters.
        momentum: Decay rate μ of the head's average. The paper uses 0.9.
        weight_decay: As for `param_groups`: embeddings, the head, vectors and scalars do not decay.
            The paper uses none.
        betas: AdamW's decay rates of the two moments.
        overrides: As for `param_groups`; they take precedence.

    Returns:
        Groups of (name, parameter) pairs.

    Raises:
        TypeError: If an argument has the wrong type, as in `param_groups`.
        ValueError: If an argument is out of range, as in `param_groups`.
    """
    check_model(model, "scale_groups")
    check_number("lr", lr)
    check_betas("betas", betas)
    check_decay_rate("momentum", momentum)
    check_overrides(overrides)
    own: dict[str, Any] = {
        EMBEDDING: {"algorithm": "mngd", "layout": "transposed"},
        HEAD: {"algorithm": "mngd", "momentum": momentum},
    }
    routes = dict(overrides or {})
    for name, param, role in roles(model):
        is_free = not any(matches(pattern, name) for pattern in overrides or {})
        if is_free and role.reason in own and param.ndim == 2:
            routes[f"^{re.escape(name)}$"] = own[role.reason]
    return param_groups(
        model,
        lr,
        1.0,
        matrix_algorithm="mngd",
        weight_decay=weight_decay,
        betas=betas,
        overrides=routes,
    )
