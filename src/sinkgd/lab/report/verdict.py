"""The verdict of a comparison: a headline, a sentence for each recipe, and cautions."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sinkgd.lab.report import quantities
from sinkgd.lab.report.analysis import (
    Analysis,
    Comparison,
    RecipeSummary,
    difference,
    first_reach,
    state_of,
)
from sinkgd.lab.results import Run

_MOST_NAMES = 3  # longer lists are given as a number
_ENDINGS = {"unfinished": "is unfinished", "interrupted": "was interrupted"}
# A caution follows if the baseline reached its final loss before this fraction of its tokens.
_EARLY = 0.98
_MACHINE = ("device", "cpu", "cores", "threads")  # parts of an environment that speed depends on
# Ratio of step times without the optimizer, above which times are not comparable. On an idle
# machine the recorded demo's runs differ by a factor of 1.16.
_UNSTEADY = 1.3


@dataclass(frozen=True)
class Verdict:
    """The conclusions of a page, in sentences."""

    headline: str
    sentences: dict[str, str]  # keys are recipes
    cautions: tuple[str, ...]
    times_comparable: bool = True  # if not, a caution says so


def judge(analysis: Analysis) -> Verdict:
    """Return the verdict on an analysis."""
    slowed = unequal_speed(analysis)
    return Verdict(
        headline=_headline(analysis, with_times=not slowed),
        sentences={recipe.name: _sentence(recipe, analysis) for recipe in analysis.recipes},
        cautions=(
            *_unequal_conditions(analysis),
            *slowed,
            *_few_seeds(analysis),
            *_baseline_got_worse(analysis),
            *_unfinished(analysis.runs),
        ),
        times_comparable=not slowed,
    )


def _headline(analysis: Analysis, *, with_times: bool) -> str:
    baseline, target = analysis.baseline, analysis.target
    if baseline is None:
        return _ranking(analysis.recipes)
    if target is None:
        return f"{baseline.name}, the baseline, has no finite final loss to compare with"
    outcomes = [(one, analysis.comparisons[one.name]) for one in analysis.candidates]
    outcomes = [(one, comparison) for one, comparison in outcomes if one.val_loss is not None]
    if not outcomes:
        return f"{baseline.name} ended at {quantities.loss(target)}; nothing to compare it with yet"
    return _standings(baseline, target, outcomes, with_times=with_times)


def _standings(
    baseline: RecipeSummary,
    target: float,
    outcomes: Sequence[tuple[RecipeSummary, Comparison]],
    *,
    with_times: bool,
) -> str:
    """Name the recipes that reached the target, those that are level, and the others."""
    goal = f"{baseline.name}’s final loss of {quantities.loss(target)}"
    level = [one.name for one, comparison in outcomes if comparison.level]
    won = [
        (fraction.mean, one.name, comparison)
        for one, comparison in outcomes
        if (fraction := comparison.token_fraction) and not comparison.level
    ]
    rest = [(one, c) for one, c in outcomes if not c.token_fraction and not c.level]
    lost = [one.name for one, comparison in rest if comparison.reached_runs == 0]
    clauses = []
    if won:
        clauses.append(_reached(sorted(won, key=lambda row: row[:2]), goal, with_times=with_times))
    if level:
        with_whom = "" if won else f" with {baseline.name} at {quantities.loss(target)}"
        clauses.append(f"{_names(level)} ended level{with_whom}")
    for one, comparison in rest:
        if comparison.reached_runs:
            it = "it" if won else goal
            runs = f"{comparison.reached_runs} of {comparison.runs} runs"
            clauses.append(f"{_called(one.name)} reached {it} only in {runs}")
    if lost:
        clauses.append(f"{_names(lost)} did not reach {'it' if clauses else goal}")
    return "; ".join(clauses)


def _reached(won: Sequence[tuple[float, str, Comparison]], goal: str, *, with_times: bool) -> str:
    """Name the winners with the fraction of the baseline's tokens and time that each took."""
    percents = _list([quantities.percent(fraction) for fraction, _, _ in won])
    clause = f"{_list([_called(name) for _, name, _ in won])} reached {goal} with {percents} of "
    clause += "its tokens"
    times = [c.time_fraction.mean for _, _, c in won if c.time_fraction is not None]
    if with_times and len(times) == len(won):
        pairs = zip(times, (fraction for fraction, _, _ in won), strict=True)
        slower = all(time > 1 >= fraction for time, fraction in pairs)
        took = _list([quantities.percent(time) for time in times])
        clause += f"{' but' if slower else ' and' if len(won) == 1 else ', and'} {took} of its time"
    return clause


def _ranking(recipes: Sequence[RecipeSummary]) -> str:
    ended = sorted((one.val_loss.mean, one.name) for one in recipes if one.val_loss)
    if not ended:
        return "No run has finished yet"
    lowest, name = ended[0]
    if len(ended) == 1:
        return f"{name} ended at a validation loss of {quantities.loss(lowest)}"
    return f"{name} ended lowest, at a validation loss of {quantities.loss(lowest)}"


def _sentence(recipe: RecipeSummary, analysis: Analysis) -> str:
    if recipe.val_loss is None:
        states = sorted({state_of(run) for run in recipe.runs if not run.finished})
        return f"No result: {' and '.join(states)}." if states else "No result: never evaluated."
    if not math.isfinite(recipe.val_loss.mean):
        return "No result: its final loss is not a finite number."
    ended = f"ended at {quantities.loss(recipe.val_loss.mean)}"
    if recipe is analysis.baseline:
        return f"The baseline {ended}."
    comparison = analysis.comparisons.get(recipe.name)
    if comparison is None or analysis.target is None:
        return f"It {ended}."
    return f"{_outcome(comparison)} It {ended}, {_difference(recipe, analysis.target)}."


