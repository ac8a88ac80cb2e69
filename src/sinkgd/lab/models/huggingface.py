"""The sizes in the ``config.json`` of a Hugging Face checkpoint, of a GPT-2 or a LLaMA.

Every field of the file is read, compared with what our model computes, or known not to change the
outputs of a model. Any other field is refused.
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
from sinkgd.lab.models.llama import LlamaConfig
from sinkgd.lab.options import LARGEST_COUNT

CONFIG_FILE = "config.json"

Sizes = LlamaConfig | GPT2Config
Fields = Mapping[str, Any]  # of a config.json


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What a ``config.json`` says."""

    sizes: Sizes
    dropout: Mapping[str, Any]  # its fields of dropout that are not 0; our models have none


@dataclass(frozen=True)
class _Family:
    """How the configurations of one ``model_type`` are read."""

    kind: type[Sizes]
    example: str  # a published checkpoint that can be read
    architecture: str  # the class of `transformers`
    counts: Mapping[str, str]  # fields that must be given, and our names for them
    numbers: Mapping[str, str]  # fields with the same defaults as ours, and our names for them
    # Returns the values that a field may have if it is given.
    allowed: Callable[[Any], dict[str, tuple[Any, ...]]]
    dropout: frozenset[str]
    unused: frozenset[str]  # fields that do not change the outputs of the language model
    # Reads fields that hold tables.
    nested: Callable[[Fields, Path], dict[str, Any]] = lambda _fields, _path: {}


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
        "head_dim": (sizes.head_size,),
        "hidden_act": ("silu",),
        "max_sequence_length": (sizes.max_sequence_length,),
        "mlp_bias": (False,),
        "num_key_value_heads": (sizes.num_heads,),
        "tie_word_embeddings": (False,),
    }


_PLAIN_ROTARY = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


def _rotary(fields: Fields, path: Path) -> dict[str, Any]:
    """Read the base of rotary positions, in the form of transformers 5 or before."""
    given = {"rope_theta": fields.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        table = fields.get(name, {})
        if not isinstance(table, Mapping):
            raise ModelError(f"{path}: {name} is {_shown(table)}; it must be an object")
        for key, value in table.items():
            if key == "rope_theta":
                given[f"{name}.rope_theta"] = value
            elif key not in _PLAIN_ROTARY or value != _PLAIN_ROTARY[key]:
                raise ModelError(
                    f"{path}: {name}.{key} is {_shown(value)}, but the laboratory does not scale "
                    'rotary positions; use a checkpoint whose rope_type is "default"'
                )
    thetas = {_number(name, theta, path) for name, theta in given.items() if theta is not None}
    if len(thetas) > 1:
        raise ModelError(
            f"{path}: rope_theta is {' and '.join(map(str, sorted(thetas)))}; give one"
        )
    return {"rope_theta": thetas.pop()} if thetas else {}


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
        example="meta-llama/Llama-2-7b-hf",
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
        unused=frozenset({"pretraining_tp", "rope_theta", "rope_parameters", "rope_scaling"}),
        nested=_rotary,
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
    ("llama", "num_key_value_heads"): ", one for each head: it has no grouped-query attention",
    ("llama", "tie_word_embeddings"): ": its head is not the embedding",
    ("gpt2", "tie_word_embeddings"): ": its head is the embedding",
}
_FOR_ALL: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
}


def read_config(folder: Path) -> HuggingFaceConfig:
    """Read the ``config.json`` of a checkpoint.

    A field that is null counts as absent, and an absent field has the default of `transformers`.

    Raises:
        ModelError: If the file is missing or not a JSON object, lacks a size, or has a field that
            our models do not have; the message gives field and value.
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
    read = {*family.counts, *family.numbers, *family.unused, *family.dropout, *_UNUSED}
    for key, value in fields.items():
        if key in allowed and value not in allowed[key]:
            one_of = " or ".join(map(_shown, allowed[key]))
            raise ModelError(
                f"{path}: {key} is {_shown(value)}, but the laboratory's {name} needs {one_of}"
                f"{_WHY.get((name, key), '')}; use a checkpoint like {family.example}"
            )
        if key not in allowed and key not in read:
            raise ModelError(
                f"{path}: {key} is {_shown(value)}, a field that the laboratory does not know. "
                "Remove it from the file if the model computes the same without it, or use another "
                "checkpoint"
            )
    dropout = {key: fields[key] for key in sorted(family.dropout) if fields.get(key)}
    return HuggingFaceConfig(sizes, dropout)


def absent(path: Path) -> ModelError:
    """Return the error of a file that is not there."""
    return ModelError(f"there is no file {path}; download the whole checkpoint")


def json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ModelError: If it is missing, or holds none.
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
    values: dict[str, Any] = dict(family.nested(fields, path))
    for name, our in family.counts.items():
        value = fields.get(name)
        if type(value) is not int or not 0 < value <= LARGEST_COUNT:
            raise ModelError(
                f"{path}: {name} must be a whole number from 1 to {LARGEST_COUNT}, got "
                f"{_shown(value)}"
            )
        values[our] = value
    for name, our in family.numbers.items():
        if name in fields:
            values[our] = float(_number(name, fields[name], path))
    try:
        return family.kind(**values)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _number(name: str, value: Any, path: Path) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ModelError(f"{path}: {name} must be a positive number, got {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    """Return a value as JSON has it."""
    return f"{json.dumps(value):.80}"
