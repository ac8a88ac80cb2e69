"""Read the sizes in the ``config.json`` of a Hugging Face checkpoint of a GPT-2 or a LLaMA.

A field of the file is either read, compared with what our model computes, or known not to change
the outputs of a model. Any other field is refused.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkgd.lab.disk import parse_json
from sinkgd.lab.models.gpt2 import GPT2Config
from sinkgd.lab.models.language_model import ModelError
from sinkgd.lab.models.llama import LlamaConfig, RotaryScaling
from sinkgd.lab.options import LARGEST_COUNT

CONFIG_FILE = "config.json"

Sizes = LlamaConfig | GPT2Config
Fields = Mapping[str, Any]  # of a config.json


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What a ``config.json`` says."""

    sizes: Sizes
    dropout: Mapping[str, Any]  # its dropout fields that are not 0; our models have no dropout


@dataclass(frozen=True)
class _Family:
    """How the configurations of one ``model_type`` are read."""

    kind: type[Sizes]
    example: str  # a published checkpoint that can be read
    architecture: str  # the class of `transformers`
    counts: Mapping[str, str]  # fields that must be given, and our names for them
    numbers: Mapping[str, str]  # optional fields with our defaults, and our names for them
    # Returns the values that a field may have if it is given.
    allowed: Callable[[Any], dict[str, tuple[Any, ...]]]
    dropout: frozenset[str]
    unused: frozenset[str]  # fields that do not change the outputs of the language model
    # Reads the fields in `options`, and returns their values under our names.
    read_options: Callable[[Fields, Path], dict[str, Any]] = lambda _fields, _path: {}
    options: frozenset[str] = frozenset()  # fields for `read_options`; some hold tables


def _allowed_by_gpt2(sizes: GPT2Config) -> dict[str, tuple[Any, ...]]:
    return {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "add_cross_attention": (False,),
        "n_ctx": (sizes.max_sequence_length,),
        "n_inner": (sizes.intermediate_size,),
        "n_special": (0,),
        "reorder_and_upcast_attn": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
        "tie_word_embeddings": (True,),
    }


def _allowed_by_llama(sizes: LlamaConfig) -> dict[str, tuple[Any, ...]]:
    return {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "max_sequence_length": (sizes.max_sequence_length,),
        "mlp_bias": (False,),
        "tie_word_embeddings": (True, False),
    }


def _llama_options(fields: Fields, path: Path) -> dict[str, Any]:
    """Read key-value heads, head size, a tied head and rotary positions.

    A number of key-value heads and a head size that equal the default are left out.
    """
    found = _rotary(fields, path)
    heads = _count("num_attention_heads", fields.get("num_attention_heads"), path)
    width = _count("hidden_size", fields.get("hidden_size"), path)
    for name, default in (("num_key_value_heads", heads), ("head_dim", width / heads)):
        if name in fields and (value := _count(name, fields[name], path)) != default:
            found[name] = value
    if fields.get("tie_word_embeddings", False):
        found["tied_head"] = True
    return found


_ROTARY_TABLES = ("rope_parameters", "rope_scaling")  # in transformers 5, and in older versions
_SCALING_COUNTS = ("original_max_position_embeddings",)
_SCALING_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")


def _rotary(fields: Fields, path: Path) -> dict[str, Any]:
    """Read the base and the scaling of rotary positions."""
    tables = {name: fields[name] for name in _ROTARY_TABLES if fields.get(name) not in (None, {})}
    given = {"rope_theta": fields.get("rope_theta")}
    scalings = set()
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ModelError(f"{path}: {name} is {_shown(table)}; it must be an object")
        given[f"{name}.rope_theta"] = table.get("rope_theta")
        scalings.add(_scaling(name, table, path))
    thetas = {_number(name, theta, path) for name, theta in given.items() if theta is not None}
    if len(thetas) > 1:
        raise ModelError(
            f"{path}: rope_theta is {' and '.join(map(str, sorted(thetas)))}; give one"
        )
    if len(scalings) > 1:
        raise ModelError(
            f"{path}: {' and '.join(tables)} scale rotary positions differently; remove one"
        )
    found: dict[str, Any] = {"rope_theta": thetas.pop()} if thetas else {}
    if scalings and (scaling := scalings.pop()) is not None:
        found["rope_scaling"] = scaling
    return found


def _scaling(name: str, table: Fields, path: Path) -> RotaryScaling | None:
    """Read how a table scales rotary positions; None for the type "default"."""
    kinds = [table[key] for key in ("rope_type", "type") if table.get(key) is not None]
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "llama3") or kinds.count(kind) < len(kinds):
        key = "rope_type" if "rope_type" in table else "type"
        raise ModelError(
            f"{path}: {name}.{key} is {' and '.join(map(_shown, kinds))}, but the laboratory's "
            'rotary positions have the type "default" or "llama3"; use a checkpoint with one of '
            "these"
        )
    allowed = {"rope_theta", "rope_type", "type"}
    if kind == "llama3":
        allowed |= {*_SCALING_COUNTS, *_SCALING_NUMBERS}
    for key, value in table.items():
        if key not in allowed and (key, value) != ("partial_rotary_factor", 1):
            raise ModelError(
                f"{path}: {name}.{key} is {_shown(value)}, but the laboratory's rotary positions "
                f"of the type {_shown(kind)} do not have it; use another checkpoint"
            )
    if kind == "default":
        return None
    numbers: dict[str, Any] = {
        **{key: _number(f"{name}.{key}", table.get(key), path) for key in _SCALING_NUMBERS},
        **{key: _count(f"{name}.{key}", table.get(key), path) for key in _SCALING_COUNTS},
    }
    try:
        return RotaryScaling(**numbers)
    except ModelError as error:
        raise ModelError(f"{path}: {name}: {error}") from error


