"""Whether a resumed run is the same run: its data, model and recipe are compared by content.

A configuration names its text by a path and its model by a preset, and either name may mean
something else tomorrow. So a run records the hashes of its texts, starting weights and parameter
groups, and the sizes of its model. These are compared when the run resumes. If only versions,
devices, threads or meshes differ, the run resumes with a warning that its losses may differ in the
last bits.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from sinkgd.lab.data import Manifest
from sinkgd.lab.data.documents import EMBEDDED, expanded
from sinkgd.lab.disk import parse_json
from sinkgd.lab.models import (
    GPT2Config,
    LanguageModel,
    LensConfig,
    LlamaConfig,
    ModelError,
    ModelSizes,
    RotaryScaling,
    Sizes,
)
from sinkgd.lab.results import RunStart
from sinkgd.lab.train.config import ConfigError, RunConfig, SharedConfig, differences, may_change
from sinkgd.lab.train.machine import PACKAGES
from sinkgd.optim.arguments import ADDED_LATER

DATA, MODEL, OPTIMIZER = "data", "model", "optimizer"
TOKENIZER, WEIGHTS, OTHER_DATA = "tokenizer", "weights", "other_data"
_PATHS = (("data", "corpus"), ("model", "weights"), ("evaluation", "other_corpus"))
Shared = TypeVar("Shared", bound=SharedConfig)
_KINDS: Mapping[str, type[ModelSizes]] = {
    kind.__name__: kind for kind in (LlamaConfig, GPT2Config, LensConfig)
}
# Sizes that older runs did not record, with the values that those runs had. A run records such a
# size only if its value is another one, so that its record equals that of an older run of the same
# model.
_SIZES_ADDED_LATER: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rope_scaling": None,
    "tied_head": False,
}
# Parts of an environment that determine the last bits of losses. numba chooses the backend: a step
# on a CPU without it is taken by ``eager``.
_LAST_BITS = ("sinkgd", "commit", "source", "torch", "numba", "cpu", "threads", "device", "mesh")
# Keys of a parameter group that are not compared as options: its parameters, names, and options
# that change how its step is computed but not the result.
_HOW = frozenset({"params", "param_names", "name", "foreach", "fused", "capturable", "backend"})


def check_unchanged(
    saved: RunConfig, config: RunConfig, folder: Path, *, text_by_content: bool
) -> None:
    """Refuse to resume a run whose configuration has changed.

    Args:
        saved: Configuration with which the run began.
        config: Configuration that is asked for now.
        folder: Folder of the run.
        text_by_content: Whether another path of the text alone is no change, because `check_data`
            compares its content.

    Raises:
        ConfigError: If a field differs, other than those that `may_change`; the message gives all
            their names.
    """
    pair = with_absolute_paths(saved), with_absolute_paths(config)
    changes = {
        name: f"{name} was {old!r} and is now {new!r}"
        for name, old, new in differences(*pair)
        if not may_change(name)
    }
    if changes.keys() - ({"data.corpus"} if text_by_content else set()):
        raise ConfigError(
            f"the run in {folder} has another configuration: {'; '.join(changes.values())}. "
            "Give the former values, or another --out"
        )


def knows_its_text(start: RunStart) -> bool:
    """Whether the run recorded a hash of its text; runs of older versions did not."""
    return DATA in start.inputs


def content_of(
    manifest: Manifest,
    model: LanguageModel,
    optimizer: Optimizer,
    *,
    weights_sha256: str | None = None,
    other: Manifest | None = None,
) -> dict[str, Any]:
    """Return the content by which runs are compared, as plain values.

    Args:
        manifest: Manifest of the text.
        model: The model.
        optimizer: The model's optimizer.
        weights_sha256: Hash of the weights from which the run begins; None if they are drawn.
        other: Manifest of the text in ``evaluation.other_corpus``, if there is one.
    """
    others = {} if other is None else {OTHER_DATA: other.content_sha256}
    return {
        DATA: manifest.content_sha256,
        MODEL: model_content(model.config),
        OPTIMIZER: _groups_sha256(model, optimizer),
        TOKENIZER: manifest.tokenizer_sha256,
        WEIGHTS: weights_sha256,
        **others,
    }


def model_content(sizes: Sizes) -> dict[str, Any]:
    """Return a model's kind and sizes, as plain values."""
    values = {
        name: vars(value) if isinstance(value, RotaryScaling) else value
        for name, value in vars(sizes).items()
        if not (name in _SIZES_ADDED_LATER and value == _SIZES_ADDED_LATER[name])
    }
    return _plain({"kind": type(sizes).__name__, **values})


