"""The gradient of all parameters as one vector: its length, and cutting it to one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sinkgd import sharded
from sinkgd.exchange import run
from sinkgd.optim.algorithms.contract import local, on_mesh

_PIECE = 1 << 22  # entries


def norm_of(grad: Tensor) -> Tensor:
    """Return the l2 norm of this rank's piece, float32; torch copies what it reads, so in parts."""
    parts = torch.split(local(grad).detach().flatten(), _PIECE)
    own = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(own))
    return whole


def joint_norm(norms: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the l2 norm of all gradients from those of this rank's pieces; a collective call.

    Args:
        norms: From `norm_of`.
        params: Whose gradients they are of; a DTensor says over which ranks its pieces lie.
    """
    if not any(map(on_mesh, params)):
        return nn.utils.get_total_norm(norms)
    squares = torch.stack(list(norms)).double().square()
    groups = [sharded.groups_of(param) if on_mesh(param) else () for param in params]
    return run(sharded.add_up(squares, groups)).sum().sqrt()


def clip_gradient(model: nn.Module, largest_norm: float) -> Tensor:
    """Scale the gradient down to ``largest_norm`` if it is longer; return its norm before."""
    params = [param for param in model.parameters() if param.grad is not None]
    gradients = [param.grad for param in params if param.grad is not None]
    if not any(map(on_mesh, params)):
        norm = nn.utils.get_total_norm(gradients)
    else:
        norm = joint_norm([norm_of(grad) for grad in gradients], params)
    if largest_norm < float("inf"):
        # As torch.nn.utils.clip_grads_with_norm_, which takes no norm besides a DTensor.
        scale = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(grad) for grad in gradients], scale)
    return norm