_FAMILIES: Mapping[str, _Family] = {
    "gpt2": _Family(
        kind=GPT2Config,
        example="openai-community/gpt2",
        architecture="GPT2LMHeadModel",
        counts={
            "vocab_size": "vocab_size",
            "n_embd": "hidden_size",
            "n_layer": "num_layers",
            "n_head": "num_heads",
            "n_positions": "max_sequence_length",
        },
        numbers={"layer_norm_epsilon": "norm_eps", "initializer_range": "initializer_std"},
        allowed=_allowed_by_gpt2,
        dropout=frozenset({"attn_pdrop", "embd_pdrop", "resid_pdrop"}),
        # The summary is a part of models for classification.
        unused=frozenset(
            {
                *("summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
                *("summary_type", "summary_use_proj", "predict_special_tokens"),
            }
        ),
    ),
    "llama": _Family(
        kind=LlamaConfig,
        example="meta-llama/Llama-3.2-1B",
        architecture="LlamaForCausalLM",
        counts={
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "intermediate_size": "intermediate_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "max_position_embeddings": "max_sequence_length",
        },
        numbers={"rms_norm_eps": "norm_eps", "initializer_range": "initializer_std"},
        allowed=_allowed_by_llama,
        dropout=frozenset({"attention_dropout"}),
        # Pretraining with tensor parallelism changes only the order of a sum.
        unused=frozenset({"pretraining_tp"}),
        read_options=_llama_options,
        options=frozenset({"num_key_value_heads", "head_dim", "rope_theta", *_ROTARY_TABLES}),
    ),
}
# Fields of every model: how it is stored, and how text is generated.
_UNUSED = frozenset(
    {
        *("_name_or_path", "_num_labels", "dtype", "torch_dtype", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params", "use_cache"),
        *("do_sample", "max_length", "temperature", "top_k", "top_p"),
        *("id2label", "label2id", "output_past"),
        "is_decoder",  # every model here is causal
    }
)
_WHY = {
    ("gpt2", "tie_word_embeddings"): ": its head is the embedding",
}
_FOR_ALL: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
}


def read_config(folder: Path) -> HuggingFaceConfig:
    """Read the ``config.json`` of a checkpoint.

    A field that is null counts as absent. An absent field has the default of `transformers`, except
    for sizes that must be given.

    Raises:
        ModelError: If the file is missing or not a JSON object, lacks a size, or has a field or
            a value that our models do not have; the message gives field and value.
    """
    path = folder / CONFIG_FILE
    fields = {key: value for key, value in json_object(path).items() if value is not None}
    name = fields.pop("model_type", None)
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ModelError(
            f"{path}: model_type is {_shown(name)}, but the laboratory has only the models "
            f"{', '.join(_FAMILIES)}; use a checkpoint of one of them"
        )
    family = _FAMILIES[name]
    if (architectures := fields.pop("architectures", None)) not in (None, [family.architecture]):
        raise ModelError(
            f"{path}: architectures is {_shown(architectures)}, but a language model is needed, "
            f"{family.architecture}"
        )
    sizes = _sizes(fields, family, path)
    allowed = {**_FOR_ALL, **family.allowed(sizes)}
    read = {*family.counts, *family.numbers, *family.options, *family.dropout}
    unused = family.unused | _UNUSED
    for key, value in fields.items():
        if key in allowed and value not in allowed[key]:
            one_of = " or ".join(map(_shown, allowed[key]))
            raise ModelError(
                f"{path}: {key} is {_shown(value)}, but the laboratory's {name} needs {one_of}"
                f"{_WHY.get((name, key), '')}; use a checkpoint like {family.example}"
            )
        if key not in allowed and key not in read and key not in unused:
            raise ModelError(
                f"{path}: {key} is {_shown(value)}, a field that the laboratory does not know. "
                "Remove it from the file if the model computes the same without it, or use another "
                "checkpoint"
            )
    dropout = {key: fields[key] for key in sorted(family.dropout) if fields.get(key)}
    return HuggingFaceConfig(sizes, dropout)


def absent(path: Path) -> ModelError:
    """Return the error for a missing file."""
    return ModelError(f"there is no file {path}; download the whole checkpoint")


def json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ModelError: If the file is missing, or does not hold a JSON object.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise absent(path) from None
    except ValueError as error:
        raise ModelError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _sizes(fields: Fields, family: _Family, path: Path) -> Sizes:
    values = {our: _count(name, fields.get(name), path) for name, our in family.counts.items()}
    values |= family.read_options(fields, path)
    for name, our in family.numbers.items():
        if name in fields:
            values[our] = float(_number(name, fields[name], path))
    try:
        return family.kind(**values)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _count(name: str, value: Any, path: Path) -> Any:
    if type(value) is not int or not 0 < value <= LARGEST_COUNT:
        raise ModelError(
            f"{path}: {name} must be a whole number from 1 to {LARGEST_COUNT}, got {_shown(value)}"
        )
    return value


def _number(name: str, value: Any, path: Path) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ModelError(f"{path}: {name} must be a positive number, got {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    """Return a value as JSON writes it, cut to 80 characters."""
    return f"{json.dumps(value):.80}"
