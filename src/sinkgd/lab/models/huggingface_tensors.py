"""The weights of a Hugging Face checkpoint, in safetensors files.

Our models have the names and layouts of `transformers`: GPT-2's matrices are transposed, its query,
key and value are one matrix, and rotary positions pair feature i of a head of d features with
feature i + d/2. So tensors are copied as they are.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkgd.lab.models.gpt2 import GPT2Config
from sinkgd.lab.models.huggingface import CONFIG_FILE, absent, json_object
from sinkgd.lab.models.language_model import LanguageModel, ModelError, set_weight
from sinkgd.lab.models.llama import LlamaConfig
from sinkgd.lab.models.lora import base_name

_WEIGHTS_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Names:
    """The names of the tensors of one kind of model."""

    prefix: str  # of everything below the head
    embedding: str
    derived: re.Pattern[str]  # tensors that follow from the configuration: masks and tables


_NAMES: Mapping[type, _Names] = {
    GPT2Config: _Names(
        "transformer.", "transformer.wte.weight", re.compile(r"\.attn\.(bias|masked_bias)$")
    ),
    LlamaConfig: _Names(
        "model.", "model.embed_tokens.weight", re.compile(r"\.rotary_emb\.inv_freq$")
    ),
}


def load_tensors(folder: Path, model: LanguageModel) -> None:
    """Copy the tensors of a checkpoint into a model; adapters of the model stay as they are.

    The tensors of a file are read one by one. Each rank keeps only its shard of a sharded weight.

    Args:
        folder: The folder of the checkpoint; its ``config.json`` agrees with the model.
        model: The model, on its device, with all its weights.

    Raises:
        ModelError: If a file is missing or damaged; if a tensor is missing, unknown or of another
            shape or type; or if a stored head differs from the embedding that it is tied to.
    """
    names = _NAMES[type(model.config)]
    weights = {
        base: weight
        for name, weight in model.named_parameters()
        if (base := base_name(name)) is not None
    }
    files = tensor_files(folder)
    ours = {name: _our_name(name, weights, names) for name in files}
    stored = {our: name for name, our in ours.items()}
    # A tied head may be stored although it is the embedding.
    tied = None if _HEAD in weights else files.get(_HEAD)
    unknown = [
        name
        for name, our in ours.items()
        if (our not in weights or stored[our] != name)  # or a second name of the same tensor
        and not names.derived.search(name)
        and not (tied and name == _HEAD)
    ]
    missing = sorted({*weights} - {*stored})
    if unknown or missing:
        raise ModelError(
            f"{folder} does not hold the tensors of its {CONFIG_FILE}: {_some(missing)} missing, "
            f"{_some(unknown)} unknown; use another checkpoint"
        )
    for file in dict.fromkeys(files.values()):
        for name, tensor in _tensors(file, {name for name in files if files[name] == file}):
            if (our := ours[name]) in weights:
                _check_tensor(name, tensor, weights[our], file)
                set_weight(weights[our], tensor)
    if tied:
        embedding = stored[names.embedding]
        one, other = (dict(_tensors(files[name], {name}))[name] for name in (_HEAD, embedding))
        if not torch.equal(one, other):
            raise ModelError(
                f"{tied}: {_HEAD} differs from {embedding}, but tie_word_embeddings is true in "
                f"{CONFIG_FILE}; use another checkpoint"
            )


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a checkpoint.

    Raises:
        ModelError: If there is neither a single safetensors file nor an index of several, or if
            that file or the index is damaged. The files that an index names are not opened.
    """
    whole, index = folder / _WEIGHTS_FILE, folder / _INDEX_FILE
    if whole.is_file():
        with _opened(whole) as file:
            return dict.fromkeys(file.keys(), whole)
    if not index.is_file():
        raise ModelError(
            f"{folder} holds neither {_WEIGHTS_FILE} nor {_INDEX_FILE}. If its weights have "
            "another format, save them again with transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
    names = json_object(index).get("weight_map")
    if not isinstance(names, Mapping) or not all(
        isinstance(name, str) and name == Path(name).name for name in names.values()
    ):
        raise ModelError(f"{index}: weight_map must give the name of a file for each tensor")
    return {tensor: folder / name for tensor, name in names.items()}


def content_sha256(folder: Path) -> str:
    """Return a hash of ``config.json`` and of all files of tensors, hex.

    Raises:
        ModelError: If a file is missing, or `tensor_files` refuses the folder.
    """
    digest = hashlib.sha256()
    for path in [folder / CONFIG_FILE, *sorted({*tensor_files(folder).values()})]:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            raise absent(path) from None
    return digest.hexdigest()


def _our_name(name: str, weights: Mapping[str, Tensor], names: _Names) -> str:
    """Return our name of a tensor; the names in published GPT-2s lack the prefix."""
    return name if name in weights else f"{names.prefix}{name}"


def _check_tensor(name: str, tensor: Tensor, weight: Tensor, file: Path) -> None:
    if tensor.shape != weight.shape:
        raise ModelError(
            f"{file}: {name} has the shape {tuple(tensor.shape)}, but {CONFIG_FILE} gives it "
            f"{tuple(weight.shape)}"
        )
    if tensor.dtype not in _DTYPES:
        raise ModelError(
            f"{file}: {name} has the type {tensor.dtype}; use a checkpoint that is not quantized"
        )


def _tensors(file: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one by one, in the order of the file."""
    with _opened(file) as opened:
        if lacking := sorted(names - {*opened.keys()}):
            raise ModelError(f"{file} lacks tensors that {_INDEX_FILE} names: {_some(lacking)}")
        for name in opened.keys():  # noqa: SIM118  it is no mapping
            if name in names:
                yield name, opened.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        raise absent(path) from None
    except safetensors.SafetensorError as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}); download it again"
        ) from error


def _some(names: list[str]) -> str:
    """List the first three names, and say how many more there are."""
    more = len(names) - 3
    listed = ", ".join(names[:3]) or "none"
    return f"{listed} and {more} more" if more > 0 else listed
