"""Compare each recipe with the baseline: the cost to reach the baseline's loss, and throughput.

The runs come from a folder. Each has a results file, in the folder itself or one level below. A
folder of records, such as `benchmarks/demo/2026-11-28`, has results files with other names.

A recipe's figures are means over its *finished* runs, with their spread over seeds. Runs that
failed, were interrupted or are still running are counted and shown, but enter no mean.

The target is the mean final validation loss of the baseline's finished runs. A run reaches the
target at the first point where the run's validation loss is at or below the target (`first_reach`),
interpolated linearly between evaluations. By definition, the baseline itself needs all its tokens.
A mean over those runs alone that reach the target would flatter a recipe, so its cost is given only
if all its runs reach the target.
"""

import difflib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sinkgd.lab.report.difference import NO_DIFFERENCE, Difference
from sinkgd.lab.report.quantities import NO_BREAK
from sinkgd.lab.results import RESULTS_FILE, Evaluation, Memory, Run


@dataclass(frozen=True)
class Spread:
    """A figure over several runs: its mean and its range."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """Summarize ``values``; return None if there are none.

        >>> Spread.of([4.0, 4.5])
        Spread(mean=4.25, low=4.0, high=4.5, count=2)
        """
        found = list(values)
        if not found:
            return None
        return cls(statistics.fmean(found), min(found), max(found), len(found))

    def __truediv__(self, whole: float) -> "Spread":
        return Spread(self.mean / whole, self.low / whole, self.high / whole, self.count)

    def with_range(self, digits: int) -> str:
        r"""Format the mean, with ± half the range if there are several values.

        >>> Spread(4.25, 4.0, 4.5, count=2).with_range(digits=2)
        '4.25 ±\xa00.25'
        """
        mean = f"{self.mean:.{digits}f}"
        if self.count == 1:
            return mean
        return f"{mean} ±{NO_BREAK}{(self.high - self.low) / 2:.{digits}f}"


@dataclass(frozen=True)
class RecipeSummary:
    """The runs of one recipe, and figures of its finished runs.

    A figure is None if no finished run has it.
    """

    name: str
    runs: tuple[Run, ...]  # sorted by seed
    finished: tuple[Run, ...]
    val_loss: Spread | None  # validation loss at the end, nats per token
    perplexity: Spread | None
    bits_per_byte: Spread | None
    steps: Spread | None  # steps in all
    tokens: Spread | None  # tokens in all
    seconds: Spread | None  # time of training in all
    tokens_per_second: Spread | None  # raw: in the median step of each run
    step_seconds: Spread | None  # mean over each run's steps
    optimizer_share: Spread | None  # fraction of the steps' time that the optimizer takes
    memory: Memory | None  # each part is the largest among the runs

    @property
    def seeds(self) -> int:
        """Number of different seeds of the finished runs."""
        return len({run.start.seed for run in self.finished})


def state_of(run: Run) -> str:
    """Return a run's status in a word; ``"unfinished"`` if the file has no record of the end."""
    return run.end.status if run.end else "unfinished"


def summarize(name: str, runs: Sequence[Run]) -> RecipeSummary:
    """Average a recipe's finished runs."""
    runs = sorted(runs, key=lambda run: (run.start.seed, run.start.name))
    finished = [run for run in runs if run.finished]
    final = [run.evaluations[-1] for run in finished if run.evaluations]
    ends = [run.end for run in finished if run.end]
    # A damaged file may hold times that are not positive, from which no speed follows.
    stepped = [run for run in finished if run.steps and _median_step_seconds(run) > 0]
    return RecipeSummary(
        name=name,
        runs=tuple(runs),
        finished=tuple(finished),
        val_loss=Spread.of(row.val_loss for row in final),
        perplexity=Spread.of(row.perplexity for row in final),
        bits_per_byte=Spread.of(row.bits_per_byte for row in final),
        steps=Spread.of(end.step for end in ends),
        tokens=Spread.of(end.tokens for end in ends),
        seconds=Spread.of(end.seconds for end in ends),
        tokens_per_second=Spread.of(_median_tokens_per_second(run) for run in stepped),
        step_seconds=Spread.of(
            statistics.fmean(row.step_seconds for row in run.steps) for run in stepped
        ),
        optimizer_share=Spread.of(_optimizer_share(run) for run in stepped),
        memory=Memory.largest([end.memory for end in ends]) if ends else None,
    )


