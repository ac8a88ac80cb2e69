"""Whether memory has room for a case: a bound from shapes alone, before anything is allocated.

Gradients, where they are released: three of the largest one, for autograd adds up what chunks of
the loss give into a third. Activations are bounded by the bytes a token that a block and the loss
hold at once; the bounds are about twice what is measured.
"""

import torch

from sinkgd.lab.bench.memory.training.case import Case, model_on_meta
from sinkgd.lab.bench.problem import available_bytes
from sinkgd.lab.models import LanguageModel
from sinkgd.lab.train.memory import state_tensors
from sinkgd.lab.train.recipes import build_optimizer
from sinkgd.optim.grouped import GroupedOptimizer

_GRADIENTS_AT_ONCE = 3
_BYTES_PER_HIDDEN, _BYTES_PER_INNER = 96, 32  # of a block, an entry of the token's vectors
_BYTES_PER_LOGIT = 20  # in bfloat16, in float32, their softmax, and the gradients of both
_PROCESS = 1 << 30  # code, and what optimizers use meanwhile, such as batches of matrices
_SPARE = 1.05  # of the whole


def why_no_room(case: Case) -> str | None:
    """Say why a case does not fit into the memory that is free now; None where it does."""
    free, needed = available_bytes(torch.device(case.device)), needed_bytes(case)
    if free is None or needed <= free:
        return None
    return f"it may need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def needed_bytes(case: Case) -> int:
    """Return a bound on the bytes that a case takes."""
    model = model_on_meta(case)
    sizes = [param.nbytes for param in model.parameters()]
    gradients = _GRADIENTS_AT_ONCE * max(sizes) if case.release else sum(sizes)
    parts = sum(sizes) + gradients + _state_bytes(model, case) + _activation_bytes(model, case)
    return int(_SPARE * parts) + _PROCESS


def _state_bytes(model: LanguageModel, case: Case) -> int:
    optimizer = build_optimizer(model, case.config.optimizer)
    if isinstance(optimizer, GroupedOptimizer):
        optimizer.init_state()
    else:  # others make theirs in a step
        for group in optimizer.param_groups:
            if "fused" in group:  # torch's, of which only the plain ones run without memory
                group.update(fused=False, foreach=False)
            elif "foreach" in group:  # pytorch-optimizer's plain ones read numbers back
                group["foreach"] = True
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()
    return sum(tensor.nbytes for tensor in state_tensors(optimizer))


def _activation_bytes(model: LanguageModel, case: Case) -> int:
    settings, sizes = case.settings, model.config
    tokens = settings.batch_size * settings.sequence_length
    block = _BYTES_PER_HIDDEN * sizes.hidden_size + _BYTES_PER_INNER * sizes.intermediate_size
    inputs = 2 * sizes.hidden_size * sizes.num_layers
    blocks = inputs + block if settings.recompute else sizes.num_layers * block
    logits = min(tokens, settings.loss_chunk_tokens) * sizes.vocab_size
    return tokens * blocks + _BYTES_PER_LOGIT * logits
