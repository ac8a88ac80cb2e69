"""Configurations side by side: what all recipes share, and what sets them apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sinkgd.lab.report.analysis import Analysis
from sinkgd.lab.results import Run

ABSENT = "–"


@dataclass(frozen=True)
class Settings:
    """Dotted names with their values, as text."""

    shared: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, tuple[str, ...]], ...]  # one value a recipe, in their order


def compare_settings(analysis: Analysis, of: Callable[[Run], Mapping[str, Any]]) -> Settings:
    """Sort the settings of every run by whether all recipes have the same.

    Args:
        analysis: Its recipes are the columns. Where the runs of one recipe differ, as in their
            seed, the column has each value once.
        of: The settings of a run, tables as nested mappings.
    """
    columns = [[dict(_flat(of(run))) for run in recipe.runs] for recipe in analysis.recipes]
    names = dict.fromkeys(name for runs in columns for run in runs for name in run)
    shared, differing = [], []
    for name in names:
        values = tuple(
            ", ".join(dict.fromkeys(run.get(name, ABSENT) for run in runs)) for runs in columns
        )
        if len(set(values)) == 1:
            shared.append((name, values[0]))
        else:
            differing.append((name, values))
    return Settings(tuple(shared), tuple(differing))


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """List a nested table's leaves by dotted name.

    >>> _flat({"model": {"preset": "llama-nano"}, "seed": 0})
    [('model.preset', 'llama-nano'), ('seed', '0')]
    """
    rows = []
    for key, value in table.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows
