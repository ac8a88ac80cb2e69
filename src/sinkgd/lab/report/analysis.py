"""Every recipe against the baseline: tokens, seconds and throughput to the baseline's final loss.

The runs are those of a folder: one results file each, in the folder itself or one level below. A
folder of records, such as `benchmarks/demo`, holds results files under other names.

The target is the mean final validation loss of the baseline's finished runs. A run reached it
where its validation loss first is at or below it (`first_reach`): between two evaluations, on the
straight line through them. The baseline itself needed all its tokens, by definition.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sinkgd.lab.report.summary import RecipeSummary, Spread, summarize
from sinkgd.lab.results import RESULTS_FILE, Evaluation, Run


class ReportError(ValueError):
    """Runs that cannot be reported, with the remedy."""


def read_runs(folder: Path) -> list[Run]:
    """Read ``folder/run.jsonl`` and every ``folder/*/run.jsonl``, sorted by path.

    Where there is none of these, every ``folder/*.jsonl``; of a file, that file alone.

    Raises:
        ReportError: If the folder is missing or holds no results.
        ResultsError: If a results file is damaged; no run is left out in silence.
    """
    if folder.is_file():
        return [Run.read(folder)]
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder; give the one that `sinkgd compare` wrote to")
    paths = sorted([*folder.glob(RESULTS_FILE), *folder.glob(f"*/{RESULTS_FILE}")])
    paths = paths or sorted(folder.glob("*.jsonl"))
    if not paths:
        inner = sorted(path.name for path in folder.iterdir() if any(path.glob("*.jsonl")))
        hint = f"`sinkgd compare --out {folder}` makes some"
        if inner:
            hint = f"its folders {', '.join(inner)} hold some; name one of them"
        raise ReportError(
            f"{folder} holds no runs: neither {RESULTS_FILE} nor */{RESULTS_FILE} nor *.jsonl "
            f"exists there; {hint}"
        )
    return [Run.read(path) for path in paths]


# The fair baseline first: `adamw` clips and has learning rates per group.
_USUAL_BASELINES = ("adamw", "adamw-one-lr")


@dataclass(frozen=True)
class Comparison:
    """What a recipe needed to reach the baseline's final loss; None where no run reached it.

    Figures are over the runs that did reach it: ``reached_runs`` of ``runs``.
    """

    runs: int  # finished ones
    reached_runs: int
    steps: Spread | None
    tokens: Spread | None
    seconds: Spread | None  # of training
    token_fraction: Spread | None  # of the baseline's tokens in all
    time_fraction: Spread | None  # of the baseline's seconds in all
    effective_tokens_per_second: Spread | None  # the baseline's tokens / these seconds
    effective_speedup: float | None  # effective throughput / the baseline's tokens per second
    level: bool  # the final losses are equal as written, or their seeds' ranges overlap


@dataclass(frozen=True)
class Analysis:
    """The recipes, the baseline first, and each one's comparison with it."""

    recipes: tuple[RecipeSummary, ...]
    baseline: RecipeSummary | None
    target: float | None  # nats per token: the baseline's final validation loss
    comparisons: dict[str, Comparison]  # by recipe; empty without a target

    @property
    def candidates(self) -> tuple[RecipeSummary, ...]:
        """Every recipe but the baseline."""
        return tuple(recipe for recipe in self.recipes if recipe is not self.baseline)

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every run, recipe by recipe."""
        return tuple(run for recipe in self.recipes for run in recipe.runs)


def recipe_of(run: Run) -> str:
    """Return the name of a run's recipe."""
    return run.start.recipe


