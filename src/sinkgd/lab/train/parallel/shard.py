"""A model in pieces: tensor parallelism first, then FSDP2, which divides what the first leaves.

FSDP2 divides any model; tensor parallelism knows the blocks of a LLaMA.

Shapes, everywhere in this file:
    b: sequences in the batch
    t: tokens in a sequence
    h: hidden size

Between blocks each rank of a tp group holds the hidden states of t/tp of the tokens, so that norms
and sums are divided, too (Korthikanti et al., https://arxiv.org/abs/2205.05198).
"""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from sinkgd.lab.models import LanguageModel, Llama
from sinkgd.lab.train.config import ConfigError
from sinkgd.lab.train.parallel.mesh import Mesh

_TOKENS = Shard(1)  # of (b, t, h)


def shard_model(model: LanguageModel, mesh: Mesh) -> None:
    """Divide a model among the ranks, in place; a process that is alone keeps it whole.

    Args:
        model: On the meta device: its weights are drawn when each rank has its pieces.
        mesh: Which ranks share what.

    Raises:
        ConfigError: If heads or tokens cannot be divided by tp, or tp does not know the model.
    """
    if mesh.grid is None:
        return
    if mesh.grid["tp"].size() > 1:
        if not isinstance(model, Llama):
            raise ConfigError(
                f"mesh.tp is {mesh.grid['tp'].size()}, but only a LLaMA can be divided so, and the "
                f"model is a {type(model).__name__}; use mesh.tp 1 and mesh.dp_shard"
            )
        _check_divisible(model, mesh.grid["tp"].size())
        _divide_matrices(model, mesh.grid["tp"])
    for layer in model.blocks:
        fully_shard(layer, mesh=mesh.data)
    fully_shard(model, mesh=mesh.data)


def _check_divisible(model: Llama, ranks: int) -> None:
    config = model.config
    for what, size in (
        ("attention heads", config.num_heads),
        ("tokens of a sequence", config.max_sequence_length),
    ):
        if size % ranks:
            raise ConfigError(
                f"mesh.tp is {ranks}, which does not divide the {size} {what}; use a divisor of it"
            )


def _divide_matrices(model: Llama, ranks: DeviceMesh) -> None:
    parallelize_module(
        model,
        ranks,
        {
            "model": PrepareModuleOutput(
                output_layouts=_TOKENS, desired_output_layouts=Replicate()
            ),
            "model.embed_tokens": RowwiseParallel(
                input_layouts=Replicate(), output_layouts=_TOKENS
            ),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        },
    )
    for layer in model.model.layers:
        parallelize_module(layer, ranks, _block())


def _block() -> dict[str, ParallelStyle]:
    """Return how a block is divided: matrices that read all tokens by rows, then by columns."""
    # A width that ranks do not divide, such as 5461, must travel with its true size.
    inner = ColwiseParallel(use_local_output=False)
    return {
        "input_layernorm": SequenceParallel(),
        "self_attn": _gather_tokens(2),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=_TOKENS),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": _gather_tokens(1),
        "mlp.gate_proj": inner,
        "mlp.up_proj": inner,
        "mlp.down_proj": RowwiseParallel(output_layouts=_TOKENS),
    }


def _gather_tokens(inputs: int) -> PrepareModuleInput:
    """Give a module all tokens; of its inputs only the first has any."""
    others = (None,) * (inputs - 1)
    return PrepareModuleInput(
        input_layouts=(_TOKENS, *others), desired_input_layouts=(Replicate(), *others)
    )
