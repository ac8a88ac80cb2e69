"""Architectures that a plan can take: our LLaMA presets, published LLaMAs, a ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sinkgd.lab.disk import parse_json
from sinkgd.lab.models import LLAMAS, PRESETS, LlamaConfig, ModelError
from sinkgd.lab.options import LARGEST_COUNT, suggest

_MOST_LAYERS = 10_000  # a limit, because a plan builds every layer, though without weights
# Families of Hugging Face configurations with the blocks of a LLaMA, and whether their query, key
# and value projections have biases: transformers/models/{llama,mistral,qwen2}.
_FAMILIES = MappingProxyType({"llama": False, "mistral": False, "qwen2": True})
# Number of key-value heads in these families if the configuration does not mention it. In the other
# families it is then the number of all heads.
_KV_HEADS = MappingProxyType({"mistral": 8, "qwen2": 32})


@dataclass(frozen=True)
class Architecture:
    """The sizes of a LLaMA, which may share keys and values among heads.

    Raises:
        ModelError: If a size is not positive, key-value heads do not divide the heads, or
            ``head_size`` is odd.
    """

    name: str
    vocab_size: int  # tokens
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width inside the MLP
    num_layers: int
    num_heads: int
    num_kv_heads: int  # heads of keys and values; each serves the same number of query heads
    head_size: int  # features of a head, even
    tied: bool = False  # whether the output head is the embedding
    qkv_bias: bool = False  # whether the maps to queries, keys and values have biases
    source: str = ""  # where the sizes come from

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and value <= 0:
                raise ModelError(f"{self.name}: {name} must be positive, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.name}: num_kv_heads is {self.num_kv_heads}, which does not divide the "
                f"{self.num_heads} heads; give a divisor"
            )
        if self.head_size % 2:
            raise ModelError(
                f"{self.name}: head_size is {self.head_size}; rotary positions turn the features "
                "of a head in pairs, so give an even one"
            )

    @classmethod
    def of_config(cls, name: str, config: LlamaConfig, source: str = "") -> "Architecture":
        """Return the architecture of one of the lab's LLaMAs, a preset or a checkpoint."""
        return cls(
            name=name,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.key_value_heads,
            head_size=config.head_size,
            tied=config.tied_head,
            source=source,
        )


def _llama3(name: str, hidden: int, inner: int, layers: int, heads: int) -> Architecture:
    return Architecture(
        name=name,
        vocab_size=128_256,  # 128,000 of table 3, and the 256 special tokens of the weights
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_size=128,
        source="Llama 3 (https://arxiv.org/abs/2407.21783), table 3",
    )


PUBLISHED: Mapping[str, Architecture] = MappingProxyType(
    {
        one.name: one
        for one in (
            _llama3("llama-3-8b", hidden=4096, inner=14_336, layers=32, heads=32),
            _llama3("llama-3-70b", hidden=8192, inner=28_672, layers=80, heads=64),
            _llama3("llama-3-405b", hidden=16_384, inner=53_248, layers=126, heads=128),
        )
    }
)


def find_architecture(model: str) -> Architecture:
    """Return the architecture that ``--model`` names.

    Args:
        model: A LLaMA preset, a published name, or the path of a ``config.json`` or of its folder.

    Raises:
        ModelError: If ``model`` is none of these, or `read_config` refuses the file.

    Examples:
        >>> find_architecture("llama-3-70b").num_kv_heads
        8
    """
    if model in LLAMAS:
        return Architecture.of_config(model, LLAMAS[model], "sinkgd.lab.models.PRESETS")
    if model in PUBLISHED:
        return PUBLISHED[model]
    if model in PRESETS:
        raise ModelError(
            f"model is {model!r}, whose blocks a plan does not know; it knows those of "
            f"{', '.join([*LLAMAS, *PUBLISHED])}"
        )
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {path} holds no config.json")
        path = path / "config.json"
    if path.is_file():
        return read_config(path)
    if path.suffix == ".json" or path.name != model:
        raise ModelError(f"there is no file {path}; give the path of a Hugging Face config.json")
    raise ModelError(
        f"model is {model!r}; {suggest(model, [*LLAMAS, *PUBLISHED])}, or give the path of a "
        "Hugging Face config.json"
    )


def read_config(path: Path) -> Architecture:
    """Read a Hugging Face ``config.json`` of a LLaMA-like model.

    Fields that may be absent have transformers' defaults: as many key-value heads as heads, except
    8 in a Mistral and 32 in a Qwen2; and heads that share the hidden size equally.

    Raises:
        ModelError: If the file is not a JSON object, is of another family, lacks a size, has an
            impossible one, or sets ``attention_bias`` or ``mlp_bias``.
    """
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object; give a model's config.json")
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise ModelError(
            f"{path}: model_type is {family!r}; a plan knows the blocks of {', '.join(_FAMILIES)}"
        )
    for part in ("attention_bias", "mlp_bias"):
        if config.get(part):
            raise ModelError(f"{path}: {part} is true, which a plan does not know; set it to false")
    hidden, heads = _size(config, "hidden_size", path), _size(config, "num_attention_heads", path)
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"{path}: num_attention_heads is {heads}, which does not divide hidden_size {hidden}; "
            "give head_dim"
        )
    return Architecture(
        name=path.resolve().parent.name if path.name == "config.json" else path.stem,
        vocab_size=_size(config, "vocab_size", path),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size", path),
        num_layers=_size(config, "num_hidden_layers", path, most=_MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=_size(
            {"num_key_value_heads": _KV_HEADS.get(family), **config},
            "num_key_value_heads",
            path,
            default=heads,
        ),
        head_size=_size(config, "head_dim", path, default=hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=_FAMILIES[family],
        source=path.name,
    )


def _size(
    config: Mapping[str, Any],
    key: str,
    path: Path,
    default: int | None = None,
    *,
    most: int = LARGEST_COUNT,
) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value <= most:
        raise ModelError(
            f"{path}: {key} must be a whole number from 1 to {most}, got {value!r:.80}"
        )
    return value
