"""What each parameter of a model is for, read from the types and the places of its modules.

Names are not looked at. A *block* is a module with children of its own that stands in a
``ModuleList``, a ``ModuleDict`` or, with a twin, in a ``Sequential``: a transformer's layers, the
stages of a ResNet. Linear weights inside blocks are the hidden matrices; those outside are the
model's input and output projections.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from sinkgd.optim.algorithms.layout import Split

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Reasons that others ask for.
EMBEDDING, HEAD = "embedding", "output head"
_GATES = {"LSTM": 4, "GRU": 3}


@dataclass(frozen=True)
class Role:
    """What a parameter is for.

    Attributes:
        is_matrix: Whether it is a hidden matrix, which a matrix norm fits.
        reason: Why, in words for a table.
        layout: How it is seen as matrices; see `sinkgd.optim.algorithms.layout`.
        split: Into how many matrices its rows are cut.
    """

    is_matrix: bool
    reason: str
    layout: str = "auto"
    split: Split = 1


def roles(model: nn.Module) -> list[tuple[str, Tensor, Role]]:
    """Return (name, parameter, role) for every trainable parameter, tied ones once.

    A tied parameter is a hidden matrix only if it is one in all of its places.
    """
    house = _House(model)
    found: dict[Tensor, tuple[str, Role]] = {}
    for name, param, role in house.walk():
        if param not in found:
            found[param] = (name, role)
        elif found[param][1].is_matrix and not role.is_matrix:
            found[param] = (found[param][0], role)
    return [(name, param, role) for param, (name, role) in found.items()]


class _House:
    """The modules of a model, with what has to be known before a parameter's role can be told."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.blocks = set(_block_names(model))
        self.head = _head(model) or self._last_layer()

    def walk(self) -> Iterator[tuple[str, Tensor, Role]]:
        for path, module in self.modules.items():
            for attribute, param in module.named_parameters(recurse=False, remove_duplicate=False):
                if param.requires_grad:
                    name = f"{path}.{attribute}" if path else attribute
                    yield name, param, self._role(path, module, attribute, param)

    def _last_layer(self) -> nn.Module | None:
        """Return the last of several layers, unless it is in a block."""
        layers = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, _CONVOLUTIONS) or hasattr(module, "out_features")
        ]
        path, last = layers[-1] if len(layers) > 1 else ("", None)
        return None if self._in_block(path) else last

    def _role(self, path: str, module: nn.Module, attribute: str, param: Tensor) -> Role:
        if isinstance(module, _EMBEDDINGS):
            return Role(is_matrix=False, reason=EMBEDDING)
        if module is self.head:
            return Role(is_matrix=False, reason=HEAD)
        if param.ndim < 2:
            return Role(is_matrix=False, reason="vector" if param.ndim else "scalar")
        if self._is_adapter(path):
            return Role(is_matrix=False, reason="low-rank adapter")
        role = _hidden_matrix(module, attribute, param)
        if role is None:
            kind = type(module).__name__
            return Role(is_matrix=False, reason=f"{kind} is unknown; see overrides")
        if role.is_matrix and self.blocks and not self._in_block(path):
            return Role(is_matrix=False, reason="outside the blocks")
        return role

    def _in_block(self, path: str) -> bool:
        return any(path == block or path.startswith(f"{block}.") for block in self.blocks)

    def _is_adapter(self, path: str) -> bool:
        # PEFT's layers hold lora_A and lora_B beside the base layer.
        parts = path.split(".")
        for depth in range(len(parts)):
            parent = self.modules[".".join(parts[:depth])]
            below_base = parts[depth] == "base_layer"
            if hasattr(parent, "lora_A") and hasattr(parent, "lora_B") and not below_base:
                return True
        return False


def _hidden_matrix(module: nn.Module, attribute: str, param: Tensor) -> Role | None:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        fused = attribute == "in_proj_weight"
        reason = "fused query, key and value" if fused else "attention projection"
        return Role(is_matrix=True, reason=reason, split=3 if fused else 1)
    if isinstance(module, nn.RNNBase):
        split = _GATES.get(kind.removeprefix("FSDP"), 1)
        return Role(
            is_matrix=True, reason=f"{split} gates" if split > 1 else "recurrent", split=split
        )
    if isinstance(module, _CONVOLUTIONS):
        if module.in_channels == module.groups:
            return Role(is_matrix=False, reason="depthwise convolution")
        return Role(is_matrix=True, reason="convolution", layout="flatten", split=module.groups)
    if hasattr(module, "nf") and kind.removeprefix("FSDP") == "Conv1D":  # transformers, GPT-2
        fused = param.shape[1] == 3 * param.shape[0]
        reason = (
            "fused query, key and value, stored (in, out)" if fused else "linear, stored (in, out)"
        )
        return Role(is_matrix=True, reason=reason, layout="transposed", split=3 if fused else 1)
    if param.shape == (getattr(module, "out_features", None), getattr(module, "in_features", None)):
        return Role(is_matrix=True, reason="linear")
    if param.ndim == 3 and min(param.shape) > 1:
        return Role(is_matrix=True, reason="batch of matrices, such as experts")
    return None


def _block_names(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        composite = {
            name: child for name, child in module.named_children() if any(child.children())
        }
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            chosen = list(composite)
        elif isinstance(module, nn.Sequential):
            twins = Counter(type(child) for child in composite.values())
            chosen = [name for name, child in composite.items() if twins[type(child)] > 1]
        else:
            chosen = []
        yield from (f"{path}.{name}" if path else name for name in chosen)


def _head(model: nn.Module) -> nn.Module | None:
    # The accessor that transformers' models share; a plain module has none.
    accessor = getattr(model, "get_output_embeddings", None)
    head = accessor() if callable(accessor) else None
    return head if isinstance(head, nn.Module) else None