def _outcome(comparison: Comparison) -> str:
    if comparison.level:
        return "Level with the baseline: no difference beyond the spread of the seeds."
    if comparison.reached_runs == 0:
        return "Did not reach the baseline’s final loss."
    if comparison.reached_runs < comparison.runs:
        reached, runs = comparison.reached_runs, comparison.runs
        return f"Only {reached} of {runs} runs reached the baseline’s final loss."
    return "Reached the baseline’s final loss."


def _difference(recipe: RecipeSummary, target: float) -> str:
    if recipe.val_loss is None or abs(recipe.val_loss.mean - target) < 0.0005:
        return "the same"
    difference = recipe.val_loss.mean - target
    return f"{quantities.loss(abs(difference))} {'higher' if difference > 0 else 'lower'}"


def _few_seeds(analysis: Analysis) -> list[str]:
    single = [one.name for one in analysis.recipes if one.seeds == 1]
    unpaired = [
        one.name
        for one in analysis.candidates
        if analysis.baseline and one.seeds > 1 < analysis.baseline.seeds
        if difference(one, analysis.baseline).count < 2
    ]
    found = []
    if single:
        who = "Each recipe" if len(single) == len(analysis.recipes) > 1 else _names(single)
        verb = "has" if len(single) == 1 or who == "Each recipe" else "have"
        found.append(
            f"{who} {verb} a single seed, so how far seeds differ is unknown: read a small "
            "difference as a tie, and compare with --seeds 3 before deciding."
        )
    if unpaired and analysis.baseline:
        verb = "shares" if len(unpaired) == 1 else "share"
        found.append(
            f"{_names(unpaired)} {verb} fewer than two seeds with {analysis.baseline.name}, so "
            "which differences are chance is unknown: run the same seeds for each recipe."
        )
    return found


def _baseline_got_worse(analysis: Analysis) -> list[str]:
    baseline = analysis.baseline
    for run in baseline.finished if baseline else ():
        final = run.evaluations[-1].val_loss if run.evaluations else math.nan
        point = first_reach(run.evaluations, final)
        if point and run.end and point.tokens < _EARLY * run.end.tokens:
            share = quantities.percent(point.tokens / run.end.tokens)
            return [
                f"{run.start.name} first had its final loss after {share} of its tokens and was no "
                "better at the end. Savings of other recipes, relative to its whole run, are "
                "overstated."
            ]
    return []


def _unequal_conditions(analysis: Analysis) -> list[str]:
    finished = [run for run in analysis.runs if run.finished]
    conditions = {
        "model size": {run.start.parameters for run in finished},
        "tokens per step": {run.start.tokens_per_step for run in finished},
        "total tokens": {run.end.tokens for run in finished if run.end},
        "evaluation tokens": {e.eval_tokens for r in finished for e in r.evaluations[-1:]},
    }
    unequal = [name for name, values in conditions.items() if len(values) > 1]
    return [f"The runs are not comparable: they differ in {_names(unequal)}."] if unequal else []


def unequal_speed(analysis: Analysis) -> list[str]:
    """Return a caution if the same work took unequal times, else an empty list.

    Forward and backward are the same for all recipes, so they should take equally long in all runs
    with one number of trained parameters and one batch.
    """
    finished = [run for run in analysis.runs if run.finished and run.steps]
    passes: dict[tuple[int, int], list[float]] = {}
    for run in finished:
        seconds = statistics.fmean(row.step_seconds - row.optimizer_seconds for row in run.steps)
        passes.setdefault((run.start.parameters, run.start.tokens_per_step), []).append(seconds)
    unequal = [own for own in passes.values() if max(own) > _UNSTEADY * min(own)]
    if not unequal:
        return []
    low, high = (quantities.duration(pick(unequal[0])) for pick in (min, max))
    cause = "; ".join(_changes_of_machine(finished)) or "probably other work slowed the machine"
    return [
        f"A step without its optimizer took {low} in one run and {high} in another, though both "
        f"compute the same in it: {cause}. Do not compare times and tokens per second; losses and "
        "tokens are not affected."
    ]


def _changes_of_machine(runs: Sequence[Run]) -> list[str]:
    """Name the differences of the machines, between runs and between a run's start and resume."""
    found = []
    for name in _MACHINE:
        begun = dict.fromkeys(str(run.start.environment.get(name)) for run in runs)
        if len(begun) > 1:
            found.append(f"{name} was {' and '.join(begun)}")
    return found + [
        f"{run.start.name} went on after step {resume.step} with {name} {now} instead of {before}"
        for run in runs
        for resume in run.resumes
        for name, (before, now) in resume.changed.items()
        if name in _MACHINE
    ]


def _unfinished(runs: Sequence[Run]) -> list[str]:
    cautions = []
    for run in runs:
        if run.finished:
            continue
        step = run.end.step if run.end else run.steps[-1].step if run.steps else 0
        reason = f": {run.end.message}" if run.end and run.end.message else ""
        cautions.append(
            f"{run.start.name} {_ENDINGS.get(state_of(run), state_of(run))} at step {step} and is "
            f"in no average{reason}"
        )
    return cautions


def _called(name: str) -> str:
    """Return a recipe's name for a sentence; the paper's SinkGD is marked as not the default."""
    return f"{name} (without deflation)" if name == "sinkgd-paper" else name


def _names(names: Sequence[str]) -> str:
    called = [_called(name) for name in names]
    return _list(called) if len(called) <= _MOST_NAMES else f"{len(called)} recipes"


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