def _median_tokens_per_second(run: Run) -> float:
    return run.start.tokens_per_step / _median_step_seconds(run)


def _median_step_seconds(run: Run) -> float:
    return statistics.median(row.step_seconds for row in run.steps)


def _optimizer_share(run: Run) -> float:
    whole = math.fsum(row.step_seconds for row in run.steps)
    return math.fsum(row.optimizer_seconds for row in run.steps) / whole


class ReportError(ValueError):
    """Runs cannot be reported; the message gives the remedy."""


def read_runs(folder: Path) -> list[Run]:
    """Read ``folder/run.jsonl`` and every ``folder/*/run.jsonl``, sorted by path.

    If there are none, read every ``folder/*.jsonl``. If ``folder`` is a file, read only that file.

    Raises:
        ReportError: If the folder is missing or holds no results.
        ResultsError: If a results file is damaged; no run is left out silently.
    """
    if folder.is_file():
        return [Run.read(folder)]
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; give one that `sinkgd compare` wrote to")
    paths = sorted([*folder.glob(RESULTS_FILE), *folder.glob(f"*/{RESULTS_FILE}")])
    paths = paths or sorted(folder.glob("*.jsonl"))
    if not paths:
        inner = sorted(path.name for path in folder.iterdir() if any(path.glob("*.jsonl")))
        hint = f"`sinkgd compare --out {folder}` makes some"
        if inner:
            hint = f"its folders {', '.join(inner)} hold runs; name one of them"
        raise ReportError(
            f"{folder} holds no runs: neither {RESULTS_FILE} nor */{RESULTS_FILE} nor *.jsonl "
            f"exists there; {hint}"
        )
    return [Run.read(path) for path in paths]


# The fair baseline is first: `adamw` clips and has learning rates per group.
_USUAL_BASELINES = ("adamw", "adamw-one-lr")


@dataclass(frozen=True)
class Comparison:
    """The cost of a recipe to reach the baseline's final loss.

    Figures are None unless all of the recipe's ``runs`` reached this loss.
    """

    runs: int  # number of runs that finished or diverged
    reached_runs: int
    steps: Spread | None
    tokens: Spread | None
    seconds: Spread | None  # time of training
    token_fraction: Spread | None  # `tokens` as a fraction of all tokens of the baseline
    time_fraction: Spread | None  # `seconds` as a fraction of all seconds of the baseline
    effective_tokens_per_second: Spread | None  # the baseline's tokens / `seconds`
    effective_speedup: float | None  # effective tokens/s / (the baseline's tokens / its seconds)
    # Whether the 95 % interval of the difference over paired seeds contains 0. With fewer than two
    # common seeds, whether mean losses are equal to the digits that are printed.
    level: bool

    @property
    def shortfall(self) -> str:
        """Say how many runs reached the loss, if not all did; else an empty string."""
        if self.reached_runs == self.runs:
            return ""
        if self.reached_runs == 0:
            return "not reached"
        return f"reached in {self.reached_runs} of {self.runs} runs"


@dataclass(frozen=True)
class Analysis:
    """The recipes, the baseline first, and the comparison of each recipe with the baseline."""

    recipes: tuple[RecipeSummary, ...]
    baseline: RecipeSummary | None
    target: float | None  # nats per token: the baseline's final validation loss
    comparisons: dict[str, Comparison]  # keys are recipes; empty without a target

    @property
    def candidates(self) -> tuple[RecipeSummary, ...]:
        """Every recipe except the baseline."""
        return tuple(recipe for recipe in self.recipes if recipe is not self.baseline)

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every run, recipe by recipe."""
        return tuple(run for recipe in self.recipes for run in recipe.runs)


def preset_of(run: Run) -> str:
    """Return the preset of a run's model, or a phrase if the configuration gives none."""
    model = run.start.config.get("model", {})
    if "preset" not in model and model.get("weights"):
        return f"the model in {Path(str(model['weights'])).name}"
    return str(model.get("preset", "an unnamed model"))


