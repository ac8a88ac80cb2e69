"""Presets: the LLaMA sizes of the C4 benchmark, GPT-2, Lens, and nano models for a laptop."""

from dataclasses import replace

from sinkgd.lab.models.gpt2 import GPT2, GPT2Config
from sinkgd.lab.models.language_model import LanguageModel, ModelError
from sinkgd.lab.models.lens import Lens, LensConfig
from sinkgd.lab.models.llama import Llama, LlamaConfig
from sinkgd.lab.options import suggest

ModelSizes = LlamaConfig | GPT2Config | LensConfig


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
    )


# The benchmark is GaLore's (Zhao et al., https://arxiv.org/abs/2403.03507).
# llama-10b is llama-7b with one and a half times as many blocks.
# llama-nano has the blocks of llama-9m; it is meant for data with a small vocabulary.
LLAMAS: dict[str, LlamaConfig] = {
    "llama-nano-32": _sizes(hidden=32, intermediate=88, layers=4, heads=4),
    "llama-nano-48": _sizes(hidden=48, intermediate=132, layers=4, heads=4),
    "llama-nano-64": _sizes(hidden=64, intermediate=176, layers=4, heads=4),
    "llama-nano-96": _sizes(hidden=96, intermediate=264, layers=4, heads=4),
    "llama-nano": _sizes(hidden=128, intermediate=352, layers=4, heads=4),
    "llama-9m": _sizes(hidden=128, intermediate=352, layers=4, heads=4),
    "llama-20m": _sizes(hidden=256, intermediate=688, layers=4, heads=4),
    "llama-35m": _sizes(hidden=384, intermediate=1024, layers=6, heads=8),
    "llama-60m": _sizes(hidden=512, intermediate=1376, layers=8, heads=8),
    "llama-130m": _sizes(hidden=768, intermediate=2048, layers=12, heads=12),
    "llama-350m": _sizes(hidden=1024, intermediate=2736, layers=24, heads=16),
    "llama-1b": _sizes(hidden=2048, intermediate=5461, layers=24, heads=32),
    "llama-7b": _sizes(hidden=4096, intermediate=11008, layers=32, heads=32),
    "llama-10b": _sizes(hidden=4096, intermediate=11008, layers=48, heads=32),
}
# GPT-2's vocabulary of 50,257 is rounded up to a multiple of 64, as is common.
# The ranks of a nano Lens are a sixth of its width, as in lens-121m.
PRESETS: dict[str, ModelSizes] = {
    **LLAMAS,
    "gpt2-nano": GPT2Config(vocab_size=50_304, hidden_size=128, num_layers=4, num_heads=4),
    "gpt2-nano-256": GPT2Config(vocab_size=50_304, hidden_size=256, num_layers=4, num_heads=4),
    "gpt2-124m": GPT2Config(vocab_size=50_304, hidden_size=768, num_layers=12, num_heads=12),
    "lens-nano": LensConfig(
        vocab_size=50_304,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        key_value_rank=21,
        context_rank=21,
    ),
    "lens-121m": LensConfig(vocab_size=50_304, hidden_size=768, num_layers=12, num_heads=12),
}


def preset_config(
    preset: str, *, vocab_size: int | None = None, max_sequence_length: int | None = None
) -> ModelSizes:
    """Return a preset's sizes.

    Args:
        preset: A name in `PRESETS`.
        vocab_size: Tokens in the vocabulary; the preset's own by default.
        max_sequence_length: Tokens in the longest sequence; the preset's own by default.

    Raises:
        ModelError: If there is no such preset, or a size is not positive.

    Examples:
        >>> preset_config("llama-60m").parameter_count
        58073600
    """
    if preset not in PRESETS:
        raise ModelError(f"model.preset is {preset!r}; {suggest(preset, PRESETS)}")
    config = PRESETS[preset]
    return replace(
        config,
        vocab_size=config.vocab_size if vocab_size is None else vocab_size,
        max_sequence_length=(
            config.max_sequence_length if max_sequence_length is None else max_sequence_length
        ),
    )


def build_model(
    preset: str,
    *,
    vocab_size: int | None = None,
    max_sequence_length: int | None = None,
    seed: int = 0,
) -> LanguageModel:
    """Build a preset's model in float32 on the default device.

    Args:
        preset: A name in `PRESETS`.
        vocab_size: Tokens in the vocabulary; the preset's own by default.
        max_sequence_length: Tokens in the longest sequence; the preset's own by default.
        seed: Seed of the weights.

    Raises:
        ModelError: If there is no such preset, or a size is not positive.

    Examples:
        >>> model = build_model("llama-nano", vocab_size=512, max_sequence_length=64)
        >>> sum(parameter.numel() for parameter in model.parameters())
        935040
    """
    return model_of(
        preset_config(preset, vocab_size=vocab_size, max_sequence_length=max_sequence_length),
        seed=seed,
    )


def model_of(sizes: ModelSizes, *, seed: int = 0) -> LanguageModel:
    """Build a model of the given sizes in float32 on the default device."""
    match sizes:
        case LlamaConfig():
            return Llama(sizes, seed=seed)
        case GPT2Config():
            return GPT2(sizes, seed=seed)
        case LensConfig():
            return Lens(sizes, seed=seed)
