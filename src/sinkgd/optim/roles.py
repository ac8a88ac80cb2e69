"""The role of each parameter of a model, read from the types and the places of its modules.

The names that a model gives to its modules are not used. A *block* is a module that has children,
and that is a member of a ``ModuleList``, of a ``ModuleDict`` or, if another member has the same
type, of a ``Sequential``: the layers of a transformer, the stages of a ResNet. Linear and
convolution weights inside blocks are the hidden matrices. Those outside are the model's input and
output projections. If a model has no blocks, all such weights except those of the output head are
hidden matrices. A list of output heads is not a list of blocks.

Experts are hidden matrices: a list of modules, or one weight with the matrices of all experts. The
router beside them, a linear module with one output for each expert, is not a hidden matrix: its
outputs are scores that compete, like those of an output head.

Wrappers (``torch.compile``, activation checkpointing, DDP, PEFT's layers, Lightning Fabric) and
parametrizations are ignored: a parameter has the role that it would have without them. Further
names of a module, such as ``self.first = self.layers[0]``, are ignored, too.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from sinkgd.matrix_views import Split

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Reasons that other modules look for.
EMBEDDING, HEAD = "embedding", "output head"
ADAPTER, ROUTER = "low-rank adapter", "router of experts"

# Where wrappers keep the module that they wrap: torch.compile, activation checkpointing, FSDP1,
# DataParallel and DistributedDataParallel, PEFT's layers, PEFT's ``modules_to_save``, Lightning
# Fabric, which keeps the module twice: as its strategy wraps it, and as it was.
_WRAPPED = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "module",
    "base_layer",
    "original_module",
    "_forward_module",
)
_WRAPPER_OF_MODULE = ("DataParallel", "DistributedDataParallel")  # "module" is a common name
# Experts of transformers that are stored (experts, in, out), but have no attribute that says so.
_STORED_IN_OUT = ("Llama4TextExperts",)
# What wrappers put before the name of a module: torch.compile, DistributedDataParallel and
# DataParallel, FullyShardedDataParallel, torch's checkpoint_wrapper, and Lightning Fabric.
_NAME_PREFIXES = {
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_original_module"),
}
# Below this child, torch.nn.utils.parametrize keeps the tensors from which it computes a parameter.
_PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.(\w+)$")


@dataclass(frozen=True)
class Role:
    """What a parameter is for.

    Attributes:
        is_matrix: Whether it is a hidden matrix, which a matrix method updates.
        reason: Why, in words for a table.
        layout: How it is viewed as matrices; see `sinkgd.matrix_views`.
        split: Into how many matrices its rows are cut.
    """

    is_matrix: bool
    reason: str
    layout: str = "auto"
    split: Split = 1


class _Place(NamedTuple):
    """A module and its path in the model."""

    path: str
    module: nn.Module

    def child(self, name: str) -> "_Place":
        path = f"{self.path}.{name}" if self.path else name
        return _Place(path, self.module.get_submodule(name))


def roles(model: nn.Module) -> list[tuple[str, Tensor, Role]]:
    """Return (name, parameter, role) for every trainable parameter; tied parameters occur once.

    A tied parameter is a hidden matrix only if all of its places are those of a hidden matrix.
    """
    modules = _Modules(model)
    found: dict[Tensor, tuple[str, Role]] = {}
    for name, param, role in modules.walk():
        if param not in found:
            found[param] = (name, role)
        elif found[param][1].is_matrix and not role.is_matrix:
            found[param] = (found[param][0], role)
    return [(name, param, role) for param, (name, role) in found.items()]


def without_wrappers(name: str) -> str:
    """Return the name that a parameter has in the model without wrappers.

    Examples:
        >>> without_wrappers("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
        'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _NAME_PREFIXES)


class _Modules:
    """The modules of a model, and what decides on the roles of their parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        places = list(_places(_Place("", model)))
        self.read = _widths_that_are_read(places)
        self.blocks = {block.module for place in places for block in self._blocks_in(place)}
        self.heads = _heads(model) or self._last_layer(places)
        self.routers = [router for place in places for router in _routers(place)]

    def walk(self) -> Iterator[tuple[str, Tensor, Role]]:
        for path, module in self.modules.items():
            for attribute, param in module.named_parameters(recurse=False, remove_duplicate=False):
                if param.requires_grad:
                    name = f"{path}.{attribute}" if path else attribute
                    yield name, param, self._role(path, module, attribute, param)

    def _blocks_in(self, place: _Place) -> Iterator[_Place]:
        """Yield the children of a container that are blocks."""
        composite = [child for child in _children(place) if any(_children(_unwrapped(child)[0]))]
        if isinstance(place.module, nn.Sequential):
            twins = Counter(type(_unwrapped(child)[0].module) for child in composite)
            composite = [c for c in composite if twins[type(_unwrapped(c)[0].module)] > 1]
        elif not isinstance(place.module, nn.ModuleList | nn.ModuleDict):
            return
        yield from (child for child in composite if not self._ends_in_a_head(child))

    def _ends_in_a_head(self, child: _Place) -> bool:
        """Whether a member of a list is an output head, as in Medusa, or in DETR for boxes.

        A head has no normalization, and the output width of its last linear is not the input width
        of any module of the model.
        """
        inside = [place.module for place in _places(child)]
        linears = [module for module in inside if hasattr(module, "out_features")]
        if not linears or any(map(_is_normalization, inside)):
            return False
        return linears[-1].out_features not in self.read

    def _last_layer(self, places: list[_Place]) -> list[nn.Module]:
        """List the last linear or convolution; nothing if it is the only one, or is in a block."""
        layers = [
            place
            for place in places
            if isinstance(place.module, _CONVOLUTIONS) or hasattr(place.module, "out_features")
        ]
        if len({layer.module for layer in layers}) < 2 or self._in_block(layers[-1].path):
            return []
        return [layers[-1].module]

    def _role(self, path: str, module: nn.Module, attribute: str, param: Tensor) -> Role:
        path, module, attribute, is_gain = self._seen_through(path, module, attribute)
        if isinstance(module, _EMBEDDINGS):
            return Role(is_matrix=False, reason=EMBEDDING)
        if any(module is head for head in self.heads):
            return Role(is_matrix=False, reason=HEAD)
        if param.ndim < 2:
            return Role(is_matrix=False, reason="vector" if param.ndim else "scalar")
        if any(module is router for router in self.routers):
            return Role(is_matrix=False, reason=ROUTER)
        if is_gain:
            return Role(is_matrix=False, reason="gain of a weight norm")
        if self._is_adapter(path):
            return Role(is_matrix=False, reason=ADAPTER)
        role = _hidden_matrix(module, attribute, param)
        if role.is_matrix and self.blocks and not self._in_block(path):
            return Role(is_matrix=False, reason="outside the blocks")
        return role

    def _seen_through(
        self, path: str, module: nn.Module, attribute: str
    ) -> tuple[str, nn.Module, str, bool]:
        """Return the path, module and attribute of a weight, and whether the parameter is its gain.

        A parametrized weight is computed from tensors in ``parametrizations.weight``: an original
        of the same shape or, with a weight norm, a gain and a direction. The older `weight_norm`
        and `spectral_norm` of ``torch.nn.utils`` keep these tensors next to the weight.
        """
        if match := _PARAMETRIZED.search(path):
            owner = path[: match.start()]
            is_gain = attribute == "original0"
            return owner, self.modules[owner], match[1], is_gain
        if isinstance(module, nn.ParameterList | nn.ParameterDict):
            owner, _, name = path.rpartition(".")
            return owner, self.modules[owner], name, False
        stem, _, suffix = attribute.rpartition("_")
        own = dict(module.named_parameters(recurse=False))
        if suffix in ("g", "v") and f"{stem}_g" in own and f"{stem}_v" in own:
            return path, module, stem, suffix == "g"
        if suffix == "orig" and hasattr(module, f"{stem}_u"):
            return path, module, stem, False
        return path, module, attribute, False

    def _in_block(self, path: str) -> bool:
        parts = path.split(".") if path else []
        ends = range(1, len(parts) + 1)
        return any(self.modules[".".join(parts[:end])] in self.blocks for end in ends)

    def _is_adapter(self, path: str) -> bool:
        # All of PEFT's methods, such as LoRA, keep the trained parameters next to the base layer.
        if _wraps_base_layer(self.modules[path]):
            return True
        parts = path.split(".")
        for depth in range(len(parts)):
            parent = self.modules[".".join(parts[:depth])]
            if (_has_lora(parent) or _wraps_base_layer(parent)) and parts[depth] != "base_layer":
                return True
        return False


def _has_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "lora_B")


def _wraps_base_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT around another; many modules have a "base_layer"."""
    is_tuner = _has_lora(module) or hasattr(module, "adapter_layer_names")
    return is_tuner and isinstance(getattr(module, "base_layer", None), nn.Module)


def _unwrapped(place: _Place) -> list[_Place]:
    """Return all copies of the module that a wrapper wraps; other modules are returned as is."""
    module = place.module
    children = dict(_named_children(module))
    for name in _WRAPPED:
        if name not in children or (name == "module" and not _is_data_parallel(module)):
            continue
        if name == "base_layer" and not _wraps_base_layer(module):
            continue
        copies = [name]
        if name == "_forward_module" and "_original_module" in children:
            copies.append("_original_module")
        saved = children.get("modules_to_save")
        if name == "original_module" and isinstance(saved, nn.ModuleDict):
            copies += [f"modules_to_save.{adapter}" for adapter in saved]
        return [inner for copy in copies for inner in _unwrapped(place.child(copy))]
    return [place]


def _is_data_parallel(module: nn.Module) -> bool:
    return any(kind.__name__ in _WRAPPER_OF_MODULE for kind in type(module).__mro__)


def _children(place: _Place) -> Iterator[_Place]:
    """Yield the children of a module that is not a wrapper, except its parametrizations."""
    for name, _ in _named_children(place.module):
        if name != "parametrizations":
            yield place.child(name)


def _named_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a module; unlike in torch, a child with two names comes twice."""
    for name, child in module._modules.items():
        if child is not None:
            yield name, child


def _places(place: _Place) -> Iterator[_Place]:
    """Yield ``place`` and all modules below it, except wrappers, each path once, in order."""
    for inner in _unwrapped(place):
        yield inner
        for child in _children(inner):
            yield from _places(child)


def _routers(place: _Place) -> Iterator[nn.Module]:
    """Yield the linear modules beside experts that have one output for each expert.

    The router may also be inside a module beside the experts, as its only linear module.
    """
    children = [inner for child in _children(place) for inner in _unwrapped(child)]
    counts = {_count_of_experts(inner.module) for inner in (place, *children)} - {0, 1}
    for child in children if counts else ():
        linears = [
            *{own.module: 0 for own in _places(child) if hasattr(own.module, "out_features")}
        ]
        if len(linears) == 1 and any(linears[0].out_features == count for count in counts):
            yield linears[0]


def _count_of_experts(module: nn.Module) -> int:
    """Return how many experts a module has: members that are alike, or a batch of matrices."""
    if isinstance(module, nn.ModuleList):
        alike = len({type(member) for member in module}) == 1
        return len(module) if alike and [*module.parameters()] else 0
    if _is_stock(module):
        return 0
    batches = (p for p in module.parameters(recurse=False) if p.ndim == 3 and _is_batch(module, p))
    return next((len(param) for param in batches), 0)


def _is_normalization(module: nn.Module) -> bool:
    """Whether a module has no children, and only vectors as parameters, such as a norm's gain."""
    params = list(module.parameters(recurse=False))
    return bool(params) and all(p.ndim < 2 for p in params) and not any(module.children())


def _widths_that_are_read(places: list[_Place]) -> set[int]:
    """Return the numbers of features that linears, convolutions and norms of a model take."""
    widths = set()
    for _, module in places:
        widths |= {getattr(module, name, 0) for name in ("in_features", "in_channels")}
        if _is_normalization(module):
            widths |= {param.numel() for param in module.parameters(recurse=False)}
    return widths - {0, 1}


def _heads(model: nn.Module) -> list[nn.Module]:
    # The accessor that transformers' models share; a plain module has none.
    accessor = getattr(model, "get_output_embeddings", None)
    head = accessor() if callable(accessor) else None
    if not isinstance(head, nn.Module):
        return []
    return [place.module for place in _unwrapped(_Place("", head))]


def _hidden_matrix(module: nn.Module, attribute: str, param: Tensor) -> Role:
    """Return the role of a parameter of two dimensions or more, wherever its module is."""
    role = _by_type(module, attribute, param)
    if role is None:
        kind = type(module).__name__
        return Role(is_matrix=False, reason=f"{kind} is no known layer; see overrides")
    if role.is_matrix and param.ndim == 2 and 1 in param.shape:
        return Role(is_matrix=False, reason="a single row or column")
    return role


def _by_type(module: nn.Module, attribute: str, param: Tensor) -> Role | None:
    if isinstance(module, nn.MultiheadAttention):
        return _of_attention(attribute)
    if isinstance(module, nn.RNNBase):
        return _of_recurrent(module, attribute)
    if isinstance(module, _CONVOLUTIONS):
        return _of_convolution(module, attribute)
    if hasattr(module, "nf") and type(module).__name__.removeprefix("FSDP") == "Conv1D":
        # transformers' linear of GPT-2
        fused = param.shape[1] == 3 * param.shape[0]
        kind = "fused query, key and value" if fused else "linear"
        reason = f"{kind}, stored (in, out)"
        return Role(is_matrix=True, reason=reason, layout="transposed", split=3 if fused else 1)
    if param.shape == (getattr(module, "out_features", None), getattr(module, "in_features", None)):
        return Role(is_matrix=True, reason="linear")
    if param.ndim == 3 and _is_batch(module, param) and not _is_stock(module):
        # transformers' experts set this attribute if weights are stored (experts, in, out).
        is_transposed = bool(getattr(module, "is_transposed", False)) or _is_stored_in_out(module)
        layout = "transposed" if is_transposed else "auto"
        reason = "batch of matrices, such as experts"
        reason += ", stored (in, out)" if is_transposed else ""
        return Role(is_matrix=True, reason=reason, layout=layout)
    return None


def _is_stored_in_out(module: nn.Module) -> bool:
    return any(kind.__name__ in _STORED_IN_OUT for kind in type(module).__mro__)


def _is_batch(module: nn.Module, param: Tensor) -> bool:
    """Whether a parameter of three dimensions looks like a stack of matrices, such as experts.

    A stack has at most as many experts as features, and all weights of three dimensions in a module
    have the same number of experts. So the weights of XLNet's attention are no stacks: their shapes
    are (features, heads, features of a head) and (segments, heads, ...).
    """
    count, *sides = param.shape
    others = [own for own in module.parameters(recurse=False) if own.ndim == 3]
    counts = {own.shape[0] for own in others if min(own.shape) > 1}
    return min(param.shape) > 1 and count <= min(sides) and counts <= {count}


def _of_attention(attribute: str) -> Role | None:
    if attribute in ("bias_k", "bias_v"):
        return Role(is_matrix=False, reason="bias")
    fused = attribute == "in_proj_weight"
    reason = "fused query, key and value" if fused else "attention projection"
    return Role(is_matrix=True, reason=reason, split=3 if fused else 1)


def _of_recurrent(module: nn.RNNBase, attribute: str) -> Role | None:
    if attribute.startswith("weight_hr"):  # of an LSTM with proj_size
        return Role(is_matrix=True, reason="recurrent projection")
    gates = 4 if isinstance(module, nn.LSTM) else 3 if isinstance(module, nn.GRU) else 1
    reason = f"{gates} gates" if gates > 1 else "recurrent"
    return Role(is_matrix=True, reason=reason, split=gates)


def _of_convolution(module: nn.modules.conv._ConvNd, attribute: str) -> Role | None:
    if attribute != "weight":
        return None
    if module.in_channels == module.groups > 1:
        return Role(is_matrix=False, reason="depthwise convolution")
    return Role(is_matrix=True, reason="convolution", layout="flatten", split=module.groups)


def _is_stock(module: nn.Module) -> bool:
    """Whether a module's class is, or derives from, a class of torch.nn, except containers."""
    return any(
        kind.__module__.startswith("torch.nn.modules.") and not issubclass(kind, _CONTAINERS)
        for kind in type(module).__mro__
        if kind is not nn.Module
    )