def recorded_sizes(start: RunStart) -> ModelSizes:
    """Return the sizes of a run's model, from its first record.

    Raises:
        ConfigError: If the record lacks them, or they are damaged.
    """
    content = start.inputs.get(MODEL)
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"the run {start.name!r} records {content!r:.80} instead of the sizes of its model; "
            "give its model.preset"
        )
    sizes = {name: value for name, value in content.items() if name != "kind"}
    try:
        if (scaling := sizes.get("rope_scaling")) is not None:
            sizes["rope_scaling"] = RotaryScaling(**scaling)
        return _KINDS[content["kind"]](**sizes)
    except (KeyError, TypeError, ModelError) as error:
        raise ConfigError(
            f"the run {start.name!r} records a model of {dict(content)!r:.80}, which cannot be "
            f"built ({error}); its results are damaged"
        ) from error


def changed_sizes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in which sizes two results of `model_content` differ; empty if they are equal."""
    before, now = {**_SIZES_ADDED_LATER, **before}, {**_SIZES_ADDED_LATER, **now}
    return "; ".join(
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    )


def check_data(start: RunStart, manifest: Manifest, corpus: str) -> None:
    """Refuse to resume with text that differs from the run's.

    Args:
        start: First record of the run. Runs of older versions recorded no hash of their text, and
            are not checked.
        manifest: Manifest of the present text.
        corpus: Name of the text in the configuration.

    Raises:
        ConfigError: If the text differs; the message gives both hashes.
    """
    check_sha256(start, manifest.content_sha256, corpus)


def check_sha256(start: RunStart, now: str, corpus: str) -> None:
    """Do what `check_data` does, given only the hash of the present text."""
    before = start.inputs.get(DATA)
    if before is not None and before != now:
        raise ConfigError(
            f"the run {start.name!r} was trained on data with the hash {before}, but {corpus!r} "
            f"now has the hash {now}; put the former text and tokenizer back, or give another --out"
        )


def check_content(start: RunStart, content: Mapping[str, Any]) -> None:
    """Refuse to resume with a model, weights, optimizer or second text that differ from the run's.

    Runs of older versions recorded no hash of the second text, which then is not checked.

    Raises:
        ConfigError: If one of them differs; the message gives both values. Also if the record of
            the model is damaged.
    """
    before, now = start.inputs.get(MODEL), content[MODEL]
    if before is not None and not isinstance(before, Mapping):
        raise ConfigError(
            f"the run {start.name!r} records a model of {before!r:.80} instead of its sizes; its "
            "results are damaged, so give another --out"
        )
    if before is not None and before != now:
        raise ConfigError(
            f"the run {start.name!r} has another model under the same name: "
            f"{changed_sizes(before, now)}. {_remedy(start)}"
        )
    old, new = start.inputs.get(WEIGHTS), content[WEIGHTS]
    if old != new:
        raise ConfigError(
            f"the run {start.name!r} was begun from the weights with the hash {old}, but "
            f"model.weights now has the hash {new}; put the former weights back, or give another "
            "--out"
        )
    old, new = start.inputs.get(OTHER_DATA), content.get(OTHER_DATA)
    if old is not None and old != new:
        raise ConfigError(
            f"the run {start.name!r} was evaluated on a second text with the hash {old}, but "
            f"evaluation.other_corpus now has the hash {new}; put the former text back, or give "
            "another --out"
        )
    old, new = start.inputs.get(OPTIMIZER), content[OPTIMIZER]
    if old is not None and old != new:
        raise ConfigError(
            f"the run {start.name!r} was begun with a recipe {start.recipe!r} that had other "
            f"parameter groups or options (hash {old}, now {new}). {_remedy(start)}"
        )


def environment_warnings(start: RunStart, environment: Mapping[str, Any]) -> list[str]:
    """Return warnings about changes since the run began that may affect the last bits of losses.

    If the run did not record a hash of its text, a warning says so.

    Args:
        start: First record of the run.
        environment: From `describe_environment` in this process, with the ``mesh`` added.
    """
    notes = []
    if not knows_its_text(start):
        notes.append(
            "warning: this run was begun by an older sinkgd, which did not record its text; "
            "whether the text is still the same cannot be checked"
        )
    changes = environment_changes(start, environment)
    changed = [
        "{} was {} and is now {}".format(name, *(_in_words(name, v) for v in changes[name]))
        for name in _LAST_BITS
        if name in changes
    ]
    if changed:
        notes.append(
            f"warning: {'; '.join(changed)}. The losses from here on may differ in their last bits "
            "from those of a run that was never stopped"
        )
    return notes


def environment_changes(start: RunStart, environment: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what differs from when the run began, as name: [then, now].

    A package that is not installed has the version None.
    """
    then, now = start.environment, _plain(environment)
    return {
        name: [then.get(name), now.get(name)]
        for name in dict.fromkeys((*then, *PACKAGES))
        if then.get(name) != now.get(name)
    }


