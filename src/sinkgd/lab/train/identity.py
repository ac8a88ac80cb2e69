"""What a run's numbers follow from besides its configuration, compared by content, not by name.

A corpus is a path and a model is the name of a preset; either may mean something else tomorrow. So
a run records hashes of what it read and of what it built, and a run that goes on is compared with
them. Where only versions or devices differ, the run goes on and says so: it is no longer bit for
bit what it would have been.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sinkgd.lab.data import Manifest
from sinkgd.lab.data.documents import EMBEDDED, expanded
from sinkgd.lab.disk import parse_json
from sinkgd.lab.models import LanguageModel
from sinkgd.lab.results import RunStart
from sinkgd.lab.train.config import CHANGEABLE_TABLES, ConfigError, RunConfig
from sinkgd.lab.train.config_file import differences

DATA, MODEL, OPTIMIZER = "data", "model", "optimizer"
# Of an environment, what the last bits of losses follow from.
_LAST_BITS = ("sinkgd", "commit", "torch", "cpu", "threads", "device", "mesh")
# Of a parameter group, what says how its step is computed rather than which step it is.
_HOW = frozenset({"params", "param_names", "foreach", "fused", "capturable", "backend"})


def check_unchanged(
    saved: RunConfig, config: RunConfig, folder: Path, *, text_by_content: bool
) -> None:
    """Refuse to go on with a run whose configuration has changed.

    Args:
        saved: As the run was begun.
        config: As it is asked for now.
        folder: Of the run.
        text_by_content: Whether the path of the text is left out, as `check_data` compares what
            lies there.

    Raises:
        ConfigError: If a field differs outside `CHANGEABLE_TABLES`; it is named.
    """
    pair = with_absolute_corpus(saved), with_absolute_corpus(config)
    changes = [
        f"{name} was {old!r} and is now {new!r}"
        for name, old, new in differences(*pair)
        if name.partition(".")[0] not in CHANGEABLE_TABLES
        and not (text_by_content and name == "data.corpus")
    ]
    if changes:
        raise ConfigError(
            f"the run in {folder} has another configuration: {'; '.join(changes)}. "
            "Give the former values, or another --out"
        )


def knows_its_text(start: RunStart) -> bool:
    """Whether the run has recorded a hash of its text; runs of older versions have not."""
    return DATA in start.inputs


def content_of(manifest: Manifest, model: LanguageModel, optimizer: Optimizer) -> dict[str, Any]:
    """Return what a run is compared by, as plain values."""
    return {
        DATA: manifest.content_sha256,
        MODEL: _plain({"kind": type(model.config).__name__, **vars(model.config)}),
        OPTIMIZER: _groups_sha256(model, optimizer),
    }


def check_data(start: RunStart, manifest: Manifest, corpus: str) -> None:
    """Refuse to go on with text that differs from what the run has read.

    Args:
        start: Of the run; one of an older version records no text, and is not checked.
        manifest: Of the text that is there now.
        corpus: What the configuration calls the text.

    Raises:
        ConfigError: With both hashes.
    """
    check_sha256(start, manifest.content_sha256, corpus)


def check_sha256(start: RunStart, now: str, corpus: str) -> None:
    """As `check_data`, from the hash of the text that is there now."""
    before = start.inputs.get(DATA)
    if before is not None and before != now:
        raise ConfigError(
            f"the run {start.name!r} was trained on data with the hash {before}, but {corpus!r} "
            f"now has the hash {now}; put the former text and tokenizer back, or give another --out"
        )


def check_content(start: RunStart, content: Mapping[str, Any]) -> None:
    """Refuse to go on with a model or optimizer that is built otherwise than the run's.

    Raises:
        ConfigError: With what differs, and both its values.
    """
    before, now = start.inputs.get(MODEL), content[MODEL]
    if before is not None and not isinstance(before, Mapping):
        raise ConfigError(
            f"the run {start.name!r} records a model of {before!r:.80} instead of its sizes; its "
            "results are damaged, so give another --out"
        )
    if before is not None and before != now:
        changed = "; ".join(
            f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        )
        raise ConfigError(
            f"the run {start.name!r} has another model under the same name: {changed}. "
            f"{_remedy(start)}"
        )
    old, new = start.inputs.get(OPTIMIZER), content[OPTIMIZER]
    if old is not None and old != new:
        raise ConfigError(
            f"the run {start.name!r} was begun with a recipe {start.recipe!r} that had other "
            f"parameter groups or options (hash {old}, now {new}). {_remedy(start)}"
        )


def notes_on_environment(start: RunStart, environment: Mapping[str, Any]) -> list[str]:
    """Say what else differs from when the run began: one line each thing, none where all is alike.

    Args:
        start: Of the run.
        environment: Of this process, as `describe_environment` gives it.
    """
    notes = []
    if not knows_its_text(start):
        notes.append(
            "warning: this run was begun by an older sinkgd, which did not record its text; "
            "whether the text is still the same cannot be checked"
        )
    changes = changes_of_environment(start, environment)
    changed = [
        f"{name} was {changes[name][0]} and is now {changes[name][1]}"
        for name in _LAST_BITS
        if name in changes
    ]
    if changed:
        notes.append(
            f"warning: {'; '.join(changed)}. The losses from here on may differ in their last bits "
            "from those of a run that was never stopped"
        )
    return notes


def changes_of_environment(start: RunStart, environment: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what differs from when the run began: by name, [then, now]."""
    now = _plain(environment)
    return {
        name: [then, now.get(name)]
        for name, then in start.environment.items()
        if then != now.get(name)
    }


def with_absolute_corpus(config: RunConfig) -> RunConfig:
    """Return a configuration that means the same text in every working directory."""
    corpus = config.data.corpus
    if corpus == EMBEDDED:
        return config
    absolute = str(expanded(corpus).absolute())
    return replace(config, data=replace(config.data, corpus=absolute))


def _remedy(start: RunStart) -> str:
    version = start.environment.get("commit") or start.environment.get("sinkgd", "of then")
    return f"Go on with the sinkgd that began it ({version}), or give another --out"


def _groups_sha256(model: nn.Module, optimizer: Optimizer) -> str:
    """Hash which parameters form a group, and the options of each."""
    names = {param: name for name, param in model.named_parameters()}
    groups = [
        {
            "names": sorted(names[param] for param in group["params"]),
            "options": {
                key: str(value)
                for key, value in group.items()
                if key not in _HOW and isinstance(value, bool | int | float | str | tuple)
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