def analyze(
    runs: Sequence[Run], baseline: str | None, *, group: Callable[[Run], str] = recipe_of
) -> Analysis:
    """Group ``runs`` by recipe, average their seeds and compare each recipe with the baseline.

    Args:
        runs: In any order; unfinished and failed ones too.
        baseline: A recipe's name, or None to compare with nothing.
        group: The name under which a run is averaged with others: its recipe's, unless they differ
            in something else.

    Raises:
        ReportError: If there are no runs, or none of the baseline's recipe.
    """
    if not runs:
        raise ReportError("there are no runs to report; `sinkgd compare` makes some")
    names = sorted({group(run) for run in runs}, key=lambda name: (name != baseline, name))
    if baseline is not None and baseline not in names:
        nearest = difflib.get_close_matches(baseline, names, n=1, cutoff=0.0)[0]
        raise ReportError(
            f"baseline {baseline!r} has no run; the recipes here are {', '.join(names)}. "
            f"Did you mean {nearest!r}?"
        )
    recipes = tuple(summarize(name, [run for run in runs if group(run) == name]) for name in names)
    reference = recipes[0] if baseline is not None else None
    if (
        reference is None
        or reference.val_loss is None
        or not math.isfinite(reference.val_loss.mean)
    ):
        return Analysis(recipes, reference, None, {})
    target = reference.val_loss.mean
    comparisons = {recipe.name: _compare(recipe, reference, target) for recipe in recipes}
    return Analysis(recipes, reference, target, comparisons)


def default_baseline(runs: Sequence[Run]) -> str | None:
    """Choose the baseline where none was named: the fair AdamW, else the papers', else none."""
    present = {run.start.recipe for run in runs}
    return next((name for name in _USUAL_BASELINES if name in present), None)


def _compare(recipe: RecipeSummary, baseline: RecipeSummary, target: float) -> Comparison:
    if recipe is baseline:
        points = [Reach(e.step, e.tokens, e.seconds) for e in (r.end for r in recipe.finished) if e]
    else:
        found = [first_reach(run.evaluations, target) for run in recipe.finished]
        points = [point for point in found if point is not None]
    tokens = Spread.of(point.tokens for point in points)
    seconds = Spread.of(point.seconds for point in points)
    all_tokens = baseline.tokens.mean if baseline.tokens else 0.0
    all_seconds = baseline.seconds.mean if baseline.seconds else 0.0
    # A first evaluation before the first step can lie below a diverged baseline's loss: 0 seconds.
    effective = Spread.of(all_tokens / point.seconds for point in points if point.seconds > 0)
    return Comparison(
        runs=len(recipe.finished),
        reached_runs=len(points),
        steps=Spread.of(point.step for point in points),
        tokens=tokens,
        seconds=seconds,
        token_fraction=tokens / all_tokens if tokens and all_tokens else None,
        time_fraction=seconds / all_seconds if seconds and all_seconds else None,
        effective_tokens_per_second=effective,
        effective_speedup=effective.mean * all_seconds / all_tokens
        if effective and all_tokens
        else None,
        level=_level(recipe, baseline),
    )


def _level(recipe: RecipeSummary, baseline: RecipeSummary) -> bool:
    if recipe.val_loss is None or baseline.val_loss is None:
        return False
    difference = abs(recipe.val_loss.mean - baseline.val_loss.mean)
    return difference < 0.0005 or recipe.val_loss.overlaps(baseline.val_loss)


@dataclass(frozen=True)
class Reach:
    """A point of a run, between its evaluations."""

    step: float
    tokens: float
    seconds: float  # of training


def first_reach(evaluations: Sequence[Evaluation], target: float) -> Reach | None:
    """Find the first point at which the validation loss is at or below ``target``.

    The loss is taken as linear between two evaluations. Where there is no finite evaluation
    before the one at or below the target, that one is the answer: an upper bound.

    Args:
        evaluations: In the order of their steps.
        target: Nats per token.

    Returns:
        The point, or None if no evaluation is at or below the target.

    Examples:
        >>> before = Evaluation(10, 100, 1.0, 5.0, 148.4, 1.8, 64)
        >>> after = Evaluation(20, 200, 3.0, 4.0, 54.6, 1.4, 64)
        >>> first_reach([before, after], 4.25)
        Reach(step=17.5, tokens=175.0, seconds=2.5)
        >>> first_reach([before, after], 3.9) is None
        True
    """
    previous: Evaluation | None = None
    for current in evaluations:
        if current.val_loss <= target:
            return _between(previous, current, target)
        previous = current if math.isfinite(current.val_loss) else None
    return None


def _between(before: Evaluation | None, after: Evaluation, target: float) -> Reach:
    if before is None:
        return Reach(after.step, after.tokens, after.seconds)
    way = (before.val_loss - target) / (before.val_loss - after.val_loss)
    return Reach(
        step=before.step + way * (after.step - before.step),
        tokens=before.tokens + way * (after.tokens - before.tokens),
        seconds=before.seconds + way * (after.seconds - before.seconds),
    )