def recipe_of(run: Run) -> str:
    """Return the name of a run's recipe."""
    return run.start.recipe


def analyze(
    runs: Sequence[Run], baseline: str | None, *, group: Callable[[Run], str] = recipe_of
) -> Analysis:
    """Group ``runs`` by recipe, average their seeds and compare each recipe with the baseline.

    Args:
        runs: The runs in any order, including unfinished and failed ones.
        baseline: The name of a group, or None for no comparison.
        group: Returns the name of the group in which a run is averaged; by default its recipe.

    Raises:
        ReportError: If there are no runs, or no run of the baseline.
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
    """Choose the default baseline: the fair AdamW, else the papers' AdamW, else none."""
    present = {run.start.recipe for run in runs}
    return next((name for name in _USUAL_BASELINES if name in present), None)


def _compare(recipe: RecipeSummary, baseline: RecipeSummary, target: float) -> Comparison:
    ended = [run for run in recipe.runs if state_of(run) in ("finished", "failed")]
    if recipe is baseline:
        ended = list(recipe.finished)
        reached = [Reach(e.step, e.tokens, e.seconds) for e in (r.end for r in ended) if e]
    else:
        found = [first_reach(run.evaluations, target) for run in recipe.finished]
        reached = [point for point in found if point is not None]
    points = reached if len(reached) == len(ended) else []
    tokens = Spread.of(point.tokens for point in points)
    seconds = Spread.of(point.seconds for point in points)
    all_tokens = baseline.tokens.mean if baseline.tokens else 0.0
    all_seconds = baseline.seconds.mean if baseline.seconds else 0.0
    # An evaluation before the first step, at 0 seconds, can have a lower loss than a baseline that
    # diverged.
    effective = Spread.of(all_tokens / point.seconds for point in points if point.seconds > 0)
    return Comparison(
        runs=len(ended),
        reached_runs=len(reached),
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
    found = difference(recipe, baseline)
    if found.unknown:
        return abs(recipe.val_loss.mean - baseline.val_loss.mean) < NO_DIFFERENCE
    return found.level


def difference(recipe: RecipeSummary, other: RecipeSummary) -> Difference:
    """Compare the final losses of two recipes seed by seed, over finished runs."""
    return Difference.of(_losses(recipe), _losses(other))


def _losses(recipe: RecipeSummary) -> dict[int, float]:
    """Return the final loss by seed; the mean if a seed has several finished runs."""
    losses: dict[int, list[float]] = {}
    for run in recipe.finished:
        if run.evaluations:
            losses.setdefault(run.start.seed, []).append(run.evaluations[-1].val_loss)
    return {seed: statistics.fmean(own) for seed, own in losses.items()}


def final_loss(run: Run) -> float:
    """Return a run's final validation loss, nats per token; infinite if it diverged."""
    if not run.finished or not run.evaluations:
        return math.inf
    last = run.evaluations[-1].val_loss
    return math.inf if math.isnan(last) else last


@dataclass(frozen=True)
class Reach:
    """A point of a run: at an evaluation, or interpolated between two."""

    step: float
    tokens: float
    seconds: float  # time of training


def first_reach(evaluations: Sequence[Evaluation], target: float) -> Reach | None:
    """Find the first point at which the validation loss is at or below ``target``.

    The loss is interpolated linearly between two evaluations. If no finite evaluation directly
    precedes the first one at or below the target, the result is that first one, which is an upper
    bound.

    Args:
        evaluations: Evaluations in the order of their steps.
        target: Loss to reach, in nats per token.

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