def _in_words(name: str, value: Any) -> Any:
    if value is not None:
        return value
    return "not installed" if name in PACKAGES else "unknown"


def with_absolute_paths(config: Shared, located: SharedConfig | None = None) -> Shared:
    """Return a configuration that refers to the same files from every working directory.

    Args:
        config: A configuration.
        located: A configuration that may have absolute paths of the same files. They replace
            relative paths with which they end; other relative paths are those of the working
            directory.
    """
    for table, field in _PATHS:
        options = getattr(config, table)
        path = getattr(options, field)
        if path is None or (path == EMBEDDED and field != "weights"):
            continue
        found = None if located is None else getattr(getattr(located, table), field)
        absolute = found if _is_end(path, of=found) else str(expanded(path).absolute())
        config = replace(config, **{table: replace(options, **{field: absolute})})
    return config


def _is_end(path: str, *, of: str | None) -> bool:
    """Whether ``of`` is an absolute path that ends with the relative path ``path``."""
    parts = expanded(path).parts
    return of is not None and Path(of).is_absolute() and Path(of).parts[-len(parts) :] == parts


def _remedy(start: RunStart) -> str:
    version = start.environment.get("commit") or start.environment.get("sinkgd", "version unknown")
    return f"Go on with the sinkgd that began it ({version}), or give another --out"


def _groups_sha256(model: nn.Module, optimizer: Optimizer) -> str:
    """Hash the parameter groups: names of parameters and options of each."""
    names = {param: name for name, param in model.named_parameters()}
    groups = [
        {
            "names": sorted(names[param] for param in group["params"]),
            "options": {
                key: str(value)
                for key, value in group.items()
                if key not in _HOW and isinstance(value, bool | int | float | str | tuple)
                # An option that older runs lack is left out if its value has the effect that those
                # runs had.
                if not (key in ADDED_LATER and value == ADDED_LATER[key])
            },
        }
        for group in optimizer.param_groups
    ]
    return _sha256(sorted(json.dumps(group, sort_keys=True) for group in groups))


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table as it is read back from JSON."""
    plain: dict[str, Any] = parse_json(json.dumps(table))
    return plain
